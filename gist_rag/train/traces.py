"""Worked answers > examples, for methods that compress their own thoughts while they decode."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gist_rag.errors import BadInput
from gist_rag.jsonl import read_lines
from gist_rag.train.config import TrainConfig
from gist_rag.train.data import Example
from gist_rag.types import Message

THOUGHT_END = "\n\n"
_CALCULATOR = re.compile(r"<<.*?>>")
_FINAL = re.compile(r"^####\s*", re.MULTILINE)


@dataclass(frozen=True)
class Trace(Example):
    """A question that is answered in thoughts, without passages."""

    def pieces(self, render: Callable[[list[Message]], str]) -> tuple[str, list[str | None]]:
        """What the prompt has before the question, and the rest of it."""
        prompt = render([Message(role="user", content=self.question)])
        before, question, rest = prompt.rpartition(self.question)
        return before, [question + rest]

    def said(self, tokenize: Callable[[str], Tensor]) -> list[Tensor]:
        """Each thought with the blank line that ends it."""
        *earlier, last = self.answer.split(THOUGHT_END)
        return [*(tokenize(thought + THOUGHT_END) for thought in earlier), tokenize(last)]


class Traces:
    """An endless supply of questions with answers in steps, a blank line between steps.

    Args:
        config: which files; question and answer together have ``max_passage_tokens`` or fewer.
        count: tokens of a text.

    Raises:
        BadInput: no such file, a row without the fields, or no answer that is short enough.
    """

    def __init__(self, config: TrainConfig, count: Callable[[str], int]) -> None:
        self.config = config
        longest = config.max_passage_tokens
        found = [row for path in config.data for row in load_traces(path)]
        self.traces = [e for e in found if count(e.question) + count(e.answer) <= longest]
        if not self.traces:
            raise BadInput(
                f"no answer of {', '.join(map(str, config.data))} has {longest} tokens or fewer"
            )
        random.Random(config.seed).shuffle(self.traces)

    def batch(self, step: int) -> tuple[list[Trace], float]:
        """Examples of a step, and a compression ratio, which thoughts do not use."""
        first = step * self.config.batch_size
        rows = (first + i for i in range(self.config.batch_size))
        return [self.traces[row % len(self.traces)] for row in rows], self.config.ratios[0]


def load_traces(path: Path | str) -> list[Trace]:
    """Rows ``{"question", "answer"}`` of a JSON Lines file, perhaps gzipped, as GSM8K has them:
    one step a line, calculator notes in ``<<>>``, the result after ``####``.

    Raises:
        BadInput: no such file, no JSON, or a row without the fields.
    """
    return [_parse(line, place) for place, line in read_lines(path)]


def _parse(line: str, place: str) -> Trace:
    try:
        row = json.loads(line)
        question, answer = str(row["question"]), str(row["answer"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{place} is no row of question and answer: {error}") from error
    answer = _FINAL.sub("The answer is ", _CALCULATOR.sub("", answer))
    steps = [step.strip() for step in answer.splitlines() if step.strip()]
    return Trace(question.strip(), THOUGHT_END.join(steps), ())
