"""``bench ttft``: time to the first token from text, and from gists read together, together with
weights, and apart, in one interleaved run."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gist_rag.budget import make_budget
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.evaluate.environment import environment
from gist_rag.focus import Focus
from gist_rag.likeness import named_judge
from gist_rag.models import DEFAULT_EMBEDDER, DEFAULT_MODEL
from gist_rag.prompt import rag_messages
from gist_rag.sample import sample_passages, sample_questions
from gist_rag.store import GistStore
from gist_rag.types import Answer, Sampling

ARMS = ("text", "gist", "weighed", "apart", "miss")


def bench_ttft(
    passages: Sequence[int] = (1, 2, 5, 10),
    *,
    model: str = DEFAULT_MODEL,
    ratio: float | Sequence[float] = 8.0,
    budget: str | None = None,
    codec: str = "bf16",
    dtype: str | None = None,
    repeats: int = 5,
    apart: int = 3,
    judge: str = DEFAULT_EMBEDDER,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Medians over interleaved repeats, each with another question and other passages.

    Gists lie on disk and are loaded for every prompt (the store's memory tier is off); the text
    before the passages, the same in every prompt, is cached for gists as it is in use. ``miss`` is
    a prompt whose passages have no gist: matching runs, everything is read as text.

    Args:
        passages: passages per prompt, each a row of the result.
        repeats: timed prompts per row and arm, after one that warms up.
        apart: passages that answer where they are read apart, see ``focus.Focus``.
        judge: who weighs passages, see ``engine.GistEngine``.
        ratio: of the gists; of several, all arms read the finest but for ``weighed``.
        budget: what weighed passages may take together, see ``budget``.

    Raises:
        BadInput: more passages than the sample has.
    """
    sample, questions = sample_passages(), sample_questions()
    if not passages or max(passages) > len(sample) or min(passages) < 1 or repeats < 1:
        raise BadInput(f"passages must be 1 to {len(sample)} and repeats 1 or more")
    with tempfile.TemporaryDirectory() as folder, GistStore.open(folder, memory_bytes=0) as store:
        engine = GistEngine.from_pretrained(
            model,
            store,
            ratio=ratio,
            codec=codec,
            dtype=dtype,
        )
        like = partial(GistEngine, engine.backbone, engine.compressor, reader=engine.reader)
        empty = like()
        weighing = like(store, codec=codec, judge=named_judge(judge), budget=make_budget(budget))
        parted = like(store, codec=codec, focus=Focus(apart, apart=True))
        if progress:
            progress(f"compressing {max(passages)} passages")
        made = engine.precompute(sample[: max(passages)])
        weighing.precompute(sample[: max(passages)])  # vectors of passages
        rows = []
        for count in passages:
            if progress:
                progress(f"timing {count} passages")
            runs: dict[str, list[Answer]] = {name: [] for name in ARMS}
            for repeat in range(-1, repeats):
                texts = [sample[(repeat + i) % max(passages)].text for i in range(count)]
                prompt = rag_messages(questions[repeat % len(questions)].text, texts)
                first = Sampling(max_tokens=1)
                answers = {
                    "text": engine.generate(prompt, first, gist_mode="off"),
                    "gist": engine.generate(prompt, first, gist_mode="require"),
                    "weighed": weighing.generate(prompt, first, gist_mode="require"),
                    "apart": parted.generate(prompt, first, gist_mode="require"),
                    "miss": empty.generate(prompt, first),
                }
                if repeat >= 0:
                    for name, answer in answers.items():
                        runs[name].append(answer)
            rows.append(_row(count, runs))
        empty.close()
    return {
        "meta": {
            "model": model,
            "ratio": engine.compressor.config.ratio,
            "coarser": list(getattr(engine.compressor.config, "coarser", ())),
            "budget": budget,
            "codec": codec,
            "dtype": str(engine.backbone.dtype),
            "repeats": repeats,
            "apart": apart,
            "judge": judge,
            "precompute_seconds_per_passage": round(made.seconds / max(made.written, 1), 3),
            **environment(),
        },
        "results": rows,
    }


def _row(count: int, runs: dict[str, list[Answer]]) -> dict[str, Any]:

    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(a.stats, field) for a in runs[name]))

    text, gist, weighed, apart, miss = (median(name, "first_token_ms") for name in ARMS)
    return {
        "passages": count,
        "source_tokens": round(median("gist", "source_tokens")),
        "ttft_text_ms": round(text, 1),
        "ttft_gist_ms": round(gist, 1),
        "ttft_weighed_ms": round(weighed, 1),
        "ttft_apart_ms": round(apart, 1),
        "ttft_miss_ms": round(miss, 1),
        "speedup": round(text / gist, 2),
        "speedup_weighed": round(text / weighed, 2),
        "speedup_apart": round(text / apart, 2),
        "judge_ms": round(median("weighed", "focus_ms"), 2),
        "match_ms": round(median("gist", "match_ms"), 2),
        "load_ms": round(median("gist", "fetch_ms"), 2),
        "compose_ms": round(median("gist", "compose_ms"), 2),
        "read_ms": round(median("gist", "read_ms"), 2),
        "gist_slots": round(median("gist", "gist_slots")),
        "weighed_slots": round(median("weighed", "gist_slots")),
        "bytes": round(median("gist", "num_bytes")),
    }
