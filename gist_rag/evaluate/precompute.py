"""``bench precompute``: seconds per passage of each preset, and of trained compressors, beside one
plain prefill of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from gist_rag.compressors import make_compressor
from gist_rag.errors import BadInput
from gist_rag.evaluate.environment import environment
from gist_rag.models import DEFAULT_MODEL
from gist_rag.reader import load_backbone
from gist_rag.sample import sample_passages

PRESETS = ("fast", "balanced", "thorough", "best")


def bench_precompute(
    passages: int = 6,
    *,
    compressors: Sequence[str] = (),
    model: str = DEFAULT_MODEL,
    ratio: float = 8.0,
    coarser: Sequence[float] = (),
    dtype: str | None = None,
) -> dict[str, Any]:
    """Medians over passages of the shipped sample, one at a time, presets and prefill interleaved.

    Args:
        passages: how many to time, after one that warms up.
        compressors: names or folders that are timed beside the presets.
        coarser: further ratios; ``balanced`` is then timed with them, too.

    Raises:
        BadInput: more passages than the sample has.
    """
    sample = sample_passages()
    if not 1 <= passages < len(sample):
        raise BadInput(f"passages is {passages}; it must be 1 to {len(sample) - 1}")
    backbone, _ = load_backbone(model, dtype=dtype)
    arms = {"prefill": make_compressor("full", backbone)}
    for preset in PRESETS:
        settings = {"ratio": ratio, "preset": preset}
        arms[preset] = make_compressor("attention_matching", backbone, settings)
    if coarser:
        settings = {"ratio": ratio, "coarser": coarser}
        arms["balanced, nested"] = make_compressor("attention_matching", backbone, settings)
    for name in compressors:
        arms[name] = make_compressor(name, backbone, {"ratio": ratio})
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens = []
    for number, passage in enumerate(sample[: passages + 1]):
        ids = backbone.tokenize(passage.text)
        for name, compressor in arms.items():
            started = time.perf_counter()
            with torch.no_grad():
                _ = backbone.prefix(ids) if name == "prefill" else compressor.compress([ids])
            if number:
                seconds[name].append(time.perf_counter() - started)
        tokens.append(len(ids))
    prefill = statistics.median(seconds["prefill"])
    return {
        "meta": {
            "model": model,
            "ratio": ratio,
            "coarser": list(coarser),
            "dtype": str(backbone.dtype),
            "passages": passages,
            "median_tokens": statistics.median(tokens[1:]),
            **environment(),
        },
        "results": [
            {
                "preset": name,
                "seconds_per_passage": round(statistics.median(times), 3),
                "prefills": round(statistics.median(times) / prefill, 2),
            }
            for name, times in seconds.items()
        ],
    }
