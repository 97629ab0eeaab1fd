"""Whether it matters where among its passages an answer stands, from a result file.

    python benchmarks/quality/places.py results/rag_p5_weighed.json --task nq_10doc_dev.jsonl.gz

Passages are shuffled question by question, so every place has its share of the questions. Per place
of the first passage that holds the answer: how many questions, and per arm the share kept of what
the text gives to the same questions, and of answers that contain the gold one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from expand import Row, by_question

from gist_rag.evaluate import metrics
from gist_rag.evaluate.tasks import load_task
from gist_rag.questions import load_questions


def places(task: Path, meta: Mapping[str, Any], limit: int) -> dict[str, int]:
    """Place of the first gold passage, by question."""
    gold = {q.id: set(q.gold) for q in load_questions(task)}
    examples = load_task(task, num_passages=meta["passages"], limit=limit, seed=meta["seed"])
    return {e.id: next(i for i, p in enumerate(e.passages) if p in gold[e.id]) for e in examples}


def by_place(
    predictions: Sequence[Row], place_of: Mapping[str, int]
) -> list[dict[str, float | int | str]]:
    """A row for each arm and place."""
    arms = dict.fromkeys(row["arm"] for row in predictions)
    of_arm = {arm: by_question(predictions, arm) for arm in arms}
    ids = [i for i in of_arm["full"] if all(i in rows for rows in of_arm.values())]

    def nll(arm: str, chosen: Sequence[str]) -> metrics.Scores:
        return np.array([of_arm[arm][i]["nll"] for i in chosen])

    rows: list[dict[str, float | int | str]] = []
    for arm in of_arm:
        for place in sorted(set(place_of.values())):
            chosen = [i for i in ids if place_of[i] == place]
            if not chosen:
                continue
            found = [of_arm[arm][i]["contains"] for i in chosen]
            kept = metrics.kept(*(nll(name, chosen) for name in (arm, "closed", "full")))
            rows.append({"arm": arm, "place": place + 1, "n": len(chosen)})
            rows[-1] |= {"kept": round(kept, 3), "contains": round(float(np.mean(found)), 3)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--task", type=Path, required=True, help="the file that was asked from")
    args = parser.parse_args()

    result = json.loads(args.file.read_text())
    if args.task.name != result["meta"]["task"]:
        raise SystemExit(f"{args.file} was asked from {result['meta']['task']}")
    count = len({row["id"] for row in result["predictions"]})
    for row in by_place(result["predictions"], places(args.task, result["meta"], count)):
        print(f"{row['arm']:40} place {row['place']}  n {row['n']:3}  kept {row['kept']:6.3f}  "
              f"contains {row['contains']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
