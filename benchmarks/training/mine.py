"""Questions > the same questions with hard distractors: passages like the gold one, without answer.

A reader that has only seen random passages beside the gold one learns to pick by topic. Retrieval
does not leave it that choice.

    python benchmarks/training/mine.py --data nq_train.jsonl.gz --limit 4000 --out mined.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from gist_rag.evaluate.metrics import contains
from gist_rag.questions import Question, load_questions

BATCH = 256


def mine(questions: list[Question], pool: list[str], wanted: int) -> list[list[str]]:
    """Per question its own distractors, and after them the passages of the pool that share the
    rarest words with it and hold none of its answers."""
    terms = TfidfVectorizer(sublinear_tf=True, stop_words="english", dtype=np.float32)
    passages = terms.fit_transform(pool)
    out = []
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        scores = (terms.transform([q.text for q in batch]) @ passages.T).toarray()
        for question, row in zip(batch, scores, strict=True):
            near = np.argsort(-row)[: 4 * wanted]
            texts = [pool[i] for i in near if not contains(pool[i], question.answers)]
            texts = [t for t in texts if t not in question.gold]
            out.append([*question.others, *texts][:wanted])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of questions")
    parser.add_argument("--limit", type=int, default=4000, help="questions taken of each file")
    parser.add_argument("--negatives", type=int, default=10, help="distractors per question")
    parser.add_argument("--longest", type=int, default=1000, help="characters of a passage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    questions: list[Question] = []
    for path in args.data:
        rows = [q for q in load_questions(path) if max(map(len, q.gold)) <= args.longest]
        random.Random(args.seed).shuffle(rows)
        questions += rows[: args.limit]
    pool = sorted({passage for question in questions for passage in question.gold})
    found = mine(questions, pool, args.negatives)
    with gzip.open(args.out, "wt", encoding="utf8") as file:
        for question, others in zip(questions, found, strict=True):
            passages = [{"text": p, "gold": True} for p in question.gold]
            passages += [{"text": p, "gold": False} for p in others]
            row = {
                "id": question.id,
                "question": question.text,
                "answers": question.answers,
                "passages": passages,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(questions)} questions, pool of {len(pool)} passages, in {args.out}")


if __name__ == "__main__":
    main()
