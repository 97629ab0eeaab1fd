"""Rows of a question-answering file > examples with passages and wrong answers to choose from."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_rag.errors import BadInput
from gist_rag.evaluate.metrics import contains

NUM_CHOICES = 10
MAX_CHOICE_WORDS = 8
_ENTITY = re.compile(
    r"\b(?:[A-Z][\w'-]+(?: (?:of|the|de|[A-Z][\w'-]+))*(?<! of)(?<! the)|\d[\d,.]*\d|\d+)"
)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        answers: gold answers, the first one canonical.
        passages: texts, in prompt order; at least one of them holds the answer.
        choices: wrong answers, ``NUM_CHOICES - 1`` of them where the data has so many.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    choices: tuple[str, ...]


def load_task(path: Path | str, *, num_passages: int, limit: int, seed: int) -> list[Example]:
    """Examples of a file of rows ``{"id", "question", "answers", "passages": [{"title", "text",
    "gold"}]}``.

    The gold passage comes first, distractors follow in file order up to ``num_passages``; the
    order is then shuffled. The same seed gives the same examples.

    Raises:
        BadInput: no such file, a row without the fields, or fewer than ``num_passages`` passages
            in every row.
    """
    rows = [row for row in _rows(Path(path)) if _gold(row) and row["answers"]]
    rows = [row for row in rows if len(row["passages"]) >= num_passages]
    if not rows:
        raise BadInput(
            f"{path} has no row with an answer, a gold passage and {num_passages} passages"
        )
    random.Random(seed).shuffle(rows)
    answers = sorted(
        {row["answers"][0] for row in rows if len(row["answers"][0].split()) <= MAX_CHOICE_WORDS}
    )
    return [_example(row, answers, num_passages, seed) for row in rows[:limit]]


def _example(row: dict[str, Any], answers: Sequence[str], num_passages: int, seed: int) -> Example:
    generator = random.Random(f"{seed}-{row['id']}")
    gold = _gold(row)
    others = [p for p in row["passages"] if p is not gold]
    chosen = [gold, *others[: num_passages - 1]]
    generator.shuffle(chosen)
    texts = tuple(_text(p) for p in chosen)
    return Example(
        id=str(row["id"]),
        question=_question(row["question"]),
        answers=tuple(row["answers"]),
        passages=texts,
        choices=_choices(row["answers"], texts, answers, generator),
    )


def _choices(
    gold: Sequence[str], texts: Sequence[str], answers: Sequence[str], generator: random.Random
) -> tuple[str, ...]:
    """Wrong answers: half entity-like spans of the passages, half answers of other questions."""

    def wrong(text: str) -> bool:
        return not any(contains(text, [g]) or contains(g, [text]) for g in gold)

    spans = sorted({m.group() for text in texts for m in _ENTITY.finditer(text)})
    spans = [s for s in spans if len(s) > 1 and len(s.split()) <= MAX_CHOICE_WORDS and wrong(s)]
    near = generator.sample(spans, min(len(spans), NUM_CHOICES // 2))
    pool = [a for a in answers if a not in near and wrong(a)]
    far = generator.sample(pool, min(len(pool), NUM_CHOICES - 1 - len(near)))
    return (*near, *far)


def _rows(path: Path) -> list[dict[str, Any]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with open_text(path, "rt", encoding="utf8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if missing := {"id", "question", "answers", "passages"} - row.keys():
                    raise BadInput(f"{path}, line {number}: no {', '.join(sorted(missing))}")
                rows.append(row)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {len(rows) + 1} is no JSON: {error}") from error
    return rows


def _gold(row: dict[str, Any]) -> dict[str, Any] | None:
    return next((p for p in row["passages"] if p.get("gold")), None)


def _text(passage: dict[str, Any]) -> str:
    return (
        f"{passage['title']}\n{passage['text']}" if passage.get("title") else str(passage["text"])
    )


def _question(text: str) -> str:
    text = text.strip()
    return text if text.endswith("?") else f"{text}?"
