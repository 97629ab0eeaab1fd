"""Scores of answers, and how much of the context's benefit a method keeps."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


@lru_cache(
    maxsize=2**16
)  # wrong answers are looked for among all answers of a file, by each question
def normal(text: str) -> str:
    """Lower case, no punctuation, no articles: the SQuAD normalisation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
    return float(any(normal(answer) == normal(g) for g in gold))


def contains(answer: str, gold: Sequence[str]) -> float:
    """1.0 if a gold answer stands in the answer as whole words."""
    padded = f" {normal(answer)} "
    return float(any(normal(g) and f" {normal(g)} " in padded for g in gold))


def f1(answer: str, gold: Sequence[str]) -> float:
    """Best token F1 over the gold answers."""
    return max((_f1(normal(answer).split(), normal(g).split()) for g in gold), default=0.0)


def _f1(answer: list[str], gold: list[str]) -> float:
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold)) if common else 0.0


def kept(arm: Scores, closed: Scores, full: Scores) -> float:
    """``M_norm``: share of the context's benefit that an arm keeps, from means over questions.

    0 is closed book, 1 is the full text; works for scores that rise and for losses that fall.
    NaN where the context brings nothing.
    """
    benefit = full.mean() - closed.mean()
    return float((arm.mean() - closed.mean()) / benefit) if benefit else float("nan")


def bootstrap(
    arm: Scores, closed: Scores, full: Scores, *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of ``kept`` from paired resampling of the questions."""
    index = np.random.default_rng(seed).integers(0, len(arm), (samples, len(arm)))
    base = closed[index].mean(1)
    benefit = full[index].mean(1) - base
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (arm[index].mean(1) - base) / benefit
    low, high = (
        np.nanpercentile(values[np.isfinite(values)], [2.5, 97.5])
        if np.isfinite(values).any()
        else (np.nan, np.nan)
    )
    return float(low), float(high)
