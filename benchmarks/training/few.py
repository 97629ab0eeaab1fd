"""Questions > a few of them with short and different gold passages, for runs that see each passage
more than once and keep what the whole passage gives (``match``).

    python benchmarks/training/few.py --data mined.jsonl.gz --out few.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

from gist_rag.jsonl import read_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file of questions")
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--shortest", type=int, default=280, help="characters of a gold passage")
    parser.add_argument("--longest", type=int, default=720)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    rows = [json.loads(line) for _, line in read_lines(args.data)]
    random.Random(args.seed).shuffle(rows)
    chosen = {}
    for row in rows:
        gold = [p["text"] for p in row["passages"] if p["gold"]]
        if len(gold) == 1 and args.shortest < len(gold[0]) < args.longest:
            chosen.setdefault(gold[0], row)
        if len(chosen) == args.count:
            break
    with gzip.open(args.out, "wt", encoding="utf8") as file:
        for row in chosen.values():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(chosen)} questions in {args.out}")


if __name__ == "__main__":
    main()
