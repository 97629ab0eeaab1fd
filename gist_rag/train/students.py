"""Who learns, and what one step computes: the serving path with gradients on.

GistStudent     compress > compose > read; the teacher is the same model reading the text
ThoughtStudent  worked answers, earlier thoughts of which are compressed or fade
ReaderStudent   read text or finished gists; there is no teacher but the answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from gist_rag.backbone import Backbone, Context
from gist_rag.compose import arrange, compose
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.base import Answers, Lesson, Thoughts
from gist_rag.compressors.full import Full
from gist_rag.compressors.repeat import Repeat, Repeater, Target
from gist_rag.errors import BadInput
from gist_rag.losses import cross_entropy
from gist_rag.reader import Reader
from gist_rag.train.config import READER, TrainConfig
from gist_rag.train.data import Example
from gist_rag.types import GistState

T = TypeVar("T")

MATCH = "match"
"""A loss term of ``GistStudent`` that no method has of its own, ``Repeater.error``; it is there if
a run gives it a weight."""
REPEAT = "repeat"
"""Another one: NLL of a passage that the plain model repeats from its gists."""
SCORE = "score"
"""And one for methods that keep tokens: how far the log-mass that they foretell for each of them is
from the log of the attention that it gets while the passage is repeated, squared."""
MATCH_QUERIES = 96
"""Queries of each KV head that ``match`` looks at."""
KEPT_TARGETS, KEPT_SCORES = 512, 8192
"""Passages whose targets are kept for the next time that they come: some 2 MB for each to
``match``, 50 KB to ``score``."""
LEAST_SCORE = 1e-9
"""Attention below this counts as this much."""


class Student(nn.Module):
    """Something with parameters that can be taught."""

    def __init__(
        self, backbone: Backbone, config: TrainConfig, reader: Reader | None = None
    ) -> None:
        super().__init__()
        self.config = config
        object.__setattr__(self, "backbone", backbone)  # borrowed: no submodules
        object.__setattr__(self, "reader", reader)
        self._prefix = lru_cache(maxsize=16)(lambda text: backbone.prefix(backbone.tokenize(text)))

    backbone: Backbone
    reader: Reader | None

    def forward(self, examples: Sequence[Example], ratio: float) -> dict[str, Tensor]:
        """Weighted loss terms of a batch; their sum is what is minimised."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, object]]:
        """Parameters with their learning rates."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what has been learnt, ready for use."""
        raise NotImplementedError

    def count(self, examples: Sequence[Example]) -> int:
        """Tokens of passages, questions and answers, each once."""
        texts = {text for e in examples for text in (*e.passages, e.question, e.answer)}
        return sum(len(self.backbone.tokenize(text)) for text in texts)

    def _read(
        self,
        examples: Sequence[Example],
        answers: Sequence[Tensor],
        states: Mapping[str, GistState] | None = None,
    ) -> Tensor:
        """Logits ``(N, V)`` of the answers' tokens after prompts whose passages are texts or gists.

        What a prompt starts with is read without gradient: no parameter of ours reaches it.

        Args:
            states: gists by the text of their passage, of all passages that are not read as text.
        """
        backbone = self.backbone
        prefixes, placed, texts = [], [], []
        for example, answer in zip(examples, answers, strict=True):
            before, pieces = example.pieces(backbone.render)
            prefixes.append(self._prefix(before))
            gists = iter([(states or {})[text] for text in example.gisted])
            following = [next(gists) if p is None else backbone.tokenize(p) for p in pieces]
            row, text = arrange([*following, answer[:-1]], len(prefixes[-1]), self.config.positions)
            placed.append(row)
            texts.append(text)
        longest = max(map(len, answers))  # only these rows go through the vocabulary
        context = Context(prefixes, compose(placed, backbone))
        logits = backbone.read(context, texts, num_logits=longest, adapter=self.reader)
        return torch.cat([row[longest - len(a) :] for row, a in zip(logits, answers, strict=True)])


class GistStudent(Student):
    """A compressor that learns to write gists which read as the text does."""

    def __init__(
        self, backbone: Backbone, config: TrainConfig, reader: Reader | None = None
    ) -> None:
        super().__init__(backbone, config, reader)
        settings = {"ratio": config.ratios[0], **config.settings}
        self.compressor: Compressor = make_compressor(config.method, backbone, settings)
        self.compressor.requires_grad_(True)  # off, where it goes on from a folder
        if not list(self.compressor.parameters()):
            raise BadInput(f"{config.method} has nothing to train")
        self.weights = {**self.compressor.loss_weights, **config.weights}
        self._full, self._repeater = Full(backbone), Repeater(backbone)
        self._targets: dict[str, Target] = {}
        self._scores: dict[str, Tensor] = {}

    def forward(self, examples: Sequence[Example], ratio: float) -> dict[str, Tensor]:
        compressor = self.compressor
        compressor.set_ratio(ratio)
        texts = _gisted(examples)
        passages = [self.backbone.tokenize(text) for text in texts]
        hidden = compressor.encode(passages)
        states = compressor.distil(hidden, passages)
        lesson = Lesson(passages, hidden, states)
        terms = compressor.passage_losses(lesson)
        if MATCH in self.config.weights:
            terms[MATCH] = self._match(texts, lesson)
        if SCORE in self.config.weights:
            terms[SCORE] = self._score(texts, lesson)
        if REPEAT in self.config.weights:
            terms[REPEAT] = self._repeat(passages, states)
        if self.config.questions_per_context:
            answers = self._answers(examples, dict(zip(texts, states, strict=True)))
            terms |= compressor.answer_losses(answers)
        if not terms:
            raise BadInput(
                f"{compressor.name} has no loss: ask questions, or give {MATCH}, {SCORE} or "
                f"{REPEAT} a weight"
            )
        return self._weighted(terms)

    def _weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms that count. Raises ``BadInput`` where the run gives a weight to a term that is not
        there, or to none that is."""
        given = {name for name, weight in self.config.weights.items() if weight}
        if unknown := given - terms.keys():
            raise BadInput(
                f"no loss term {', '.join(sorted(unknown))}; there are {', '.join(sorted(terms))}"
            )
        counted = {
            name: term * weight
            for name, term in terms.items()
            if (weight := self.weights.get(name))
        }
        if not counted:
            raise BadInput(f"every loss term has weight 0: {', '.join(sorted(terms))}")
        return counted

    def _answers(self, examples: Sequence[Example], states: Mapping[str, GistState]) -> Answers:
        """What student and teacher say."""
        targets = [torch.cat(said(self.backbone, e)) for e in examples]
        closed: Tensor | None = None
        with torch.no_grad():
            as_text = [replace(e, as_text=range(len(e.passages))) for e in examples]
            teacher = self._read(as_text, targets)
            if self.compressor.reads_closed:
                closed = self._read([replace(e, passages=()) for e in examples], targets)
        student = self._read(examples, targets, states)
        return Answers(
            student=student,
            teacher=teacher,
            targets=torch.cat(targets).to(student.device),
            weights=_equal_weights(targets).to(student.device),
            closed=closed,
        )

    def _match(self, texts: Sequence[str], lesson: Lesson) -> Tensor:
        """How far the gists are from the whole passages for each head that repeats these."""

        def target(repeat: Repeat, row: int) -> Target:
            return self._repeater.target(repeat, row, MATCH_QUERIES)

        targets = self._known(self._targets, KEPT_TARGETS, target, texts, lesson)
        errors = [self._repeater.error(t, s) for t, s in zip(targets, lesson.states, strict=True)]
        return torch.stack(errors).mean()

    def _score(self, texts: Sequence[str], lesson: Lesson) -> Tensor:
        """Mean squared error of the tokens' log-masses against the logs of their scores."""

        def scores(repeat: Repeat, row: int) -> Tensor:
            return self._repeater.scores(repeat, row)[0].clamp_min(LEAST_SCORE).log()

        wanted = self._known(self._scores, KEPT_SCORES, scores, texts, lesson)
        errors = []
        for log_scores, state in zip(wanted, lesson.states, strict=True):
            if state.num_slots != log_scores.numel():
                raise BadInput(f"{self.compressor.name} keeps no tokens that could be scored")
            errors.append((state.bias - log_scores.flatten()).square().mean())
        return torch.stack(errors).mean()

    def _known(
        self,
        known: dict[str, T],
        limit: int,
        find: Callable[[Repeat, int], T],
        texts: Sequence[str],
        lesson: Lesson,
    ) -> list[T]:
        """Something about each passage that its repetition shows, found once; the oldest go."""
        new = [i for i, text in enumerate(texts) if text not in known]
        if new:
            ids = [lesson.passages[i] for i in new]
            with torch.no_grad():
                plain = self.compressor.reads_tokens_only  # then there is no need to encode again
                hidden = lesson.hidden[:, new] if plain else self._full.encode(ids)
                repeat = self._repeater(self._full.distil(hidden, ids), ids)
                known |= {texts[i]: find(repeat, row) for row, i in enumerate(new)}
        found = [known[text] for text in texts]
        for text in list(known)[:-limit]:
            del known[text]
        return found

    def _repeat(self, passages: Sequence[Tensor], states: Sequence[GistState]) -> Tensor:
        """Mean NLL of the passages' tokens, repeated from gists."""
        logits = self._repeater.read(states, passages)
        return cross_entropy(torch.cat(logits), torch.cat([*passages]).to(logits[0].device)).mean()

    def groups(self) -> list[dict[str, object]]:
        embeddings = {id(self.compressor.embeddings())}
        named = list(self.compressor.named_parameters())
        fast = [p for _, p in named if id(p) in embeddings]
        rest = [p for _, p in named if id(p) not in embeddings]
        lr = self.config.lr
        groups = [(rest, lr), (fast, lr * self.config.embedding_lr_factor)]
        return [{"params": params, "lr": rate} for params, rate in groups if params]

    def save(self, folder: Path) -> None:
        self.compressor.set_ratio(self.config.ratios[0])
        self.compressor.save_pretrained(folder)


class ThoughtStudent(GistStudent):
    """A compressor that learns to go on from its own compressed thoughts."""

    def __init__(
        self, backbone: Backbone, config: TrainConfig, reader: Reader | None = None
    ) -> None:
        super().__init__(backbone, config, reader)
        self.weights = {**self.compressor.loss_weights, "lm": 1.0, **config.weights}

    def forward(self, examples: Sequence[Example], ratio: float) -> dict[str, Tensor]:
        self.compressor.set_ratio(ratio)
        thoughts = [thoughts_of(self.backbone, e) for e in examples]
        return self._weighted(self.compressor.thought_losses(thoughts))


class ReaderStudent(Student):
    """A reader that learns to answer, from text and from gists that others have made."""

    reader: Reader

    def __init__(
        self, backbone: Backbone, config: TrainConfig, start: Reader | None = None
    ) -> None:
        reader = start or Reader(backbone, config.lora, config.invocation)
        super().__init__(backbone, config, reader)
        self.lora = reader.requires_grad_(True)
        self._compressors = {
            ratio: make_compressor("full", backbone)
            if ratio == 1
            else make_compressor(config.compressor, backbone, {"ratio": ratio, **config.settings})
            for ratio in config.ratios
        }

    def forward(self, examples: Sequence[Example], ratio: float) -> dict[str, Tensor]:
        answers = [torch.cat(said(self.backbone, e)) for e in examples]
        texts = _gisted(examples)
        states: Sequence[GistState] = ()
        if texts:
            with torch.no_grad():
                states = self._compressors[ratio].compress([*map(self.backbone.tokenize, texts)])
        logits = self._read(examples, answers, dict(zip(texts, states, strict=True)))
        losses = cross_entropy(logits, torch.cat(answers).to(logits.device))
        return {"ce": (losses * _equal_weights(answers).to(logits.device)).sum()}

    def groups(self) -> list[dict[str, object]]:
        return [{"params": list(self.lora.parameters()), "lr": self.config.lr}]

    def save(self, folder: Path) -> None:
        self.reader.save_pretrained(folder)


def make_student(backbone: Backbone, config: TrainConfig, reader: Reader | None = None) -> Student:
    """Who learns in a run; ``reader`` is who reads its gists, and who teaches, or where a reader
    that was asked for begins."""
    if config.method == READER:
        return ReaderStudent(backbone, config, reader if config.reader else None)
    return (ThoughtStudent if config.task == "thoughts" else GistStudent)(backbone, config, reader)


def said(backbone: Backbone, example: Example) -> list[Tensor]:
    """The answer's tokens in their parts; the last one ends with the end token."""
    *earlier, last = example.said(backbone.tokenize)
    return [*earlier, torch.cat((last, torch.tensor([min(backbone.stop_ids)])))]


def thoughts_of(backbone: Backbone, example: Example) -> Thoughts:
    """A prompt and its answer in tokens."""
    before, pieces = example.pieces(backbone.render)
    prompt = backbone.tokenize("".join([before, *filter(None, pieces)]))
    parts = [prompt, *said(backbone, example)]
    return Thoughts(torch.cat(parts), [*accumulate(map(len, parts))])


def _gisted(examples: Sequence[Example]) -> list[str]:
    """Passages that are read as gists, each once however many questions are asked of it."""
    return list(dict.fromkeys(text for e in examples for text in e.gisted))


def _equal_weights(answers: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(a),), 1 / (len(a) * len(answers))) for a in answers])
