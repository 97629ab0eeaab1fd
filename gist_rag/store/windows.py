"""The index of a space in the manifest: no passage in memory, two queries per text at most.

A prompt has a thousand beginnings of words, few of which begin a passage. A filter of one bit per
window keeps the others from the manifest: 8 MiB for all spaces of a store, read in at the first
search and brought up to date with each commit. It never forgets; what it lets through in vain costs
a look at the manifest.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from gist_rag.store.manifest import Manifest, space_seed
from gist_rag.windows import Extent, window_numbers

_BITS = 2**26
_PAGE_ROWS = 10_000


class WindowFilter:
    """Which window numbers a store may have; those of other processes too."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._bits = np.zeros(0, dtype=np.uint8)
        self._generation = -1
        self._row = 0
        self._lock = threading.Lock()

    def passes(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each number may be there, as of the newest commit."""
        generation = self._manifest.generation()
        if generation != self._generation:
            with self._lock:
                self._read_new_rows()
                self._generation = generation  # last, so that nobody takes half of it for whole
        byte, bit = _place(numbers)
        found: NDArray[np.bool_] = (self._bits[byte] & bit) != 0
        return found

    def _read_new_rows(self) -> None:
        bits = self._bits if len(self._bits) else np.zeros(_BITS // 8, dtype=np.uint8)
        while rows := self._manifest.windows_after(self._row, _PAGE_ROWS):
            byte, bit = _place(np.array([number for _, number in rows], dtype=np.int64))
            np.bitwise_or.at(bits, byte, bit)
            self._row = rows[-1][0]
        self._bits = bits


class WindowTable:
    """An ``Index`` of the passages of one space."""

    def __init__(self, manifest: Manifest, filter_: WindowFilter, space: str) -> None:
        self._manifest = manifest
        self._filter = filter_
        self._space = space

    def extents(self, text: str, heads: Sequence[int]) -> dict[int, list[Extent]]:
        numbers = window_numbers(text, heads, space_seed(self._space))
        hits = np.flatnonzero(self._filter.passes(numbers)).tolist()
        if not hits:
            return {}
        found: dict[int, list[Extent]] = {}
        for number, extent in self._manifest.extents({int(numbers[hit]) for hit in hits}):
            found.setdefault(number, []).append(extent)
        return {heads[hit]: e for hit in hits if (e := found.get(int(numbers[hit])))}

    def known(self, contents: Collection[str]) -> set[str]:
        return self._manifest.known(self._space, contents)


def _place(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Byte and bit of each number."""
    return (numbers % _BITS) >> 3, np.left_shift(1, numbers & 7).astype(np.uint8)
