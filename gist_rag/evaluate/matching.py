"""``bench matching``: milliseconds to find the known passages of a prompt among very many."""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gist_rag.errors import BadInput
from gist_rag.evaluate.environment import environment
from gist_rag.matching import PassageMatcher
from gist_rag.store import GistStore, pack
from gist_rag.types import GistState, Passage
from gist_rag.windows import MemoryIndex

SPACE = "bench"
BATCH = 10_000
IN_PROMPT = 5
IN_MEMORY = 20_000
SENTENCES = 29
"""Of six words each, after three words that hardly another passage begins with: in all 1,170
characters, so that five passages make a prompt of 6,000."""


def bench_matching(
    passages: int = 1_000_000,
    *,
    prompts: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Times of ``PassageMatcher.find``, in a process of its own that opens the store afresh.

    Passages are made of random words and their gists of one slot: matching looks at neither model
    nor gist. Each prompt is new, five passages or five times as much unknown text.

    Args:
        passages: how many are known.
        prompts: timed prompts of each kind. CPU times stand beside the others, which on a busy
            machine say more of the machine.
        progress: called with passages written and passages in all.

    Raises:
        BadInput: too few passages or prompts to measure anything.
    """
    if passages < IN_PROMPT or prompts < 1:
        raise BadInput(f"passages must be {IN_PROMPT} or more and prompts 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        _fill(folder, passages, progress)
        seconds = time.perf_counter() - started
        manifest_bytes = (Path(folder) / "manifest.sqlite").stat().st_size
        # A process of its own: what filling took does not count as memory of searching.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory, rows = pool.submit(_search, folder, passages, prompts).result()
    return {
        "meta": {
            "passages": passages,
            "prompts": prompts,
            "passages_per_prompt": IN_PROMPT,
            "store_us_per_passage": round(seconds / passages * 1e6, 1),
            "manifest_bytes_per_passage": round(manifest_bytes / passages),
            **memory,
            **environment(),
        },
        "results": rows,
    }


def _text(number: int) -> str:
    """Passage ``number``; numbers that are not in the store give text that nobody knows."""
    words, sentences = _pool()
    rng = random.Random(number)
    return " ".join([*rng.choices(words, k=3), *rng.choices(sentences, k=SENTENCES)])


@cache
def _pool() -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    return words, [" ".join(rng.choices(words, k=6)) for _ in range(20_000)]


def _fill(folder: str, passages: int, progress: Callable[[int, int], None] | None) -> None:
    slot = torch.zeros(1, 1, 1, 8)
    gist = pack(GistState.uniform(slot, slot, torch.zeros(1), span=1, num_tokens=1), "bf16")
    with GistStore.open(folder) as store:
        store.add_space(SPACE, {})
        for first in range(0, passages, BATCH):
            numbers = range(first, min(first + BATCH, passages))
            store.put_many(SPACE, [(Passage(_text(number)), gist) for number in numbers])
            if progress:
                progress(numbers.stop, passages)


def _search(
    folder: str, passages: int, prompts: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Memory that the first search takes, and times of the others."""
    rng = random.Random(1)
    _pool()

    def known(below: int) -> list[str]:
        return [_text(number) for number in rng.sample(range(below), IN_PROMPT)]

    def unknown() -> list[str]:
        return [_text(passages + rng.randrange(10**9)) for _ in range(IN_PROMPT)]

    with GistStore.open(folder, read_only=True) as store:
        matcher = PassageMatcher(store.index(SPACE))
        before, started = _resident_bytes(), time.perf_counter()
        matcher.find("\n\n".join(known(passages)))
        memory: dict[str, float] = {
            "first_search_ms": round((time.perf_counter() - started) * 1e3, 1),
            "resident_mb": round((_resident_bytes() - before) / 1e6, 1),
        }
        rows = [
            _row("store", "known", matcher, [known(passages) for _ in range(prompts)], str),
            _row("store", "known, as JSON", matcher, [known(passages) for _ in range(prompts)]),
            _row("store", "unknown", matcher, [unknown() for _ in range(prompts)], str),
        ]
        memory["resident_mb_after"] = round((_resident_bytes() - before) / 1e6, 1)
    index, few = MemoryIndex(), min(passages, IN_MEMORY)
    for number in range(few):
        index.add(_text(number))
    matcher = PassageMatcher(index)
    rows.append(
        _row(f"memory, {few} passages", "known", matcher, [known(few) for _ in range(prompts)], str)
    )
    return memory, rows


def _row(
    home: str,
    kind: str,
    matcher: PassageMatcher,
    prompts: Sequence[Sequence[str]],
    write: Callable[[str], str] = lambda text: json.dumps(f'"\n{text}'),
) -> dict[str, Any]:
    times, cpu_times, characters, found = [], [], 0, 0
    for texts in prompts:
        prompt = "\n\n".join(map(write, texts))
        started, cpu_started = time.perf_counter(), time.thread_time()
        matches = matcher.find(prompt)
        times.append((time.perf_counter() - started) * 1e3)
        cpu_times.append((time.thread_time() - cpu_started) * 1e3)
        characters += len(prompt)
        found += len(matches)
    return {
        "home": home,
        "prompts": kind,
        "characters": round(characters / len(times)),
        "found": found / len(times),
        "median_ms": round(statistics.median(times), 3),
        "p95_ms": round(sorted(times)[int(len(times) * 0.95)], 3),
        "median_cpu_ms": round(statistics.median(cpu_times), 3),
    }


def _resident_bytes() -> int:
    """Memory of this process; 0 where Linux is not there to tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0
