"""Micro-batching: several threads, one pass, and nobody pays for another's mistake."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gist_rag.batching import Batcher
from gist_rag.engine import GistEngine
from gist_rag.errors import GistsRequired
from gist_rag.types import Passage, Sampling


class Squares:
    """Squares numbers, one per step; refuses 13."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        self.batches.append(list(numbers))
        if 13 in numbers:
            raise ValueError("13")
        for place, number in enumerate(numbers):
            time.sleep(0.002)
            yield [(place, number * number)]


def ask_all(batcher: Batcher[int, int], numbers: Sequence[int]) -> list[Any]:
    with ThreadPoolExecutor(len(numbers)) as pool:
        futures = [pool.submit(batcher.ask, number) for number in numbers]
        return [future.exception() or future.result() for future in futures]


def test_questions_asked_together_are_answered_together() -> None:
    run = Squares()
    assert ask_all(Batcher(run, window_ms=200, max_size=6), range(6)) == [n * n for n in range(6)]
    assert len(run.batches) == 1


def test_a_batch_has_a_greatest_size() -> None:
    run = Squares()
    ask_all(Batcher(run, window_ms=50, max_size=2), range(6))
    assert max(map(len, run.batches)) == 2


def test_without_a_window_each_goes_alone() -> None:
    run = Squares()
    ask_all(Batcher(run, window_ms=0, max_size=6), range(4))
    assert sorted(run.batches) == [[0], [1], [2], [3]]


def test_an_error_meets_only_whom_it_concerns() -> None:
    answers = ask_all(Batcher(Squares(), window_ms=100, max_size=6), [2, 13, 3])
    assert (answers[0], answers[2]) == (4, 9)
    assert isinstance(answers[1], ValueError)


def test_nobody_waits_for_the_others_of_a_batch() -> None:
    slow = threading.Event()

    def run(numbers: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        yield [(0, numbers[0])]
        slow.wait(5)
        yield [(1, numbers[1])]

    batcher = Batcher(run, window_ms=100, max_size=2)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(batcher.ask, number) for number in (1, 2)]
        time.sleep(0.3)
        assert sum(future.done() for future in futures) == 1
        slow.set()
        assert {future.result(timeout=2) for future in futures} == {1, 2}


# ---- the engine


@pytest.fixture
def prompts(passages: list[Passage]) -> list[str]:
    return [f"{p.text}\n\nWhat is SQLite?" for p in passages[:6]]


def test_threads_get_the_answers_they_would_get_alone(
    make_engine: Any, passages: list[Passage], prompts: list[str]
) -> None:
    alone = make_engine(settings={"ratio": 4}, batch_window_ms=0)
    alone.precompute(passages[:4])
    together = make_engine(settings={"ratio": 4}, batch_window_ms=100)
    options = [
        (Sampling(max_tokens=4 + 5 * i, temperature=i % 2, seed=i), "off" if i == 2 else "auto")
        for i in range(len(prompts))
    ]
    ask = lambda engine, i: engine.generate(prompts[i], options[i][0], gist_mode=options[i][1])
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: ask(together, i), range(6)))
    for i, answer in enumerate(answers):
        expected = ask(alone, i)
        assert answer.text == expected.text
        assert answer.finish_reason == expected.finish_reason
        assert answer.stats.hits == expected.stats.hits


def test_one_request_can_be_cancelled_in_a_batch(make_engine: Any, prompts: list[str]) -> None:
    engine: GistEngine = make_engine(batch_window_ms=100)
    cancel = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(engine.generate, prompts[0], Sampling(max_tokens=40))
        long = pool.submit(engine.generate, prompts[1], Sampling(max_tokens=2000), cancel=cancel)
        assert short.result(timeout=30).finish_reason == "length"
        cancel.set()
        assert long.result(timeout=30).finish_reason == "cancelled"


def test_a_refused_request_leaves_the_others_alone(make_engine: Any, prompts: list[str]) -> None:
    engine: GistEngine = make_engine(batch_window_ms=100)
    with ThreadPoolExecutor(2) as pool:
        strict = pool.submit(engine.generate, prompts[0], gist_mode="require")
        free = pool.submit(engine.generate, prompts[1], Sampling(max_tokens=4))
        with pytest.raises(GistsRequired):
            strict.result(timeout=30)
        assert free.result(timeout=30).num_tokens == 4
