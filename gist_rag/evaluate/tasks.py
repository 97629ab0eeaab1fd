"""Rows of a question-answering file > examples with passages and wrong answers to choose from."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gist_rag.errors import BadInput
from gist_rag.evaluate.metrics import contains
from gist_rag.questions import Question, load_questions

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


def _no_scores(example: Example, answer: str) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True)
class Task:
    """What is asked, and what counts beside what always does.

    Attributes:
        new_tokens: an answer's limit.
        score: further scores of an answer, by name; an example need not have all of them.
    """

    examples: Sequence[Example]
    new_tokens: int = 16
    score: Callable[[Example, str], Mapping[str, float]] = _no_scores


def load_task(path: Path | str, *, num_passages: int, limit: int, seed: int) -> list[Example]:
    """Examples of a file of questions (``gist_rag.questions``).

    Gold passages come first, distractors follow in file order up to ``num_passages``; the order is
    then shuffled. The same seed gives the same examples.

    Raises:
        BadInput: an unusable file, or fewer than ``num_passages`` passages in every row.
    """
    rows = [q for q in load_questions(path) if len(q.gold) + len(q.others) >= num_passages]
    if not rows:
        raise BadInput(f"{path} has no row with {num_passages} passages")
    random.Random(seed).shuffle(rows)
    answers = sorted({q.answers[0] for q in rows if len(q.answers[0].split()) <= MAX_CHOICE_WORDS})
    return [_example(row, answers, num_passages, seed) for row in rows[:limit]]


def _example(row: Question, answers: Sequence[str], num_passages: int, seed: int) -> Example:
    generator = random.Random(f"{seed}-{row.id}")
    texts = [*row.gold, *row.others][:num_passages]
    generator.shuffle(texts)
    return Example(
        id=row.id,
        question=row.text,
        answers=row.answers,
        passages=tuple(texts),
        choices=_choices(row.answers, texts, answers, generator),
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
