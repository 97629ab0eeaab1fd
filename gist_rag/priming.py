"""What happens with a passage that was seen but has no gist: nothing, or compressing now or later.

Errors never reach the one who showed the passage: each kind is logged once, and the passage is
read as text meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gist_rag.errors import BadInput, GistRagError
from gist_rag.modes import OnMiss
from gist_rag.types import Passage

logger = logging.getLogger(__name__)

QUEUE = 1024
"""Passages that may wait for the background thread; more are not taken."""
TOGETHER = 8
"""Passages that the background thread compresses at a time."""


class Primer:
    """Compresses passages on the way. Safe to share by threads.

    Args:
        missing: which of some passages have no gist.
        compress: gives passages their gists.
    """

    def __init__(
        self,
        missing: Callable[[Sequence[Passage]], Sequence[Passage]],
        compress: Callable[[Sequence[Passage]], object],
        *,
        limit: int = QUEUE,
    ) -> None:
        self._missing = missing
        self._compress = compress
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, Passage] = OrderedDict()
        self._refused: set[str] = set()
        self._logged: set[str] = set()
        self._worker: threading.Thread | None = None
        self._busy = self._closed = False

    def prime(self, passages: Sequence[Passage], on_miss: OnMiss) -> None:
        """See that passages have gists, now or soon.

        Raises:
            BadInput: an unknown ``on_miss``.
        """
        if on_miss not in ("ignore", "background", "inline"):
            raise BadInput(f"on_miss is {on_miss!r}; it must be ignore, background or inline")
        if on_miss == "ignore" or not passages:
            return
        with self._logged_errors():
            absent = [p for p in self._missing(passages) if p.content not in self._refused]
            if on_miss == "inline":
                self._try(absent)
            else:
                self._enqueue(absent)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do in the background; whether that came true in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), timeout)

    def close(self) -> None:
        """Stop the background thread; what it has not begun is left undone."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()

    def _enqueue(self, passages: Sequence[Passage]) -> None:
        with self._changed:
            if self._closed:
                return
            for passage in passages:
                if len(self._waiting) >= self._limit:
                    self._log("full", f"{self._limit} passages wait to be compressed; no more now")
                    break
                self._waiting.setdefault(passage.content, passage)
            if self._waiting and self._worker is None:
                self._worker = threading.Thread(
                    target=self._work, name="gist-rag-primer", daemon=True
                )
                self._worker.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = [
                    self._waiting.popitem(last=False)[1]
                    for _ in range(min(TOGETHER, len(self._waiting)))
                ]
                self._busy = True
            with self._logged_errors():
                self._try(self._missing(batch))
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _try(self, passages: Sequence[Passage]) -> None:
        """Compress passages; if that fails, one by one, so that one cannot spoil it for others."""
        if not passages:
            return
        try:
            self._compress(passages)
        except GistRagError as error:
            if len(passages) > 1:
                for passage in passages:
                    self._try([passage])
                return
            if isinstance(error, BadInput):
                self._refused.add(passages[0].content)  # it will not do next time either
            self._log(type(error).__name__, f"a passage stays text: {error}")

    @contextmanager
    def _logged_errors(self) -> Iterator[None]:
        """Whatever goes wrong, the thread in the background lives on and the question is read."""
        try:
            yield
        except Exception as error:
            self._log(type(error).__name__, f"passages stay text: {error!r}")

    def _log(self, kind: str, message: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning("%s (said once)", message)
