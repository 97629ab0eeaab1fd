"""How arms differ from one of them, question by question, from a result file.

    python benchmarks/quality/paired.py results/shipped_p1.json --against gisting-4x@4

Per arm: the difference of the share kept by NLL, and, where every answer was written, of those that
contain the gold one, with 95 % intervals from paired resampling of the questions. What one arm owes
to easy questions so does the other, so these intervals are narrower than those of both arms
together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from expand import Row, by_question

from gist_rag.evaluate import metrics


def differences(predictions: Sequence[Row], against: str) -> list[dict[str, float | str]]:
    """A row for each arm but ``closed`` and ``full``, over the questions that all have answered."""
    arms = {row["arm"]: by_question(predictions, row["arm"]) for row in predictions}
    if against not in arms:
        raise SystemExit(f"there is no arm {against!r}; there are {', '.join(arms)}")
    ids = [i for i in arms["full"] if all(i in rows for rows in arms.values())]
    written = all(
        "contains" in rows[i] for arm, rows in arms.items() if arm != "closed" for i in ids
    )

    def scores(arm: str, field: str) -> metrics.Scores:
        return np.array([arms[arm][i][field] for i in ids])

    closed, full = scores("closed", "nll"), scores("full", "nll")
    nothing, everything = np.zeros(len(ids)), np.ones(len(ids))
    rows: list[dict[str, float | str]] = []
    for arm in arms:
        if arm in ("closed", "full", against):
            continue
        # the share kept of a difference, set on what no passage gives
        nll = closed + scores(arm, "nll") - scores(against, "nll")
        low, high = metrics.bootstrap(nll, closed, full)
        rows.append({"arm": arm, "n": len(ids), "kept": metrics.kept(nll, closed, full)})
        rows[-1] |= {"kept_low": low, "kept_high": high}
        if written:
            found = scores(arm, "contains") - scores(against, "contains")
            low, high = metrics.bootstrap(found, nothing, everything)
            rows[-1] |= {"contains": float(found.mean())}
            rows[-1] |= {"contains_low": low, "contains_high": high}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", required=True, help="the arm that the others are set against")
    args = parser.parse_args()

    for row in differences(json.loads(args.file.read_text())["predictions"], args.against):
        told = [
            f"{what} {row[what]:+.3f} ({row[f'{what}_low']:+.3f} to {row[f'{what}_high']:+.3f})"
            for what in ("kept", "contains")
            if what in row
        ]
        print(f"{row['arm']:40} n {row['n']:3} ", "  ".join(told))


if __name__ == "__main__":
    main()
