"""How a known passage is looked up: by its window, the characters that its first word begins.

An index maps windows to the extents ``(lead, length)`` of the passages that begin so. It answers
with candidates; ``matching`` decides. There are two homes for one: a dict, here, and the manifest
of a store, in which millions of passages need next to no memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
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
ANCHOR = re.compile(rf"[^\W_{SPACELESS}]+|[^\W_]")


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
    anchor = ANCHOR.search(folded)
    lead = anchor.start() if anchor else len(folded)
    return Place(folded[lead : lead + WINDOW], (lead, len(folded)))


def window_numbers(text: str, heads: Sequence[int], seed: int = 0) -> NDArray[np.int64]:
    """A number of 32 bits for the window at each head; stored, so it must stay as it is.

    Args:
        heads: each with a whole window of characters after it.
        seed: other seeds give other numbers.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    starts = np.asarray(heads, dtype=np.int64)[:, None]
    mixed = np.empty(len(heads), dtype=np.uint64)
    for first in range(0, len(heads), _BLOCK):
        block = slice(first, first + _BLOCK)
        windows = codes[starts[block] + np.arange(WINDOW)]
        mixed[block] = windows @ _POWERS + np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(33))) * _ODD
    numbers: NDArray[np.int64] = (mixed >> np.uint64(32)).astype(np.int64)
    return numbers


_BLOCK = 8192  # windows at a time, so that a book as a prompt takes no more memory than a page
_ODD = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.array([pow(int(_ODD), i, 2**64) for i in range(WINDOW)], dtype=np.uint64)


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
