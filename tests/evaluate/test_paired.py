"""``benchmarks/quality/paired.py``: what it says of hand-made predictions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gist_rag.evaluate import metrics

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
from paired import differences

NLL = {
    "closed": [4.0, 3.0, 5.0, 4.0],
    "full": [1.0, 2.0, 1.0, 2.0],
    "one": [2.0, 2.5, 2.0, 3.0],
    "other": [1.5, 2.0, 1.5, 2.5],
}


def predictions() -> list[dict[str, Any]]:
    return [
        {"arm": arm, "id": str(i), "nll": nll, "contains": float(arm == "other" and i == 0)}
        for arm, column in NLL.items()
        for i, nll in enumerate(column)
    ]


def test_the_difference_is_that_of_the_shares_kept() -> None:
    [row] = differences(predictions(), "one")
    scores = {arm: np.array(column) for arm, column in NLL.items()}
    closed, full = scores["closed"], scores["full"]
    kept = [metrics.kept(scores[arm], closed, full) for arm in ("other", "one")]
    assert row["arm"] == "other"
    assert row["kept"] == pytest.approx(kept[0] - kept[1])
    assert row["contains"] == 0.25


def test_the_interval_is_that_of_the_benefit_where_all_questions_differ_alike() -> None:
    rows = [r | {"nll": r["nll"] - (r["arm"] == "other")} for r in predictions()]
    rows = [r for r in rows if r["arm"] != "one"]
    same = [r | {"arm": "same", "nll": r["nll"] + 1} for r in rows if r["arm"] == "other"]
    [row] = differences([*rows, *same], "same")
    benefit = np.mean(NLL["closed"]) - np.mean(NLL["full"])
    assert row["kept"] == pytest.approx(1 / benefit)
    assert 0 < float(row["kept_low"]) < float(row["kept"]) < float(row["kept_high"])


def test_only_questions_that_all_arms_have_answered_count() -> None:
    rows = [r for r in predictions() if (r["arm"], r["id"]) != ("other", "0")]
    [row] = differences(rows, "one")
    assert row["n"] == 3
    assert row["contains"] == 0


def test_an_arm_that_is_not_there_is_named() -> None:
    with pytest.raises(SystemExit, match="no arm 'two'; there are closed, full, one, other"):
        differences(predictions(), "two")


def test_answers_that_nobody_wrote_are_not_compared() -> None:
    rows = predictions()
    del rows[-1]["contains"]
    [row] = differences(rows, "one")
    assert row.keys() == {"arm", "n", "kept", "kept_low", "kept_high"}
