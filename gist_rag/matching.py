r"""Finds known passages in a text.

Prompts reach an LLM class as plain strings, so a passage is recognised by its own words: no handle
in the text, no id in the metadata. What is not found stays text, which costs time and nothing else.

Index: the first 32 normalised characters from a passage's first letter or digit on (its *window*)
point to the extents ``(lead, length)`` of the passages that begin so. In a text, only beginnings of
words are looked up, and a hit counts when the sha256 of the whole span is a known content key: an
edited passage can never match.

Passages inside JSON or a Python ``repr`` are found in a second look at what the first one left, in
which ``\n``, ``\"``, ``\u00e9`` and their like are read as the characters they stand for.

Speed, on one core of a shared machine: a 6,000-character prompt with 5 of 20,000 known passages
takes 0.5 ms, or 1.5 ms as JSON; indexing takes 40 us and 0.6 KB per passage. To measure again:
``pytest tests/test_matching.py -k speed -s``.
"""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from operator import attrgetter
from typing import NamedTuple

from gist_rag.errors import BadInput
from gist_rag.types import content_key, normalise


@dataclass(frozen=True, slots=True)
class Match:
    """A known passage at ``text[start:end]``."""

    start: int
    end: int
    content: str


class PassageMatcher:
    """The passages we know, and the search for them in prompts.

    Any number of threads may search while others add and discard.

    Args:
        min_chars: passages with fewer normalised characters, counted from the first letter or
            digit on, are not indexed, so that a phrase in a question is never taken for one.
    """

    def __init__(self, min_chars: int = 48) -> None:
        if min_chars < _WINDOW:
            raise BadInput(f"min_chars is {min_chars}; it must be {_WINDOW} or more")
        self.min_chars = min_chars
        self._places: dict[str, _Place] = {}
        # window > extent > number of passages with both. Writers hold the lock; readers do
        # without, as each of their steps (get, in, sorted over tuples) is atomic.
        self._windows: dict[str, dict[_Extent, int]] = {}
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, content: str) -> bool:
        return content in self._places

    def add(self, text: str) -> str | None:
        """Index a passage; its content key, or ``None`` if it is too short to be recognised."""
        place = _place(normalise(text))
        if place.num_chars < self.min_chars:
            return None
        content = content_key(text)
        with self._writing:
            if content not in self._places:
                extents = self._windows.setdefault(place.window, {})
                extents[place.extent] = extents.get(place.extent, 0) + 1
                self._places[content] = place
        return content

    def discard(self, content: str) -> None:
        """Forget a passage; one that is not indexed is ignored."""
        with self._writing:
            place = self._places.pop(content, None)
            if place is None:
                return
            extents = self._windows[place.window]
            extents[place.extent] -= 1
            if not extents[place.extent]:
                del extents[place.extent]
            if not extents:
                del self._windows[place.window]

    def find(self, text: str) -> list[Match]:
        """The known passages in a text: leftmost, then longest, without overlap, in text order.

        A passage that needs its escapes decoded comes second to those that do not.
        """
        matches = self._find_plain(text)
        if "\\" in text:
            for start, end in _gaps(matches, len(text)):
                matches += self._find_escaped(text, start, end)
        return sorted(matches, key=attrgetter("start"))

    def why_not(self, passage: str, prompt: str) -> str:
        """One sentence for the user who asks why a passage of the prompt was not recognised."""
        folded = normalise(passage)
        place, content = _place(folded), content_key(passage)
        if place.num_chars < self.min_chars:
            return f"too short ({place.num_chars} < {self.min_chars} characters)"
        if content not in self:
            return "not indexed"
        for match in self.find(prompt):
            if match.content == content:
                return f"found at characters {match.start} to {match.end}"
        views = normalise(prompt), normalise(_unescape(prompt)[0])
        if any(folded in view for view in views):
            return "occurs, but joined to a letter, digit or backslash, or inside another passage"
        return _first_difference(folded, place, views)

    def _find_plain(self, text: str) -> list[Match]:
        folded = normalise(text)
        spans = list(self._spans(folded))
        if not spans:
            return []
        offset = _unfold(text)
        return [Match(offset(s.start), offset(s.end - 1) + 1, s.content) for s in spans]

    def _find_escaped(self, text: str, start: int, end: int) -> list[Match]:
        """Matches inside ``text[start:end]``, read with its escapes decoded."""
        decoded, origins = _unescape(text[start:end])
        return [
            Match(start + origins[match.start], start + origins[match.end], match.content)
            for match in self._find_plain(decoded)
        ]

    def _spans(self, folded: str) -> Iterator[Match]:
        """Matches in a normalised text."""
        span = self._next_span(folded, 0)
        while span is not None:
            yield span
            span = self._next_span(folded, span.end)

    def _next_span(self, folded: str, start: int) -> Match | None:
        # Anchor order is span order: there is no anchor between a span's start and its own anchor.
        for anchor in _ANCHOR.finditer(folded, start):
            head = anchor.start()
            extents = self._windows.get(folded[head : head + _WINDOW])
            if extents and (span := self._verify(folded, start, head, extents)):
                return span
        return None

    def _verify(
        self, folded: str, start: int, head: int, extents: dict[_Extent, int]
    ) -> Match | None:
        """The leftmost, then longest passage whose first letter or digit stands at ``head``."""
        for lead, length in sorted(extents, reverse=True):
            begin, end = head - lead, head - lead + length
            if begin < start or end > len(folded):
                continue
            if _splits_word(folded, begin) or _splits_word(folded, end):
                continue
            # A backslash outside is likely half of an escape: the second look reads it whole.
            if "\\" in folded[max(begin - 1, 0) : begin] + folded[end : end + 1]:
                continue
            content = _hash(folded[begin:end])
            if content in self._places:
                return Match(begin, end, content)
        return None


_WINDOW = 32
_HINT = 16  # characters by which why_not tells that a passage begins

_Extent = tuple[int, int]  # lead: characters before the first letter or digit; length of the whole


class _Place(NamedTuple):
    """Where a passage stands in the index."""

    window: str
    extent: _Extent

    @property
    def num_chars(self) -> int:
        """Characters from the first letter or digit on."""
        lead, length = self.extent
        return length - lead


# Scripts that set no spaces between words: Thai to Myanmar, Khmer, and CJK with kana.
_SPACELESS = (
    "\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_IS_SPACELESS = re.compile(f"[{_SPACELESS}]")
# Where a passage may begin: each run of letters and digits, and each letter of a spaceless script.
_ANCHOR = re.compile(rf"[^\W_{_SPACELESS}]+|[^\W_]")


def _place(folded: str) -> _Place:
    anchor = _ANCHOR.search(folded)
    lead = anchor.start() if anchor else len(folded)
    return _Place(folded[lead : lead + _WINDOW], (lead, len(folded)))


def _hash(folded: str) -> str:
    """``content_key`` of a normalised span; a lone surrogate, which no passage has, is no error."""
    return hashlib.sha256(folded.encode(errors="surrogatepass")).hexdigest()


def _splits_word(text: str, at: int) -> bool:
    """Whether a cut before ``text[at]`` would part letters or digits that belong together."""
    if not 0 < at < len(text):
        return False
    left, right = text[at - 1], text[at]
    if _is_mark(right):
        return True
    joined = (left.isalnum() or _is_mark(left)) and right.isalnum()
    return joined and not (_IS_SPACELESS.match(left) or _IS_SPACELESS.match(right))


def _is_mark(char: str) -> bool:
    """Whether a character only completes the one before it (accents, zero-width joiner)."""
    return char == "\u200d" or unicodedata.category(char).startswith("M")


def _gaps(matches: Sequence[Match], length: int) -> list[tuple[int, int]]:
    """What a list of matches leaves of a text of this length."""
    starts = [0, *(match.end for match in matches)]
    ends = [*(match.start for match in matches), length]
    return list(zip(starts, ends, strict=True))


def _unfold(text: str) -> Callable[[int], int]:
    """The way from a character of ``normalise(text)`` back to its offset in ``text``."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    folded_starts = list(accumulate((end - start + 1 for start, end in words), initial=0))

    def offset(index: int) -> int:
        word = bisect_right(folded_starts, index) - 1
        return words[word][0] + index - folded_starts[word]

    return offset


_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}"  # a surrogate pair: one character
    rf"|u{_HEX}{{4}}|U000{_HEX}{{5}}|x{_HEX}{{2}}|[bfnrt\"'\\/])"
)
_CONTROLS = dict(zip("bfnrt", "\b\f\n\r\t", strict=True))


def _unescape(text: str) -> tuple[str, list[int]]:
    """Decode the escapes of JSON and Python literals.

    Returns:
        The decoded text, and for each of its characters (and its end) the offset in ``text``.
    """
    pieces: list[str] = []
    origins: list[int] = []
    at = 0
    for escape in _ESCAPE.finditer(text):
        pieces += text[at : escape.start()], _decode(escape.group())
        origins += range(at, escape.start() + 1)
        at = escape.end()
    pieces.append(text[at:])
    origins += range(at, len(text) + 1)
    return "".join(pieces), origins


@lru_cache(maxsize=4096)
def _decode(escape: str) -> str:
    """The one character that an escape stands for; U+FFFD for half a surrogate pair."""
    if escape[1] not in "uUx":
        return _CONTROLS.get(escape[1], escape[1])
    units = escape.encode().decode("unicode_escape")
    return units.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first_difference(folded: str, place: _Place, views: Sequence[str]) -> str:
    """Where the best beginning of a passage in any of the views goes wrong."""
    lead, length = place.extent
    best, found = -1, ""
    for view in views:
        for head in re.finditer(re.escape(place.window[:_HINT]), view):
            begin = max(head.start() - lead, 0)
            agreed = _agreement(folded, view[begin : begin + length])
            if agreed > best:
                best, found = agreed, view[begin + agreed : begin + agreed + 20]
    if best < 0:
        return "does not occur"
    return (
        f"starts in the prompt but differs at character {best}: "
        f"expected {folded[best : best + 20]!r}, found {found!r}"
    )


def _agreement(left: str, right: str) -> int:
    """How many characters two texts share from their beginning on."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
