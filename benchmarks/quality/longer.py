"""Questions > the same ones with one long passage each: the gold ones among others, joined.

    python benchmarks/quality/longer.py --task nq_10doc_dev.jsonl.gz --out long.jsonl.gz

The questions are the first of ``evaluate`` with the same ``--seed`` and ``--limit``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from gist_rag.evaluate.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, required=True, help="file of questions")
    parser.add_argument("--passages", type=int, default=4, help="that make one long one")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    chosen = dict(num_passages=args.passages, limit=args.limit, seed=args.seed)
    examples = load_task(args.task, **chosen)
    with gzip.open(args.out, "wt", encoding="utf8") as file:
        for example in examples:
            row = {
                "id": example.id,
                "question": example.question,
                "answers": example.answers,
                "passages": [{"title": "", "text": "\n\n".join(example.passages), "gold": True}],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(examples)} questions in {args.out}")


if __name__ == "__main__":
    main()
