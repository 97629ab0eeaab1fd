"""From messages to the segments of a prompt: text, and known passages.

A chat template may trim, JSON-encode or repeat what stands in a message, so passages are found in
the messages, before the template is rendered. Each is then put between two markers that hold a
random nonce, and the markers are looked up in the rendered prompt. What stands between them is the
passage as this template writes it. Whatever the template does, the segments joined are the prompt
that it renders without us: where markers change more than themselves, all of it stays text. So does
a passage that the template altered (say, redacted): its gist would tell what the prompt does not.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, TypeAlias

from gist_rag.types import Message, Passage, normalise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """A piece of the prompt to be read as text."""

    text: str


@dataclass(frozen=True)
class Known:
    """A known passage of the prompt.

    Attributes:
        content: the content key its gist is found by.
        text: how the prompt writes it, to be read if there is no gist.
    """

    content: str
    text: str


SEARCHED = ("system", "user", "tool")
"""Roles in whose messages passages are looked for; what the model said itself stays text."""

Segment: TypeAlias = Text | Known
Segments: TypeAlias = Sequence[Segment]


class Found(Protocol):
    """A passage with this content key stands at ``text[start:end]``."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def content(self) -> str: ...


def split_messages(
    messages: Sequence[Message],
    find: Callable[[str], Sequence[Found]],
    render: Callable[[list[Message]], str],
    roles: Collection[str] = SEARCHED,
) -> list[Segment]:
    """Render a conversation and split the prompt around its known passages.

    Args:
        find: known passages of a text, in order and without overlap.
        render: the chat template. It is called twice if there are passages, and must return the
            same prompt for the same messages.
        roles: whose messages are searched.

    Returns:
        Segments that, joined, are exactly ``render(messages)``.
    """
    prompt = render(list(messages))
    markers = _Markers()
    marked = [message.copy() for message in messages]
    for message in marked:
        if message["role"] in roles:
            message["content"] = markers.put(message["content"], find(message["content"]))
    if not markers.passages:
        return merge([Text(prompt)])
    segments = merge(markers.split(render(marked)))
    if render_plain(segments) != prompt:
        _warn_unsplittable()
        return merge([Text(prompt)])
    return segments


def merge(segments: Iterable[Segment]) -> list[Segment]:
    """Join neighbouring texts and drop empty ones; the prompt stays the same."""
    merged: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if merged and isinstance(segment, Text) and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + segment.text)
        else:
            merged.append(segment)
    return merged


def render_plain(segments: Iterable[Segment]) -> str:
    """The prompt with every passage as text."""
    return "".join(segment.text for segment in segments)


def split_text(prompt: str, found: Iterable[Found]) -> list[Segment]:
    """A raw prompt split around its known passages."""
    segments: list[Segment] = []
    at = 0
    for match in found:
        passage = Known(match.content, prompt[match.start : match.end])
        segments += Text(prompt[at : match.start]), passage
        at = match.end
    return merge([*segments, Text(prompt[at:])])


def num_known(segments: Iterable[Segment]) -> int:
    return sum(isinstance(s, Known) for s in segments)


def with_only(segments: Segments, places: Collection[int]) -> list[Segment]:
    """With some of the known passages, counted from 0. With each other one goes the whitespace
    before it, or else behind it. Texts stay apart, so that a prompt's first one does not change."""
    known = [i for i, s in enumerate(segments) if isinstance(s, Known)]
    gone = {i for place, i in enumerate(known) if place not in places}
    for i in sorted(gone):
        for gap in (i - 1, i + 1):
            inside = 0 < gap < len(segments) - 1 and gap not in gone
            if inside and not segments[gap].text.strip():
                gone.add(gap)
                break
    return [s for i, s in enumerate(segments) if i not in gone]


def as_text(segments: Segments, places: Collection[int]) -> list[Segment]:
    """With some of the known passages, counted from 0, as text."""
    count = itertools.count()
    return merge(
        Text(s.text) if isinstance(s, Known) and next(count) in places else s for s in segments
    )


def without_gaps(segments: Segments) -> list[Segment]:
    """Without what stands between neighbouring passages, where that is whitespace."""
    kept = []
    for i, segment in enumerate(segments):
        beside = segments[max(0, i - 1) : i + 2 : 2]
        between = len(beside) == 2 and all(isinstance(s, Known) for s in beside)
        if isinstance(segment, Known) or segment.text.strip() or not between:
            kept.append(segment)
    return kept


QUESTION_WORDS, QUESTION_CHARS = 4, 1000
"""A question behind the passages has so many words or more; so many characters are judged."""


def question_of(segments: Segments, plain: Callable[[str], str]) -> str:
    """What a prompt asks: the text behind its passages, or all its text where that is short.

    Args:
        plain: a piece of a prompt without the tokens of a chat template.
    """
    texts = [s.text for s in segments if isinstance(s, Text)]
    asked = plain(texts[-1])
    if len(asked.split()) < QUESTION_WORDS:
        asked = plain("".join(texts))
    return asked[-QUESTION_CHARS:]


RAG_DOCUMENTS = (
    "Answer the question with a short phrase from the documents.\n\nDocuments:\n\n{passages}\n\n"
)
RAG_SEPARATOR = "\n\n"
MARK = "\u241e"
"""Stands for a passage while a chat template is rendered; a character that no template uses."""
RAG_QUESTION = "Question: {question}\nAnswer with a short phrase."


def rag_messages(question: str, passages: Sequence[str]) -> list[Message]:
    """The project's default RAG prompt; without passages it asks the question alone.

    There is no system message: what the chat template puts there by itself served small models
    best, and the instruction stands before the documents, where it is cached with the prefix.
    """
    documents = RAG_DOCUMENTS.format(passages=RAG_SEPARATOR.join(passages)) if passages else ""
    return [{"role": "user", "content": documents + RAG_QUESTION.format(question=question)}]


def rag_segments(
    question: str, passages: Sequence[Passage], render: Callable[[list[Message]], str]
) -> list[Segment]:
    """The rendered RAG prompt with its passages marked as known, however short they are.

    Args:
        render: the chat template.
    """
    spans: list[_Span] = []
    at = len(RAG_DOCUMENTS.partition("{passages}")[0])
    for passage in passages:
        spans.append(_Span(at, at + len(passage.text), passage.content))
        at = spans[-1].end + len(RAG_SEPARATOR)
    messages = rag_messages(question, [passage.text for passage in passages])
    return split_messages(messages, lambda _: spans, render)


class _Span(NamedTuple):
    """A passage where we put it ourselves."""

    start: int
    end: int
    content: str


def rag_pieces(
    question: str,
    passages: Sequence[str | None],
    render: Callable[[list[Message]], str],
) -> tuple[str, list[str | None]]:
    """The rendered RAG prompt: the text before the first gist, and the pieces from there on.

    Args:
        passages: texts, and ``None`` for each passage that is there as a gist.
        render: the chat template.

    Returns:
        Pieces in prompt order: texts, and ``None`` for each gist; the last one is a text. Between
        neighbouring gists there is nothing: they stand side by side.
    """
    given = [MARK if text is None else text for text in passages]
    first, *others = render(rag_messages(question, given)).split(MARK)
    pieces: list[str | None] = []
    for text in others:
        if pieces and not (pieces[-1] or "").strip():
            pieces.pop()
        pieces += None, text
    return first, pieces


def framing(request: str, render: Callable[[list[Message]], str]) -> tuple[str, str]:
    """What a chat template puts before a passage, and after it with a request about it."""
    before, after = render([{"role": "user", "content": MARK + request}]).split(MARK)
    return before, after


class _Markers:
    """Marks passages with a nonce that no user can foresee, and finds them after rendering.

    A marker is made of characters that neither JSON nor HTML encoding changes.
    """

    def __init__(self) -> None:
        nonce = secrets.token_hex(16)
        self.passages: list[Known] = []
        self._open = f"[[gist-{nonce}-%d]]"
        self._close = f"[[end-{nonce}]]"
        self._pair = re.compile(rf"\[\[gist-{nonce}-(\d+)\]\](.*?)\[\[end-{nonce}\]\]", re.DOTALL)

    def put(self, text: str, found: Iterable[Found]) -> str:
        """The text with a pair of markers around each passage."""
        pieces: list[str] = []
        at = 0
        for match in found:
            passage = Known(match.content, text[match.start : match.end])
            opening = self._open % len(self.passages)
            pieces += text[at : match.start], opening, passage.text, self._close
            self.passages.append(passage)
            at = match.end
        return "".join([*pieces, text[at:]])

    def split(self, prompt: str) -> list[Segment]:
        """The segments of a rendered prompt; unpaired or altered markers stay in its text."""
        segments: list[Segment] = []
        at = 0
        for pair in self._pair.finditer(prompt):
            passage, rendered = self.passages[int(pair[1])], pair[2]
            segments.append(Text(prompt[at : pair.start()]))
            segments.append(
                Known(passage.content, rendered)
                if _is_unaltered(rendered, passage.text)
                else Text(rendered)
            )
            at = pair.end()
        return [*segments, Text(prompt[at:])]


def _is_unaltered(rendered: str, passage: str) -> bool:
    """Whether a template changed a passage in whitespace or by JSON encoding only."""
    if normalise(rendered) == normalise(passage):
        return True
    try:
        decoded = json.loads(f'"{rendered}"')
    except ValueError:
        return False
    return normalise(decoded) == normalise(passage)


@cache
def _warn_unsplittable() -> None:
    """Cached, so that a server says it once and not with each request."""
    logger.warning(
        "the chat template alters its messages (cuts or upper-cases them, for example), "
        "so known passages are read as text"
    )
