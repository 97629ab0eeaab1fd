"""ChatGist under load: threads and an event loop at once (``GIST_RAG_LOAD_SECONDS``, default 6)."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from gist_rag.errors import GistsRequired
from langchain_gist_rag import ChatGist

SECONDS = float(os.environ.get("GIST_RAG_LOAD_SECONDS", "6"))
THREADS = 8
MAX_GAP = 0.05
"""Longest that our code may hold up the event loop, in seconds."""


@pytest.mark.slow
async def test_threads_and_a_loop_get_right_answers(engine: Any, known: Any) -> None:
    llm = ChatGist(engine=engine, max_tokens=12)
    asked = [f"{p.text}\n\n{q}" for p in known for q in ("What is this?", "When is it so?")]
    modes = ["auto", "off"]
    right = {
        (text, mode): llm.invoke(text, gist_mode=mode).content for text in asked for mode in modes
    }
    until, counts = time.monotonic() + SECONDS, dict.fromkeys(("threads", "loop", "left"), 0)
    counting = threading.Lock()

    def count(name: str) -> None:
        with counting:
            counts[name] += 1

    def work(worker: int) -> None:
        for step in range(worker, 10**6):
            if time.monotonic() > until:
                return
            text, mode = asked[step % len(asked)], modes[step % 2]
            if step % 7 == 0:
                answer = "".join(c.text for c in llm.stream(text, gist_mode=mode))
            elif step % 11 == 0:
                with pytest.raises(GistsRequired):
                    llm.invoke("Hello", gist_mode="require")
                continue
            else:
                answer = str(llm.invoke([HumanMessage(text)], gist_mode=mode).content)
            assert answer == right[text, mode]
            count("threads")

    async def wait(worker: int) -> None:
        for step in range(worker, 10**6):
            if time.monotonic() > until:
                return
            text = asked[step % len(asked)]
            if step % 5 == 0:  # leaves in the middle
                stream = llm.astream(text, max_tokens=500)
                await anext(stream)
                await stream.aclose()
                count("left")
            else:
                assert (await llm.ainvoke(text)).content == right[text, "auto"]
                count("loop")

    with ThreadPoolExecutor(THREADS) as pool:
        futures: list[Future[None]] = [pool.submit(work, i) for i in range(THREADS)]
        await asyncio.wait_for(asyncio.gather(*(wait(i) for i in range(3))), SECONDS + 60)
        for future in futures:
            await asyncio.wait_for(asyncio.wrap_future(future), 60)
    assert min(counts.values()) > 0


@pytest.mark.slow
async def test_our_code_never_holds_up_the_loop(
    engine: Any, known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time that the loop's own thread spends in callbacks, which load elsewhere does not lengthen
    (as wall time between ticks would)."""
    llm = ChatGist(engine=engine, max_tokens=24)
    longest = 0.0
    run = asyncio.events.Handle._run

    def timed(handle: Any) -> None:
        nonlocal longest
        before = time.thread_time()
        run(handle)
        longest = max(longest, time.thread_time() - before)

    await llm.ainvoke(known[0].text + "\n\nWhat is this?")
    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    texts = [f"{p.text}\n\nWhat is this?" for p in known]
    await asyncio.gather(*(llm.ainvoke(text) for text in texts))
    [chunk async for chunk in llm.astream(texts[0])]
    assert longest < MAX_GAP
