"""Eight threads and one event loop ask at once, for two minutes, through both frameworks.

    OMP_NUM_THREADS=1 python benchmarks/serving/load.py --json > load_cpu.json

Every answer is compared with the one that was given alone before. A heartbeat in the event loop
says how late the loop was, and the callbacks of the loop are timed: what a callback *computes* is
the doing of whoever wrote it, and no callback is longer than ours may be. What it merely *waits*
(for the GIL, or a processor that others hold) is not; the same heartbeat beside plain transformers
in as many threads, without a line of ours, shows how much of that there is anyway. Where a callback
takes longer than allowed, the stack of the loop is looked at while it does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from types import FrameType
from typing import Any

import numpy as np
import torch
from langchain_core.messages import HumanMessage
from llama_index.core.llms import ChatMessage

from gist_rag import GistEngine
from gist_rag.errors import GistsRequired
from gist_rag.evaluate.environment import environment
from gist_rag.models import DEFAULT_RAG_MODEL
from gist_rag.prompt import rag_messages
from gist_rag.sample import sample_passages, sample_questions
from langchain_gist_rag import ChatGist
from llama_index.llms.gist_rag import GistLLM

THREADS, TASKS = 8, 3
PASSAGES, TOGETHER, QUESTIONS = 8, 2, 4
MODES = ("auto", "off")
ALLOWED_MS = 50.0
BEAT_S, LOOK_S = 0.01, 0.005
GRACE_S = 300.0
PACKAGES = ("langchain-core", "llama-index-core", "numpy")


class Loop:
    """Watches the running event loop: how late it is, and what its callbacks cost."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self.cpu: list[float] = []
        self.computed: list[float] = []
        self.took: list[float] = []
        self.stood_in: Counter[str] = Counter()
        self._since: float | None = None
        self._thread = threading.get_ident()
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Time every callback of the loop inside the ``with``."""
        run, looking = asyncio.events.Handle._run, threading.Thread(target=self._look, daemon=True)
        heart = asyncio.ensure_future(self._beat())
        asyncio.events.Handle._run = lambda handle: self._timed(run, handle)  # type: ignore
        looking.start()
        try:
            yield
        finally:
            asyncio.events.Handle._run = run  # type: ignore[method-assign]
            heart.cancel()
            self._over.set()
            looking.join()

    def report(self) -> dict[str, Any]:
        """``cores_while_late`` near 1: this process computed; near 0: it was not let to."""
        beats = zip(self.late, self.cpu, strict=True)
        over = [(late, cpu) for late, cpu in beats if late * 1e3 > ALLOWED_MS]
        return {
            "beats": len(self.late),
            "late_ms": _spread(self.late),
            "late_over_allowed": len(over),
            "cores_while_late": round(sum(c for _, c in over) / sum(w for w, _ in over), 2)
            if over
            else None,
            "callbacks": len(self.took),
            "callback_ms": _spread(self.took),
            "callback_computed_ms": _spread(self.computed),
            "stood_in": dict(self.stood_in.most_common(8)),
        }

    async def _beat(self) -> None:
        while True:
            due, cpu = time.perf_counter() + BEAT_S, time.process_time()
            await asyncio.sleep(BEAT_S)
            self.late.append(time.perf_counter() - due)
            self.cpu.append(time.process_time() - cpu)

    def _timed(self, run: Callable[[Any], None], handle: Any) -> None:
        if threading.get_ident() != self._thread:
            return run(handle)
        computed, took = time.thread_time(), time.perf_counter()
        self._since = took
        run(handle)
        self._since = None
        self.computed.append(time.thread_time() - computed)
        self.took.append(time.perf_counter() - took)

    def _look(self) -> None:
        """Where callbacks stand that take too long, each seen once."""
        seen = None
        while not self._over.wait(LOOK_S):
            since = self._since
            if since is None or since == seen:
                continue
            if (time.perf_counter() - since) * 1e3 > ALLOWED_MS:
                seen = since
                self.stood_in[_place(sys._current_frames().get(self._thread))] += 1


def _place(frame: FrameType | None) -> str:
    """The innermost line of ours in a stack, or its innermost line."""
    lines = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "?")
        lines.append((module, f"{module}.{frame.f_code.co_name}"))
        frame = frame.f_back
    ours = [line for module, line in lines if "gist_rag" in module]
    return (ours or [line for _, line in lines] or ["?"])[0]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in milliseconds."""
    if not seconds:
        return {}
    milliseconds = np.asarray(seconds) * 1e3
    at = {"median": 50, "p99": 99, "max": 100}
    return {name: round(float(np.percentile(milliseconds, p)), 3) for name, p in at.items()}


class Load:
    """The questions, their right answers, and how often each way to ask them was taken."""

    def __init__(self, engine: GistEngine, max_tokens: int) -> None:
        self.chat = ChatGist(engine=engine, max_tokens=max_tokens)
        self.llm = GistLLM(engine=engine, max_new_tokens=max_tokens)
        passages = sample_passages()[:PASSAGES]
        engine.precompute(passages)
        self.asked: list[str] = []
        for i, question in enumerate(sample_questions()[:QUESTIONS]):
            texts = [passages[(i * TOGETHER + j) % PASSAGES].text for j in range(TOGETHER)]
            self.asked.append(rag_messages(question.text, texts)[0]["content"])
        self.right = {
            (text, mode): str(self.chat.invoke(text, gist_mode=mode).content)
            for text in self.asked
            for mode in MODES
        }
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._noting = threading.Lock()

    def work(self, worker: int, until: float) -> None:
        """What one thread does."""
        for step in count(worker):
            if time.monotonic() > until:
                return
            text, mode = self.asked[step % QUESTIONS], MODES[step // QUESTIONS % 2]
            if step % 9 == 0:
                try:
                    self.chat.invoke("Hello", gist_mode="require")
                    self.note("refused", "an answer", "GistsRequired")
                except GistsRequired:
                    self.note("refused", "", "")
            elif step % 4 == 0:
                said = "".join(str(c.content) for c in self.chat.stream(text, gist_mode=mode))
                self.note("stream", said, self.right[text, mode])
            elif step % 2:
                said = str(self.llm.chat([ChatMessage(text)], gist_mode=mode).message.content)
                self.note("llama_index chat", said, self.right[text, mode])
            else:
                said = str(self.chat.invoke([HumanMessage(text)], gist_mode=mode).content)
                self.note("invoke", said, self.right[text, mode])

    async def wait(self, worker: int, until: float) -> None:
        """What one task of the loop does."""
        for step in count(worker):
            if time.monotonic() > until:
                return
            text, right = (
                self.asked[step % QUESTIONS],
                self.right[self.asked[step % QUESTIONS], "auto"],
            )
            if step % 5 == 0:
                stream = self.chat.astream(text)
                await anext(stream)
                await stream.aclose()
                self.note("astream, left", "", "")
            elif step % 5 == 1:
                try:
                    await asyncio.wait_for(self.chat.ainvoke(text), 0.05)
                except TimeoutError:
                    self.note("ainvoke, cancelled", "", "")
            elif step % 5 == 2:
                pieces = [chunk async for chunk in self.chat.astream(text)]
                self.note("astream", "".join(str(p.content) for p in pieces), right)
            elif step % 5 == 3:
                said = await self.llm.achat([ChatMessage(text)])
                self.note("llama_index achat", str(said.message.content), right)
            else:
                self.note("ainvoke", str((await self.chat.ainvoke(text)).content), right)

    def note(self, name: str, said: str, right: str) -> None:
        with self._noting:
            self.counts[name] += 1
            if said != right:
                self.wrong.append(f"{name}: {said!r} instead of {right!r}")


async def under_load(load: Load, seconds: float) -> dict[str, Any]:
    """Threads and tasks ask at once; the loop is watched meanwhile."""
    loop, until = Loop(), time.monotonic() + seconds
    with ThreadPoolExecutor(THREADS) as pool, loop.watched():
        running = asyncio.get_running_loop()
        threads = [running.run_in_executor(pool, load.work, i, until) for i in range(THREADS)]
        tasks = [asyncio.ensure_future(load.wait(i, until)) for i in range(TASKS)]
        _, hanging = await asyncio.wait([*threads, *tasks], timeout=seconds + GRACE_S)
        if hanging:
            sys.exit(f"{len(hanging)} of {THREADS + TASKS} did not come to an end")
        for ended in (*threads, *tasks):
            ended.result()
    return {
        "seconds": seconds,
        "threads": THREADS,
        "tasks": TASKS,
        "answers": dict(sorted(load.counts.items())),
        "wrong": len(load.wrong),
        "examples": load.wrong[:3],
        "loop": loop.report(),
    }


async def beside_transformers(load: Load, seconds: float) -> dict[str, Any]:
    """The same loop with nothing to do, beside plain transformers in as many threads."""
    backbone = load.chat.engine.backbone
    encoded = [backbone.tokenize(text)[None] for text in load.asked]
    loop, until = Loop(), time.monotonic() + seconds

    def generate(worker: int) -> None:
        for step in count(worker):
            if time.monotonic() > until:
                return
            ids = encoded[step % QUESTIONS]
            with torch.no_grad():
                backbone.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
                )

    with ThreadPoolExecutor(THREADS) as pool, loop.watched():
        running = asyncio.get_running_loop()
        await asyncio.gather(*(running.run_in_executor(pool, generate, i) for i in range(THREADS)))
    return {"seconds": seconds, "threads": THREADS, "loop": loop.report()}


async def beside_nothing(seconds: float) -> dict[str, Any]:
    """The same loop in a process that does nothing else: what the machine itself adds."""
    loop = Loop()
    with loop.watched():
        await asyncio.sleep(seconds)
    return {"seconds": seconds, "loop": loop.report()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=DEFAULT_RAG_MODEL)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the load lasts")
    parser.add_argument("--max-tokens", type=int, default=8, help="longest answer")
    parser.add_argument("--json", action="store_true", help="print the result file")
    given = parser.parse_args()
    with GistEngine.from_pretrained(given.model, settings={"preset": "fast"}) as engine:
        load = Load(engine, given.max_tokens)
        beside = max(given.seconds / 4, 1.0)
        results = {
            "nothing": asyncio.run(beside_nothing(beside)),
            "transformers": asyncio.run(beside_transformers(load, beside)),
            "gist_rag": asyncio.run(under_load(load, given.seconds)),
        }
    ours = results["gist_rag"]
    if given.json:
        meta = {
            **environment(),
            **{name: version(name) for name in PACKAGES},
            "model": given.model,
            "load_average": round(os.getloadavg()[0], 1),
            "allowed_ms": ALLOWED_MS,
        }
        json.dump({"meta": meta, "results": results}, sys.stdout, indent=2)
        print()
    else:
        print(f"{sum(ours['answers'].values())} answers, {ours['wrong']} wrong")
        for name, result in results.items():
            loop = result["loop"]
            print(
                f"beside {name}: {loop['late_ms']['max']:.0f} ms late at most; longest callback "
                f"{loop['callback_computed_ms']['max']:.1f} ms of computing"
            )
    if ours["wrong"] or ours["loop"]["callback_computed_ms"]["max"] > ALLOWED_MS:
        sys.exit("wrong answers, or a callback that computes for too long")


if __name__ == "__main__":
    main()
