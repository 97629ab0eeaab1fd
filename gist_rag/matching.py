r"""Finds known passages in a text.

Prompts reach an LLM class as plain strings, so a passage is recognised by its own words: no handle
in the text, no id in the metadata. What is not found stays text, which costs time and nothing else.

The first 32 normalised characters from a passage's first letter or digit on (its *window*) lead to
the passages that begin so, in an ``Index``: a store's or one in memory. In a text, only beginnings
of words are looked up, and a hit counts when the sha256 of the whole span is a known content key:
an edited passage can never match.

Passages inside JSON or a Python ``repr`` are found in a second look at what the first one left, in
which ``\n``, ``\"``, ``\u00e9`` and their like are read as the characters they stand for.

How fast it is does not depend on how many passages are known: ``gist-rag bench matching``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from operator import attrgetter

from gist_rag.errors import BadInput
from gist_rag.types import content_key, normalise
from gist_rag.windows import SPACELESS, WINDOW, Index, Place, find_heads, place

MIN_CHARS = 48
"""Passages with fewer characters are not looked for in prompts."""


@dataclass(frozen=True, slots=True)
class Match:
    """A known passage at ``text[start:end]``."""

    start: int
    end: int
    content: str


class PassageMatcher:
    """The search for known passages in prompts. As safe for threads as its index.

    Args:
        index: the passages we know.
        min_chars: passages with fewer normalised characters, counted from the first letter or
            digit on, are not looked for, so that a phrase in a question is never taken for one.
    """

    def __init__(self, index: Index, min_chars: int = MIN_CHARS) -> None:
        if min_chars < WINDOW:
            raise BadInput(f"min_chars is {min_chars}; it must be {WINDOW} or more")
        self.index = index
        self.min_chars = min_chars

    def find(self, text: str) -> list[Match]:
        """The known passages in a text: leftmost, then longest, without overlap, in text order.

        A passage that needs its escapes decoded comes second to those that do not.
        """
        matches = self._find_plain(text)
        for start, end in _gaps(matches, len(text)):
            if "\\" in text[start:end]:
                matches += self._find_escaped(text, start, end)
        return sorted(matches, key=attrgetter("start"))

    def why_not(self, passage: str, prompt: str) -> str:
        """One sentence for the user who asks why a passage of the prompt was not recognised."""
        folded = normalise(passage)
        standing, content = place(folded), content_key(passage)
        if standing.num_chars < self.min_chars:
            return f"too short ({standing.num_chars} < {self.min_chars} characters)"
        if not self.index.known([content]):
            return "not indexed"
        for match in self.find(prompt):
            if match.content == content:
                return f"found at characters {match.start} to {match.end}"
        views = normalise(prompt), normalise(_unescape(prompt)[0])
        if any(folded in view for view in views):
            return "occurs, but joined to a letter, digit or backslash, or inside another passage"
        return _first_difference(folded, standing, views)

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
        # Candidate order is span order: at each anchor the leftmost, then the longest.
        candidates = list(self._candidates(folded))
        known = self.index.known({c.content for c in candidates}) if candidates else ()
        end = 0
        for candidate in candidates:
            if candidate.start >= end and candidate.content in known:
                yield candidate
                end = candidate.end

    def _candidates(self, folded: str) -> Iterator[Match]:
        """Spans that begin and measure as a known passage does, anchor by anchor."""
        heads = find_heads(folded)
        for head, extents in self.index.extents(folded, heads).items() if heads else ():
            for lead, length in sorted(extents, reverse=True):
                start, end = head - lead, head - lead + length
                if length - lead >= self.min_chars and _fits(folded, start, end):
                    yield Match(start, end, _hash(folded[start:end]))


_HINT = 16  # characters by which why_not tells that a passage begins
_IS_SPACELESS = re.compile(f"[{SPACELESS}]")


def _fits(folded: str, start: int, end: int) -> bool:
    """Whether a passage may begin and end here."""
    if start < 0 or end > len(folded) or _splits_word(folded, start) or _splits_word(folded, end):
        return False
    # A backslash outside is likely half of an escape: the second look reads it whole.
    return "\\" not in folded[max(start - 1, 0) : start] + folded[end : end + 1]


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
    """The way from a character of ``normalise(text)``, no space, to its offset in ``text``."""
    lead = len(text) - len(text.lstrip())
    spaces, shifts = [-1], [lead]  # folded spaces, and by how much what follows has moved
    for run in _SPACES.finditer(text, lead):
        spaces.append(run.start() - shifts[-1])
        shifts.append(shifts[-1] + run.end() - run.start() - 1)
    return lambda index: index + shifts[bisect_left(spaces, index) - 1]


_SPACES = re.compile(r"\s{2,}")
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


def _first_difference(folded: str, standing: Place, views: Sequence[str]) -> str:
    """Where the best beginning of a passage in any of the views goes wrong."""
    lead, length = standing.extent
    best, found = -1, ""
    for view in views:
        for head in re.finditer(re.escape(standing.window[:_HINT]), view):
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
