"""Choosing tokens: each knob does what its name says."""

from __future__ import annotations

from collections import Counter

import torch

from gist_rag.sampling import Chooser
from gist_rag.types import Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
CPU = torch.device("cpu")


def draw(times: int = 2000, **settings: float) -> Counter[int]:
    choose = Chooser(Sampling(seed=0, **settings), CPU)  # type: ignore[arg-type]
    return Counter(choose(LOGITS) for _ in range(times))


def test_zero_temperature_takes_the_likeliest() -> None:
    assert draw(10) == {0: 10}


def test_temperature_one_follows_the_distribution() -> None:
    counts = draw(temperature=1.0)
    assert all(abs(counts[i] / 2000 - p) < 0.04 for i, p in enumerate((0.5, 0.3, 0.15, 0.05)))


def test_low_temperature_sharpens() -> None:
    assert draw(temperature=0.3)[0] > draw(temperature=1.0)[0]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draw(temperature=1.0, top_k=2)) == {0, 1}


def test_top_p_keeps_the_smallest_set_with_that_mass() -> None:
    assert set(draw(temperature=1.0, top_p=0.75)) == {0, 1}


def test_top_p_always_keeps_one() -> None:
    assert set(draw(temperature=1.0, top_p=0.01)) == {0}
