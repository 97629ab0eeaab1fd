"""Files of questions with their passages: what ``evaluate`` asks and ``train`` learns from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_rag.errors import BadInput
from gist_rag.jsonl import read_lines

FIELDS = ("id", "question", "answers", "passages")


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        answers: accepted answers, the first one canonical.
        gold: texts of the passages that hold the answer.
        others: texts of the other passages, in file order.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    others: tuple[str, ...]


def load_questions(path: Path | str) -> list[Question]:
    """Rows ``{"id", "question", "answers", "passages": [{"title", "text", "gold"}]}`` of a JSON
    Lines file, perhaps gzipped. Rows without an answer or without a gold passage are left out.

    Raises:
        BadInput: no such file, no JSON, a row without the fields, or no usable row.
    """
    rows = [_parse(line, place) for place, line in read_lines(path)]
    usable = [row for row in rows if row.answers and row.gold]
    if not usable:
        raise BadInput(f"{path} has no row with an answer and a gold passage")
    return usable


def _parse(line: str, place: str) -> Question:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{place} is no JSON: {error}") from error
    if missing := [name for name in FIELDS if name not in row]:
        raise BadInput(f"{place}: no {', '.join(missing)}")
    try:
        passages = [(_text(p), bool(p.get("gold"))) for p in row["passages"]]
        return Question(
            id=str(row["id"]),
            text=_as_question(row["question"]),
            answers=tuple(row["answers"]),
            gold=tuple(text for text, gold in passages if gold),
            others=tuple(text for text, gold in passages if not gold),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{place} is no row of {', '.join(FIELDS)}: {error}") from error


def _text(passage: dict[str, Any]) -> str:
    if title := passage.get("title"):
        return f"{title}\n{passage['text']}"
    return str(passage["text"])


def _as_question(text: str) -> str:
    text = text.strip()
    return text if text.endswith("?") else f"{text}?"
