"""``bench precompute``: seconds per passage of each preset, and of trained compressors, beside one
plain prefill of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from gist_rag.compressors import DEFAULT_COMPRESSOR, make_compressor
from gist_rag.compressors.base import ratio_settings
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
    ratio: float | Sequence[float] = 8.0,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Medians over passages of the shipped sample, one at a time, presets and prefill interleaved.

    Args:
        passages: how many to time, after one that warms up.
        compressors: names or folders that are timed beside the presets.
        ratio: of the gists; if there are several, ``balanced`` is timed with all of them, too, and
            the others with the finest.

    Raises:
        BadInput: more passages than the sample has.
    """
    sample = sample_passages()
    if not 1 <= passages < len(sample):
        raise BadInput(f"passages is {passages}; it must be 1 to {len(sample) - 1}")
    settings = ratio_settings(ratio)
    finest = settings["ratio"]
    backbone, _ = load_backbone(model, dtype=dtype)
    arms = {"prefill": make_compressor("full", backbone)}
    for preset in PRESETS:
        arms[preset] = make_compressor(
            DEFAULT_COMPRESSOR, backbone, {"ratio": finest, "preset": preset}
        )
    if "coarser" in settings:
        arms["balanced, all ratios"] = make_compressor(DEFAULT_COMPRESSOR, backbone, settings)
    for name in compressors:
        arms[name] = make_compressor(name, backbone, {"ratio": finest})
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
            **settings,
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
