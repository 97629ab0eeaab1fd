"""Questions > examples. What a step sees depends on its number and the seed alone, so that a run
that was interrupted goes on exactly as it would have."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from torch import Tensor

from gist_rag.errors import BadInput
from gist_rag.jsonl import read_lines
from gist_rag.prompt import rag_pieces
from gist_rag.questions import Question, load_questions
from gist_rag.retrieval import read_corpus
from gist_rag.train.config import READER, TrainConfig
from gist_rag.types import Message

UNANSWERABLE = "I do not know."


@dataclass(frozen=True)
class Example:
    """One question as a step sees it.

    Attributes:
        passages: texts in prompt order; perhaps none.
        as_text: which of them are read as text.
    """

    question: str
    answer: str
    passages: tuple[str, ...]
    as_text: Collection[int] = ()

    @property
    def gisted(self) -> list[str]:
        """The passages that are to be read as gists."""
        return [text for i, text in enumerate(self.passages) if i not in self.as_text]

    def pieces(self, render: Callable[[list[Message]], str]) -> tuple[str, list[str | None]]:
        """``rag_pieces`` of the prompt, ``None`` for each passage that is to be read as a gist;
        where there is no gist, the text up to the end of the passages, and the rest of it."""
        given = [text if i in self.as_text else None for i, text in enumerate(self.passages)]
        before, pieces = rag_pieces(self.question, given, render)
        if pieces:
            return before, pieces
        head, last, rest = before.rpartition(self.passages[-1] if self.passages else "\0")
        return head + last, [rest]

    def said(self, tokenize: Callable[[str], Tensor]) -> list[Tensor]:
        """The answer's tokens, in parts that are written one after the other."""
        return [tokenize(self.answer)]


class Examples:
    """An endless supply of batches.

    Args:
        config: which files, how many passages.
        count: tokens of a text.

    Raises:
        BadInput: no question has gold passages within ``max_passage_tokens``.
    """

    def __init__(self, config: TrainConfig, count: Callable[[str], int]) -> None:
        self.config = config
        fits = cache(lambda text: count(text) <= config.max_passage_tokens)
        self.questions = [
            replace(question, others=tuple(filter(fits, question.others)))
            for path in config.data
            for question in _load(path, config)
            if all(map(fits, question.gold))
        ]
        if not self.questions:
            raise BadInput(
                f"no passage of {', '.join(map(str, config.data))} has "
                f"{config.max_passage_tokens} tokens or fewer"
            )
        random.Random(config.seed).shuffle(self.questions)
        self._questions = max(1, config.questions_per_context)  # of a context in a batch
        self._about: dict[str, list[Question]] = {}
        for question in self.questions:
            if len(question.gold) == 1:
                self._about.setdefault(question.gold[0], []).append(question)

    def batch(self, step: int) -> tuple[list[Example], float]:
        """Examples of a step, and the compression ratio it is to use.

        All have the same number of passages, so that little is padded.
        """
        chance = random.Random(f"{self.config.seed}-{step}")
        count = chance.randint(*self.config.passages)
        ratio = chance.choice(self.config.ratios)
        contexts = max(1, self.config.batch_size // self._questions)
        batch: list[Example] = []
        for i in range(contexts):
            question = self.questions[(step * contexts + i) % len(self.questions)]
            example = self._example(question, count, chance)
            batch += example, *self._beside(example, chance)
        return batch, ratio

    def _beside(self, example: Example, chance: random.Random) -> list[Example]:
        """Other questions that the same passages answer."""
        others = [q for text in example.passages for q in self._about.get(text, ())]
        others = [q for q in others if q.text != example.question]
        chance.shuffle(others)
        chosen = others[: self._questions - 1]
        return [replace(example, question=q.text, answer=q.answers[0]) for q in chosen]

    def _example(self, question: Question, count: int, chance: random.Random) -> Example:
        config, kind = self.config, chance.random()
        for_reader = config.method == READER
        if for_reader and kind < config.closed_share:
            return Example(question.text, question.answers[0], ())
        unanswerable = for_reader and count > 1 and kind > 1 - config.unanswerable_share
        texts = [] if unanswerable else list(question.gold)[:count]
        texts += self._distractors(question, count - len(texts), chance)
        chance.shuffle(texts)
        return Example(
            question.text,
            UNANSWERABLE if unanswerable else question.answers[0],
            tuple(texts),
            self._as_text(count, chance),
        )

    def _as_text(self, count: int, chance: random.Random) -> Collection[int]:
        """Which of so many passages are read as text."""
        config = self.config
        if config.method == READER:
            return () if chance.random() < config.gist_share else range(count)
        stays = count > 1 and chance.random() < config.text_share
        return (chance.randrange(count),) if stays else ()

    def _distractors(self, question: Question, wanted: int, chance: random.Random) -> list[str]:
        """Passages of the question's own row first, then gold passages of other questions."""
        found = list(question.others[:wanted])
        for _ in range(100 * wanted):  # a file of few passages must not keep us here for ever
            if len(found) == wanted:
                break
            other = chance.choice(self.questions).gold[0]
            if other not in question.gold and other not in found:
                found.append(other)
        return found


def _load(path: Path, config: TrainConfig) -> list[Question]:
    """Questions of a file; where none is asked, a corpus does as well."""
    if config.questions_per_context == 0 and config.method != READER and not _asks(path):
        return [Question(p.id, "", ("",), (p.text,), ()) for p in read_corpus(path)]
    return load_questions(path)


def _asks(path: Path) -> bool:
    """Whether the first row of a file is a question, or at least no passage."""
    _, line = next(iter(read_lines(path)), ("", ""))
    try:
        row = json.loads(line)
    except ValueError:
        return True  # whoever reads it says what is wrong
    return not isinstance(row, dict) or "question" in row or "text" not in row
