"""How a known passage is looked up: by its window, the characters that its first word begins.

An index maps windows to the extents ``(lead, length)`` of the passages that begin so. It answers
with candidates; ``matching`` decides. There are two homes for one: a dict, here, and the manifest
of a store, in which millions of passages need next to no memory.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gist_rag.types import content_key, normalise

WINDOW = 32
"""Characters of a window. Passages that have fewer from their first letter on are not indexed."""

Extent = tuple[int, int]
"""Characters of a passage before its first letter or digit, and of the whole; both normalised."""

# Scripts that set no spaces between words: Thai to Myanmar, Khmer, and CJK with kana.
SPACELESS = "\u0e00-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
# Where a passage may begin: each run of letters and digits, and each letter of a spaceless script.
_ANCHOR = re.compile(rf"[^\W_{SPACELESS}]+|[^\W_]")


class Place(NamedTuple):
    """Where a passage stands in an index."""

    window: str
    extent: Extent

    @property
    def num_chars(self) -> int:
        """Characters from the first letter or digit on."""
        lead, length = self.extent
        return length - lead


def place(folded: str) -> Place:
    """Where a normalised passage stands; with less than a window of characters, nowhere."""
    anchor = _ANCHOR.search(folded)
    lead = anchor.start() if anchor else len(folded)
    return Place(folded[lead : lead + WINDOW], (lead, len(folded)))


def find_heads(text: str) -> list[int]:
    """Where passages may begin in a normalised text, and have a whole window of characters."""
    kinds = _kinds()[_codes(text[: max(0, len(text) - WINDOW + 1)])]
    in_word = kinds == _IN_WORD
    begins = kinds == _ALONE
    begins[:1] |= in_word[:1]
    begins[1:] |= in_word[1:] & ~in_word[:-1]
    found: list[int] = np.flatnonzero(begins).tolist()
    return found


def window_numbers(text: str, heads: Sequence[int], seed: int = 0) -> NDArray[np.int64]:
    """A number of 32 bits for the window at each head; stored, so it must stay as it is.

    A polynomial of the window's characters modulo 2^64, the difference of two sums over the text.

    Args:
        heads: each with a whole window of characters after it.
        seed: other seeds give other numbers.
    """
    places = np.asarray(heads, dtype=np.int64)
    mixed = np.empty(len(heads), dtype=np.uint64)
    for first in range(0, len(heads), _BLOCK):
        block = slice(first, first + _BLOCK)
        start = int(places[block].min())
        codes = _codes(text[start : int(places[block].max()) + WINDOW])
        sums = np.zeros(len(codes) + 1, dtype=np.uint64)
        np.cumsum(codes * _powers(_ODD, len(codes)), out=sums[1:])
        begins = places[block] - start
        windows = sums[begins + WINDOW] - sums[begins]
        mixed[block] = windows * _powers(_INVERSE, len(codes))[begins] + np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(_ODD)
    numbers: NDArray[np.int64] = (mixed >> np.uint64(32)).astype(np.int64)
    return numbers


_BLOCK = 8192  # windows at a time, so that a book as a prompt takes little more memory than a page
_ODD = 0x9E3779B97F4A7C15
_INVERSE = pow(_ODD, -1, 2**64)
_IN_WORD, _ALONE = 1, 2


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """``base ** 0`` to ``base ** (count - 1)`` modulo 2^64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def _codes(text: str) -> NDArray[np.uint32]:
    """Code points."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@cache
def _kinds() -> NDArray[np.uint8]:
    """Of each code point, whether it is a letter or digit, and whether one that stands alone."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    kinds = np.zeros(len(every), dtype=np.uint8)
    for found in re.finditer(r"[^\W_]+", every):
        kinds[found.start() : found.end()] = _IN_WORD
    for found in re.finditer(f"[{SPACELESS}]+", every):
        kinds[found.start() : found.end()] *= _ALONE
    return kinds


class Index(Protocol):
    """The passages of one space. Any number of threads may ask while others write."""

    def extents(self, text: str, heads: Sequence[int]) -> Mapping[int, Collection[Extent]]:
        """Extents of the passages that have the window at a head, maybe more, by head.

        Args:
            text: normalised.
            heads: where letters or digits begin, each with a whole window after it.
        """
        ...

    def known(self, contents: Collection[str]) -> set[str]:
        """Those of the contents that are known; this is what counts."""
        ...


class MemoryIndex:
    """An index in memory: 40 us and 0.6 KB per passage."""

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        # window > extent > number of passages with both. Writers hold the lock; readers do
        # without, as each of their steps (get, in, a tuple of keys) is atomic.
        self._windows: dict[str, dict[Extent, int]] = {}
        self._writing = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, text: str) -> None:
        """Index a passage, unless it is too short to have a window."""
        standing = place(normalise(text))
        if len(standing.window) < WINDOW:
            return
        content = content_key(text)
        with self._writing:
            if content not in self._places:
                extents = self._windows.setdefault(standing.window, {})
                extents[standing.extent] = extents.get(standing.extent, 0) + 1
                self._places[content] = standing

    def discard(self, content: str) -> None:
        """Forget a passage; one that is not indexed is ignored."""
        with self._writing:
            standing = self._places.pop(content, None)
            if standing is None:
                return
            extents = self._windows[standing.window]
            extents[standing.extent] -= 1
            if not extents[standing.extent]:
                del extents[standing.extent]
            if not extents:
                del self._windows[standing.window]

    def extents(self, text: str, heads: Sequence[int]) -> dict[int, Collection[Extent]]:
        get = self._windows.get
        hits = ((head, get(text[head : head + WINDOW])) for head in heads)
        return {head: tuple(extents) for head, extents in hits if extents}

    def known(self, contents: Collection[str]) -> set[str]:
        return {content for content in contents if content in self._places}
