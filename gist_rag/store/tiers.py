"""Memory over disk: the packed states that were read last stay at hand, within a byte budget."""

from __future__ import annotations

import threading
from collections import OrderedDict

from gist_rag.store.shards import Place
from gist_rag.types import GistKey, PackedState


class MemoryTier:
    """Least recently used packed states go first. Safe for many threads.

    A state is remembered with the place it was read from and given out only for that same place,
    so one that was deleted, replaced or moved meanwhile, by whatever process, is never read.

    Args:
        memory_bytes: budget for the tensors kept here; 0 keeps nothing.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._states: OrderedDict[GistKey, tuple[Place, PackedState]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: GistKey, place: Place) -> PackedState | None:
        with self._lock:
            known, packed = self._states.get(key, (None, None))
            if packed is None or known != place:
                self.misses += 1
                return None
            self.hits += 1
            self._states.move_to_end(key)
            return packed

    def put(self, key: GistKey, place: Place, packed: PackedState) -> None:
        """Keep a state at the cost of those read longest ago; one above the budget is not kept."""
        with self._lock:
            self._remove(key)
            if packed.num_bytes > self.memory_bytes:
                return
            self._states[key] = (place, packed)
            self.num_bytes += packed.num_bytes
            while self.num_bytes > self.memory_bytes:
                self._remove(next(iter(self._states)))

    def drop(self, key: GistKey) -> None:
        with self._lock:
            self._remove(key)

    def _remove(self, key: GistKey) -> None:
        if key in self._states:
            _, packed = self._states.pop(key)
            self.num_bytes -= packed.num_bytes
