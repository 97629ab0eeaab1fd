"""Corpus files > passages, and long passages > shorter ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gist_rag.errors import BadInput
from gist_rag.jsonl import read_lines
from gist_rag.types import Passage

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def read_corpus(
    path: Path | str, *, with_title: bool = True, limit: int | None = None
) -> list[Passage]:
    """Passages of a ``.jsonl`` or ``.jsonl.gz`` file of records ``{"id", "title", "text"}``.

    A record without an id gets its line number. Other fields go into the passage's metadata.

    Args:
        with_title: put the title, where there is one, on a line before the text, unless the text
            begins with it.
        limit: read that many passages only.

    Raises:
        BadInput: no such file, no passages, or a record that cannot be used; names the line.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"the limit is {limit} passages; it must be 1 or more")
    passages: dict[str, Passage] = {}
    for where, record in islice(_records(Path(path)), limit):
        passage = _passage(record, where, with_title)
        if passage.id in passages:
            raise BadInput(f"{where}: a record with the id {passage.id!r} came before")
        passages[passage.id] = passage
    if not passages:
        raise BadInput(f"{path} holds no passages; it must have one JSON record per line")
    return list(passages.values())


def split(passage: Passage, max_words: int = 200, overlap: int = 0) -> list[Passage]:
    """Cut a long passage into pieces that end where sentences end.

    A sentence of more than ``max_words`` words is cut between words. Whitespace is folded.

    Args:
        max_words: longest piece.
        overlap: words at most, in whole sentences, that a piece repeats of the one before.

    Returns:
        The passage itself if it is short enough, else pieces with ids ``id#1``, ``id#2``, ...
    """
    if not 0 <= overlap < max_words:
        raise BadInput(f"overlap is {overlap} and max_words {max_words}; 0 <= overlap < max_words")
    if len(passage.text.split()) <= max_words:
        return [passage]
    pieces: list[list[str]] = [[]]
    for sentence in _sentences(passage.text, max_words):
        if _num_words(pieces[-1]) + _num_words([sentence]) > max_words:
            room = min(overlap, max_words - _num_words([sentence]))
            pieces.append(_tail(pieces[-1], room))
        pieces[-1].append(sentence)
    return [
        Passage(" ".join(piece), f"{passage.id}#{number}", passage.metadata)
        for number, piece in enumerate(pieces, start=1)
    ]


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """Each record with the place where it stands."""
    for where, line in read_lines(path, encoding="utf-8-sig"):
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{where} is not JSON: {error}") from error


def _passage(record: object, where: str, with_title: bool) -> Passage:
    if not isinstance(record, dict):
        raise BadInput(f"{where}: a JSON object is expected, not {record!r:.80}")
    text, title = record.get("text"), record.get("title") or ""
    if not isinstance(text, str) or not text.strip() or not isinstance(title, str):
        raise BadInput(f"{where}: a record needs a non-empty 'text'; 'title' may be left out")
    if with_title and not text.startswith(title):
        text = f"{title}\n{text}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: the text holds half of a surrogate pair: {error}") from error
    identity = where.rpartition(" ")[2] if record.get("id") is None else record["id"]
    metadata = {k: v for k, v in record.items() if k not in ("id", "text")}
    return Passage(text, str(identity), metadata)


def _sentences(text: str, max_words: int) -> Iterator[str]:
    """Sentences, or pieces of those that are too long, with whitespace folded."""
    for sentence in _SENTENCE_END.split(text):
        words = sentence.split()
        for first in range(0, len(words), max_words):
            yield " ".join(words[first : first + max_words])


def _num_words(sentences: list[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def _tail(sentences: list[str], max_words: int) -> list[str]:
    """The last sentences that together have at most ``max_words`` words."""
    first = len(sentences)
    while first and _num_words(sentences[first - 1 :]) <= max_words:
        first -= 1
    return sentences[first:]
