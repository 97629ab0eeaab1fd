"""What expanding on demand costs and gains, from a result file with an arm and the same arm ``+n``.

    python benchmarks/quality/expand.py results/rag_p5.json --arm attention_matching@8

Every second question chooses the doubt from which on a share of them is read again; the others say
what that gives. So no question judges a threshold that it has helped to choose. ``kept`` is the
share of the text's benefit, over those others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gist_rag.evaluate import metrics

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
SCORES = ("em", "contains", "f1", "nll")

Row = Mapping[str, Any]


def by_question(predictions: Sequence[Row], arm: str) -> dict[str, Row]:
    return {row["id"]: row for row in predictions if row["arm"] == arm}


def threshold(doubts: Sequence[float], share: float) -> float:
    """The doubt that this share of the questions reaches."""
    ranked = sorted(doubts, reverse=True)
    count = round(share * len(ranked))
    return ranked[count - 1] if count else float("inf")


def curve(
    gists: Mapping[str, Row],
    text: Mapping[str, Row],
    closed: Mapping[str, Row],
    full: Mapping[str, Row],
) -> list[dict[str, float]]:
    """Per wanted share: the threshold, how many were expanded, and the mean scores."""
    ids = list(gists)
    chosen, judged = ids[::2], ids[1::2]
    bounds = [np.array([arm[i]["nll"] for i in judged]) for arm in (closed, full)]
    rows = []
    for share in SHARES:
        doubt = threshold([gists[i]["doubt"] for i in chosen], share)
        doubtful = {i for i in judged if gists[i]["doubt"] >= doubt}
        read = [(text if i in doubtful else gists)[i] for i in judged]
        means = {name: sum(row[name] for row in read) / len(read) for name in SCORES}
        rows.append({"wanted": share, "doubt": doubt, "expanded": len(doubtful) / len(judged)})
        rows[-1]["kept"] = metrics.kept(np.array([row["nll"] for row in read]), *bounds)
        rows[-1] |= {**means, "slots": sum(row["kv_slots"] for row in read) / len(read)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--arm", required=True, help="for example attention_matching@8^3")
    parser.add_argument("--passages", type=int, default=1, help="the n of +n")
    args = parser.parse_args()

    predictions = json.loads(args.file.read_text())["predictions"]
    gists = by_question(predictions, args.arm)
    text = by_question(predictions, f"{args.arm}+{args.passages}")
    if not gists or gists.keys() != text.keys():
        raise SystemExit(f"{args.file} has no pair of {args.arm} and {args.arm}+{args.passages}")
    rows = curve(gists, text, *(by_question(predictions, arm) for arm in ("closed", "full")))
    print("".join(f"{name:>10}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:10.3f}" for value in row.values()))


if __name__ == "__main__":
    main()
