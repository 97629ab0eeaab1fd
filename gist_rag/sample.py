"""The sample that ships: passages of the SQLite documentation, and questions that they answer."""

from __future__ import annotations

from pathlib import Path

from gist_rag.questions import Question, load_questions
from gist_rag.retrieval import read_corpus
from gist_rag.types import Passage

DATA = Path(__file__).with_name("data")


def sample_passages() -> list[Passage]:
    """The 60 passages."""
    return read_corpus(DATA / "sqlite_passages.jsonl")


def sample_questions() -> list[Question]:
    """The 30 questions."""
    return load_questions(DATA / "sqlite_questions.jsonl")
