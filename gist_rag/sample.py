"""The sample that ships: passages of the SQLite documentation, and questions that they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from gist_rag.retrieval import read_corpus
from gist_rag.types import Passage

DATA = Path(__file__).with_name("data")


class Question(NamedTuple):
    """A question and its gold answer."""

    id: str
    text: str
    gold: str


def sample_passages() -> list[Passage]:
    """The 60 passages."""
    return read_corpus(DATA / "sqlite_passages.jsonl")


def sample_questions() -> list[Question]:
    """The 30 questions."""
    lines = (DATA / "sqlite_questions.jsonl").read_text(encoding="utf8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Question(row["id"], row["question"], row["answers"][0]) for row in rows]
