"""Scores say what they are named for."""

from __future__ import annotations

import numpy as np
import pytest

from gist_rag.evaluate import metrics


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "inside", "overlap"),
    [
        ("The WAL file.", ["wal file"], 1, 1, 1.0),
        ("It is the WAL file", ["wal file"], 0, 1, 2 / 3),
        ("1000 pages", ["100 pages"], 0, 0, 0.5),
        ("10000", ["1000"], 0, 0, 0.0),
        ("", ["x"], 0, 0, 0.0),
        ("two", ["one", "two"], 1, 1, 1.0),
    ],
)
def test_answers_are_scored(
    answer: str, gold: list[str], exact: float, inside: float, overlap: float
) -> None:
    assert metrics.exact_match(answer, gold) == exact
    assert metrics.contains(answer, gold) == inside
    assert metrics.f1(answer, gold) == pytest.approx(overlap)


def test_kept_is_0_for_closed_and_1_for_full() -> None:
    closed, full = np.array([5.0, 6.0]), np.array([2.0, 3.0])
    assert metrics.kept(closed, closed, full) == 0
    assert metrics.kept(full, closed, full) == 1
    assert metrics.kept((closed + full) / 2, closed, full) == pytest.approx(0.5)


def test_kept_is_nan_where_the_text_brings_nothing() -> None:
    same = np.array([1.0, 2.0])
    assert np.isnan(metrics.kept(same, same, same))


def test_the_interval_holds_the_value_and_narrows_with_more_questions() -> None:
    generator = np.random.default_rng(0)

    def interval(n: int) -> tuple[float, float, float]:
        closed = generator.normal(5, 1, n)
        full = closed - generator.normal(2, 0.5, n)
        arm = full + generator.normal(0.2, 0.5, n)
        return metrics.kept(arm, closed, full), *metrics.bootstrap(arm, closed, full)

    few, many = interval(20), interval(500)
    assert all(low <= value <= high for value, low, high in (few, many))
    assert many[2] - many[1] < few[2] - few[1]
