"""Micro-batching: questions that several threads ask at about the same time are answered together.

There is no thread of its own. The first to ask waits a moment for others; then whoever waits for an
answer of the batch does its next step, so that nobody works on once its own answer is there, and
nothing is left to stop or to close.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Reply = TypeVar("Reply")

Run = Callable[[Sequence[Question]], Iterator[list[tuple[int, Reply]]]]
"""Answers questions step by step; each step gives the answers that are ready, by their place."""


class Batcher(Generic[Question, Reply]):
    """Turns single questions into batches.

    Args:
        run: answers several questions at once.
        window_ms: how long the first to ask waits for others; 0 for not at all.
        max_size: most questions in one batch.
    """

    def __init__(self, run: Run[Question, Reply], *, window_ms: float, max_size: int) -> None:
        self._run = run
        self._window = window_ms / 1e3
        self._max_size = max_size
        self._lock = threading.Lock()
        self._forming: _Batch[Question, Reply] | None = None

    def ask(self, question: Question) -> Reply:
        """The answer to a question. Its errors are its own: no other question of the batch fails
        with it."""
        if not self._window:
            return _Batch[Question, Reply](question).answer(0, self._run)
        with self._lock:
            batch, place = self._forming, 0
            if batch is None:
                batch = self._forming = _Batch(question)
            else:
                place = batch.add(question)
            if len(batch.questions) == self._max_size:
                self._forming = None
                batch.ready.set()
        if place == 0:
            try:
                batch.ready.wait(self._window)
            finally:
                with self._lock:
                    if self._forming is batch:
                        self._forming = None
                batch.ready.set()
        batch.ready.wait()
        return batch.answer(place, self._run)


class _Batch(Generic[Question, Reply]):
    """Questions that are answered together, by the threads that asked them."""

    def __init__(self, first: Question) -> None:
        self.questions = [first]
        self.ready = threading.Event()
        self._turn = threading.Lock()
        self._steps: Iterator[list[tuple[int, Reply]]] | None = None
        self._replies: dict[int, Reply] = {}
        self._failed = False

    def add(self, question: Question) -> int:
        self.questions.append(question)
        return len(self.questions) - 1

    def answer(self, place: int, run: Run[Question, Reply]) -> Reply:
        """Take part until the answer of one place is there."""
        while place not in self._replies and not self._failed:
            with self._turn:
                if place not in self._replies and not self._failed:
                    self._step(run)
        if place in self._replies:
            return self._replies[place]
        return _Batch[Question, Reply](self.questions[place]).answer(0, run)

    def _step(self, run: Run[Question, Reply]) -> None:
        """After an error in company each goes on alone, so that it meets only whom it concerns."""
        try:
            if self._steps is None:
                self._steps = run(self.questions)
            self._replies.update(next(self._steps))
        except Exception:
            if len(self.questions) == 1:
                raise
            self._failed = True
