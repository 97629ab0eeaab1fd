"""The bridge from worker threads to asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Iterator

import pytest

from gist_rag.aio import iterate_in_thread, run_in_thread


def count_to(number: int, cancel: threading.Event, seen: list[int] | None = None) -> Iterator[int]:
    """Slow enough for the event loop to do something in between."""
    for i in range(number):
        if cancel.is_set():
            return
        time.sleep(0.002)
        if seen is not None:
            seen.append(i)
        yield i


async def ticks_during(waiting: asyncio.Task[object]) -> int:
    """How often the event loop came round before a task was done."""
    ticks = 0
    while not waiting.done():
        await asyncio.sleep(0.001)
        ticks += 1
    return ticks


async def test_items_come_in_order() -> None:
    assert [i async for i in iterate_in_thread(lambda c: count_to(5, c))] == [0, 1, 2, 3, 4]


async def test_iterator_lives_in_one_thread_that_is_not_the_loops() -> None:
    def threads(_cancel: threading.Event) -> Iterator[int]:
        yield threading.get_ident()
        yield threading.get_ident()

    first, second = [i async for i in iterate_in_thread(threads)]
    assert first == second != threading.get_ident()


async def test_loop_goes_on_while_a_call_computes() -> None:
    task = asyncio.create_task(run_in_thread(lambda _cancel: time.sleep(0.1)))
    assert await ticks_during(task) > 10


async def test_loop_goes_on_while_an_item_is_computed() -> None:
    async def collect() -> list[int]:
        return [i async for i in iterate_in_thread(lambda c: count_to(50, c))]

    assert await ticks_during(asyncio.create_task(collect())) > 10


async def test_leaving_early_cancels_and_closes() -> None:
    cancelled: list[threading.Event] = []
    closed = threading.Event()
    seen: list[int] = []

    def items(cancel: threading.Event) -> Iterator[int]:
        cancelled.append(cancel)
        try:
            yield from count_to(1000, cancel, seen)
        finally:
            closed.set()

    stream = iterate_in_thread(items)
    async for i in stream:
        if i == 2:
            break
    await stream.aclose()
    assert closed.wait(1)
    assert cancelled[0].is_set()
    assert seen == [0, 1, 2]


async def test_cancelled_task_cancels_the_call() -> None:
    stopped = threading.Event()

    def call(cancel: threading.Event) -> None:
        assert cancel.wait(5)
        stopped.set()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run_in_thread(call), 0.05)
    assert await asyncio.to_thread(stopped.wait, 1)


async def test_error_of_an_item_is_raised_to_the_consumer() -> None:
    def broken(_cancel: threading.Event) -> Iterator[int]:
        yield 1
        raise RuntimeError("out of items")

    stream = iterate_in_thread(broken)
    assert await anext(stream) == 1
    with pytest.raises(RuntimeError, match="out of items"):
        await anext(stream)


async def test_error_of_making_the_iterator_is_raised_to_the_consumer() -> None:
    def refuse(_cancel: threading.Event) -> Iterator[int]:
        raise ValueError("no iterator")

    with pytest.raises(ValueError, match="no iterator"):
        await anext(iterate_in_thread(refuse))


async def test_context_variables_are_those_of_the_consumer() -> None:
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")
    tenant.set("acme")
    stream = iterate_in_thread(lambda _cancel: iter([tenant.get()]))
    assert [t async for t in stream] == ["acme"]
