"""From threads to asyncio: the engine computes in a worker thread while the event loop goes on.

Both functions hand the work an event to watch, which is set as soon as nobody waits for the result
any more (a cancelled task, an ``async for`` that is left early). Errors come out where the caller
awaits.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")


async def run_in_thread(call: Callable[[threading.Event], T]) -> T:
    """What ``call`` returns, computed off the loop.

    Args:
        call: takes the event that asks it to stop.
    """
    cancel = threading.Event()
    try:
        return await asyncio.to_thread(call, cancel)
    finally:
        cancel.set()


async def iterate_in_thread(
    make_iterator: Callable[[threading.Event], Iterator[T]],
) -> AsyncGenerator[T, None]:
    """The items of an iterator that is made, advanced and closed in one thread of its own.

    The next item is computed when it is asked for, so a slow consumer costs no memory and one that
    leaves costs at most one more item. The iterator is closed if it has a ``close``.

    Args:
        make_iterator: takes the event that asks the iterator to stop.
    """
    cancel, done = threading.Event(), object()
    worker = ThreadPoolExecutor(1, thread_name_prefix="gist-rag")
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    iterator: Iterator[T] | None = None

    def advance() -> object:
        nonlocal iterator
        if iterator is None:
            iterator = make_iterator(cancel)
        return next(iterator, done)

    def close() -> None:
        if (end := getattr(iterator, "close", None)) is not None:
            end()

    try:
        while (item := await loop.run_in_executor(worker, context.run, advance)) is not done:
            yield cast(T, item)
    finally:
        cancel.set()
        worker.submit(context.run, close)
        worker.shutdown(wait=False)
