"""From segments to an answer's first token.

    segments > which passages are read, and how > one or several rows > positions > compose > read

A prompt is one row of the batch that the model reads, or several where passages are read apart.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local, Opened, Prefix
from gist_rag.budget import Budget
from gist_rag.compose import Placed, Positions, arrange, compose, weighed
from gist_rag.errors import ContextOverflow
from gist_rag.focus import APART, Expand, Focus, log_likelihoods, log_weights
from gist_rag.layout import Slots
from gist_rag.mixture import Mixture
from gist_rag.prompt import (
    Known,
    Segment,
    Text,
    as_text,
    num_known,
    question_of,
    with_only,
    without_gaps,
)
from gist_rag.reader import Reader
from gist_rag.types import GistState, Sampling

logger = logging.getLogger(__name__)

PREFIXES = 32
"""Leading texts whose exact KV is kept in memory."""

States = Mapping[str, GistState]
"""Gists by the content key of their passage."""

Judging = Callable[[str, Sequence[Known]], Tensor]
"""How much each passage has to do with a question, ``(P,)`` in nats."""


@dataclass(frozen=True)
class Plan:
    """One row, ready to be composed and read.

    Attributes:
        prefix: token ids before everything else.
        known: the passages, in the order of ``placed``.
        end: tokens of the text behind the last passage.
        expanded: passages that stand in ``text`` although they have gists.
    """

    prefix: Tensor
    placed: list[Placed]
    known: list[Known]
    text: Local
    end: int
    expanded: int = 0

    @property
    def gists(self) -> Iterator[tuple[Known, Placed]]:
        """Each passage with its gist."""
        return zip(self.known, self.placed, strict=True)

    @classmethod
    def joined(cls, rows: Sequence[Self], expanded: Sequence[Known]) -> Self:
        """Of a prompt, from its rows: one for each passage, and perhaps one that has them all.

        Args:
            expanded: passages that are read as text.
        """
        widest = sorted(rows, key=lambda row: -len(row.known))  # its order is the prompt's
        every = {id(gist[0]): gist for row in widest for gist in row.gists}  # a text may come twice
        as_text = {id(known) for known in expanded}
        gists = [gist for one, gist in every.items() if one not in as_text]
        return cls(
            rows[0].prefix,
            [placed for _, placed in gists],
            [known for known, _ in gists],
            Local.join([row.text for row in rows]),
            rows[0].end,
            len(expanded),
        )


@dataclass(frozen=True)
class Opening:
    """Prompts that have been read up to their first tokens.

    Attributes:
        plans: what was read of each prompt.
    """

    plans: list[Plan]
    opened: Opened


class Opener:
    """Reads prompts. Safe to share by threads.

    Args:
        positions, reader, focus, expand, budget: see ``engine.GistEngine``.
        weigh: whether passages that are read together have weights of their own.
        judge: who says what passages matter; default: the model, by how likely each makes what
            follows.
    """

    def __init__(
        self,
        backbone: Backbone,
        positions: Positions,
        reader: Reader | None = None,
        focus: Focus | None = None,
        expand: Expand | None = None,
        *,
        budget: Budget | None = None,
        weigh: bool = False,
        judge: Judging | None = None,
    ) -> None:
        self.backbone = backbone
        self.positions = positions
        self.reader = reader
        self.focus = focus
        self.expand = expand
        self.budget = budget
        self.weigh = weigh
        self.judge = judge
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._lock = threading.Lock()

    def open(
        self,
        prompts: Sequence[Sequence[Segment]],
        states: States,
        sampling: Sequence[Sampling],
        lap: Callable[[str], None] = lambda name: None,
    ) -> Opening:
        """Read prompts up to the first token of their answers.

        Args:
            states: gists of all known passages.
            lap: told when passages have been chosen (``focus_ms``) and composed (``compose_ms``).

        Raises:
            ContextOverflow: a prompt with its answer needs more positions than the model has.
        """
        chosen = [self._fitted(prompt, states) for prompt in self._choose(prompts, states)]
        lap("focus_ms")
        chosen, opening = self._open(chosen, sampling, lap)
        if doubtful := self._doubtful(opening):
            chosen = self._expanded(chosen, doubtful, states)
            try:
                _, opening = self._open(chosen, sampling, lap)
            except ContextOverflow as error:  # as text a passage may take more positions
                logger.info("answers stay in doubt, read from gists: %s", error)
        return opening

    def plan(
        self,
        segments: Sequence[Segment],
        states: States,
        positions: Positions | None = None,
        weights: Sequence[float] | None = None,
    ) -> Plan:
        """Positions of everything in one row.

        The first text is the prefix; where no passage is a gist, all texts but the last. Passages
        with nothing but whitespace between them stand side by side; that whitespace is left out.
        Other text is read in one pass at the end, each piece seeing the passages before it.

        Args:
            weights: logs, of each passage; default: all alike.
        """
        first = int(isinstance(segments[0], Text)) if num_known(segments) else len(segments) - 1
        prefix = self.backbone.tokenize("".join(s.text for s in segments[:first]))
        following = without_gaps(segments[first:])
        pieces = [
            states[s.content] if isinstance(s, Known) else self.backbone.tokenize(s.text)
            for s in following
        ]
        placed, text = arrange(pieces, len(prefix), positions or self.positions)
        if weights is not None:
            placed = weighed(placed, weights)
        known = _known(following)
        end = pieces[-1]
        assert isinstance(end, Tensor)  # a passage never ends a prompt
        return Plan(prefix, placed, known, text, len(end))

    def plan_in_budget(self, segments: Sequence[Segment], states: States) -> Plan:
        """A prompt in one row, within the budget, before anybody has said what matters."""
        fitted = self._fitted(_Chosen(segments), states)
        return self.plan(fitted.segments, fitted.states)

    # ---- the steps of open

    def _fitted(self, prompt: _Chosen, states: States) -> _Chosen:
        """A prompt with the gists that are read of it, all of them within the budget."""
        if self.budget is None:
            return replace(prompt, states=states)
        contents = [known.content for known in _known(prompt.segments)]
        times, judged, weights = Counter(contents), prompt.judged, prompt.weights
        first = [contents.index(content) for content in times]  # a text may come twice
        levels = self.budget.chosen(
            [states[content] for content in times],
            None if judged is None else judged[first],
            [*times.values()],
        )
        fitted = {content: level for content, level in zip(times, levels, strict=True) if level}
        read = [place for place, content in enumerate(contents) if content in fitted]
        return replace(
            prompt,
            segments=with_only(prompt.segments, read),
            judged=None if judged is None else judged[read],
            weights=None if weights is None else [weights[place] for place in read],
            states=fitted,
        )

    def _choose(self, prompts: Sequence[Sequence[Segment]], states: States) -> list[_Chosen]:
        """What is to be read of prompts: all, or only what matters, or each passage apart.

        Where passages are read apart and the model judges them, that costs no pass of its own:
        the rows that answer are among those that are judged.
        """
        chosen, focus = [_Chosen(prompt) for prompt in prompts], self.focus
        any_of_two = focus is None or self.weigh or focus.apart or focus.margin < math.inf
        least = 1 if any_of_two else focus.passages  # type: ignore[union-attr]
        many = [i for i, prompt in enumerate(prompts) if num_known(prompt) > least]
        if focus is not None and focus.apart and self.judge is None:
            for i in many:
                chosen[i] = replace(chosen[i], readings=focus.candidates(num_known(prompts[i])))
        elif focus is not None or self.weigh:
            found = self._judge([prompts[i] for i in many], states)
            for i, judged in zip(many, found, strict=True):
                chosen[i] = self._chosen(prompts[i], judged)
        return chosen

    def _chosen(self, prompt: Sequence[Segment], judged: Tensor) -> _Chosen:
        """What is to be read of a prompt, once its passages have been judged."""
        focus = self.focus
        if focus is not None and focus.apart:
            return _Chosen(prompt, focus.readings(judged)[0], judged)
        if focus is not None:
            places = focus.chosen(judged)
            prompt, judged = with_only(prompt, places), judged[places]
        return _Chosen(prompt, judged=judged, weights=log_weights(judged) if self.weigh else None)

    def _open(
        self,
        prompts: Sequence[_Chosen],
        sampling: Sequence[Sampling],
        lap: Callable[[str], None],
    ) -> tuple[list[_Chosen], Opening]:
        """Compose and read. Where passages are read apart, all rows are read up to the first
        token, and those that matter go on; the prompts then say what has been found out."""
        rows = [
            [
                self.plan(
                    row, prompt.states, APART if prompt.readings else None, prompt.gist_weights
                )
                for row in prompt.rows()
            ]
            for prompt in prompts
        ]
        plans = [plan for one in rows for plan in one]
        texts = [plan.text for plan in plans]
        owner = _owner(rows)
        self.backbone.check_window(texts, [sampling[i] for i in owner])
        context = Context([self._prefix(p.prefix) for p in plans], self._compose(plans))
        lap("compose_ms")
        counts = None
        if any(prompt.unjudged for prompt in prompts):
            counts = [plans[row].end if prompts[i].unjudged else 0 for row, i in enumerate(owner)]
        mixture = None if counts else self._mixture(prompts)
        opened = self.backbone.open(context, texts, self.reader, mixture, counts=counts)
        if opened.likelihoods is not None:
            prompts, rows, opened = self._select(prompts, rows, opened, opened.likelihoods)
        joined = zip(rows, prompts, strict=True)
        whole = [Plan.joined(one, prompt.as_text) for one, prompt in joined]
        return list(prompts), Opening(whole, opened)

    def _select(
        self,
        prompts: Sequence[_Chosen],
        rows: Sequence[Sequence[Plan]],
        opened: Opened,
        likelihoods: Tensor,
    ) -> tuple[list[_Chosen], list[list[Plan]], Opened]:
        """Go on with those of each prompt's rows that matter."""
        assert self.focus is not None
        judged: list[_Chosen] = []
        kept: list[list[Plan]] = []
        places: list[int] = []
        first = 0
        each = likelihoods.split([*map(len, rows)])
        for prompt, one, found in zip(prompts, rows, each, strict=True):
            going = [*range(len(one))]
            if prompt.unjudged:
                alone = found[: num_known(prompt.segments)]
                readings, _ = self.focus.readings(alone)
                going = [prompt.readings.index(reading) for reading in readings]
                prompt = replace(prompt, readings=readings, judged=alone)
            judged.append(prompt)
            kept.append([one[row] for row in going])
            places += [first + row for row in going]
            first += len(one)
        slots = self._compose([plan for one in kept for plan in one])
        return judged, kept, opened.select(places, slots, self._mixture(judged))

    def _mixture(self, prompts: Sequence[_Chosen]) -> Mixture:
        """Which rows answer together, and with what weights."""
        weights = []
        for prompt in prompts:
            weight = torch.zeros(1)
            if prompt.readings and self.focus is not None and prompt.judged is not None:
                weight = self.focus.readings(prompt.judged)[1]
            weights.append(weight.to(self.backbone.device))
        owner = [i for i, weight in enumerate(weights) for _ in weight]
        return Mixture(owner, torch.cat(weights))

    def _doubtful(self, opening: Opening) -> list[int]:
        """Prompts whose gists leave a doubt."""
        if self.expand is None:
            return []
        doubts = enumerate(self.expand.doubtful(opening.opened))
        return [i for i, doubt in doubts if doubt and opening.plans[i].placed]

    def _expanded(
        self, prompts: Sequence[_Chosen], doubtful: Sequence[int], states: States
    ) -> list[_Chosen]:
        """Prompts with what matters as text where there is doubt."""
        assert self.expand is not None
        chosen = list(prompts)
        unjudged = [i for i in doubtful if prompts[i].judged is None]
        found = self._judge([prompts[i].segments for i in unjudged], states)
        judged = dict(zip(unjudged, found, strict=True))
        for i in doubtful:
            known = prompts[i].judged
            places = self.expand.chosen(judged[i] if known is None else known)
            chosen[i] = replace(prompts[i], expanded=places)
        return chosen

    def _judge(self, prompts: Sequence[Sequence[Segment]], states: States) -> Sequence[Tensor]:
        """Per prompt, how much each passage has to do with it, ``(P,)`` in nats: how likely it
        alone makes what follows all passages, if nobody else judges."""
        if self.judge is not None:
            plain = self.backbone.plain
            return [self.judge(question_of(prompt, plain), _known(prompt)) for prompt in prompts]
        sizes = [num_known(prompt) for prompt in prompts]
        if not sum(sizes):
            return []
        alone = [
            self.plan(with_only(prompt, [place]), states)
            for prompt, size in zip(prompts, sizes, strict=True)
            for place in range(size)
        ]
        found = log_likelihoods(
            self.backbone,
            [self._prefix(plan.prefix) for plan in alone],
            [plan.placed for plan in alone],
            [plan.text for plan in alone],
            [plan.end for plan in alone],
        )
        return list(found.split(sizes))

    def _compose(self, plans: Sequence[Plan]) -> Slots | None:
        return compose([plan.placed for plan in plans], self.backbone)

    def _prefix(self, input_ids: Tensor) -> Prefix:
        """Exact KV of a leading text, from memory when it was read before."""
        key = tuple(input_ids.tolist())
        with self._lock:
            if (known := self._prefixes.get(key)) is not None:
                self._prefixes.move_to_end(key)
                return known
        prefix = self.backbone.prefix(input_ids)
        with self._lock:
            self._prefixes[key] = prefix
            if len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        return prefix


@dataclass(frozen=True)
class _Chosen:
    """What is to be read of a prompt.

    Attributes:
        readings: places of the passages that each row is to have; none: one row with all.
        judged: ``(P,)`` of its passages, where they have been.
        weights: logs, of its passages where they are read together; ``None``: all alike.
        expanded: places of those that are to be read as text, where there are ``readings`` in the
            one that has nothing else.
        states: gists of its passages, as they are to be read.
    """

    segments: Sequence[Segment]
    readings: Sequence[list[int]] = ()
    judged: Tensor | None = None
    weights: Sequence[float] | None = None
    expanded: Sequence[int] = ()
    states: States = field(default_factory=dict)

    @property
    def unjudged(self) -> bool:
        """Whether rows are to be chosen by what reading them shows."""
        return bool(self.readings) and self.judged is None

    @property
    def gist_weights(self) -> list[float] | None:
        """Of the passages that are read as gists."""
        if self.weights is None:
            return None
        return [w for place, w in enumerate(self.weights) if place not in self.expanded]

    @property
    def as_text(self) -> list[Known]:
        """Passages that are read as text."""
        known = _known(self.segments)
        alone = [r[0] for r in self.readings if len(r) == 1] if self.readings else self.expanded
        return [known[place] for place in self.expanded if place in alone]

    def rows(self) -> list[Sequence[Segment]]:
        """Segments of each row."""
        if not self.readings:
            return [as_text(self.segments, self.expanded) if self.expanded else self.segments]
        rows: list[Sequence[Segment]] = []
        for reading in self.readings:
            row = with_only(self.segments, reading)
            alone = len(reading) == 1 and reading[0] in self.expanded
            rows.append([Text(s.text) for s in row] if alone else row)
        return rows


def _known(segments: Sequence[Segment]) -> list[Known]:
    return [s for s in segments if isinstance(s, Known)]


def _owner(rows: Sequence[Sequence[Plan]]) -> list[int]:
    """The prompt of each row."""
    return [i for i, one in enumerate(rows) for _ in one]
