"""``evaluate``: the same questions through every arm, scored in three ways that must agree.

Scores are the gold answer's NLL per token, the share of questions whose gold answer is likelier per
token than nine others (``choice``), and what a greedy answer contains; a probe adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local, Prefix
from gist_rag.compose import Placed, Positions, arrange, compose, weighed
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.base import NestedConfig, nested
from gist_rag.errors import BadInput
from gist_rag.evaluate import metrics
from gist_rag.evaluate.config import TEXT_ARMS, Arm, EvaluateConfig, Gists
from gist_rag.evaluate.probes import make_probe
from gist_rag.evaluate.result import Result, check_result, describe
from gist_rag.evaluate.tasks import Example, Task, load_task
from gist_rag.focus import APART, best, log_likelihoods, log_weights
from gist_rag.likeness import Likeness, named_judge
from gist_rag.mixture import Mixture
from gist_rag.prompt import Known, question_of, rag_messages, rag_pieces, rag_segments
from gist_rag.reader import Reader, load_backbone
from gist_rag.store import pack, unpack
from gist_rag.types import GistState, Passage

GROUP = 16
"""Questions whose answers are generated together."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Reading:
    """One question in one arm: everything before the answer, and what it costs."""

    prefix: Prefix
    placed: Sequence[Placed]
    text: Local
    kv_slots: float
    source_tokens: int
    log_weight: float = 0.0


def evaluate(
    config: EvaluateConfig,
    progress: Progress | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run all arms.

    Args:
        progress: called after each group of questions with questions done and questions in all.
        keep: called after each group with the result so far, so that a run that is stopped has
            not been for nothing.
        before: the result of an earlier run, perhaps of fewer questions, of other arms or in
            another dtype. What it holds is not asked again, and is part of this result.

    Returns:
        ``{"meta", "arms", "predictions"}`` as written by ``gist-rag evaluate``.

    Raises:
        BadInput: an unusable task or arm, or a ``before`` of other settings or questions.
    """
    if before is not None:
        config = config.joined(check_result(before))
    task = _task(config)
    examples = task.examples
    backbone, reader = load_backbone(config.model, config.reader, dtype=config.dtype)
    arms = _Arms(backbone, config, reader)
    meta = describe(config, examples, backbone, reader, arms.fingerprints)
    result = Result(meta, config.all_arms, [e.id for e in examples], before)
    for first in range(0, len(examples), GROUP):
        group = examples[first : first + GROUP]
        with torch.no_grad():
            missing = {e.id: result.missing(e.id) for e in group}
            readings = {e.id: arms.readings(e, missing[e.id]) for e in group if missing[e.id]}
            for arm in config.all_arms:
                if asked := [e for e in group if arm in missing[e.id]]:
                    chosen = [readings[e.id][arm] for e in asked]
                    result.add(_predict(backbone, arm, task, asked, chosen, reader))
        if keep and readings:
            keep(result.written())
        if progress:
            progress(first + len(group), len(examples))
    return result.written()


def _task(config: EvaluateConfig) -> Task:
    """The questions that a config asks for."""
    chosen: dict[str, int] = {
        "num_passages": config.passages, "limit": config.limit, "seed": config.seed
    }  # fmt: skip
    if config.probe is not None:
        return make_probe(config.probe, file=config.task, **chosen)
    if config.task is None:
        raise BadInput("neither a task nor a probe; give one of them")
    return Task(load_task(config.task, **chosen))


_States: TypeAlias = dict[Gists, list[GistState]]


class _Arms:
    """Builds what each arm reads. Passages are encoded once for all compressors that can share."""

    def __init__(self, backbone: Backbone, config: EvaluateConfig, reader: Reader | None) -> None:
        self.backbone = backbone
        self.config = config
        self.reader = reader
        arms = {text: Arm.parse(text, config.ratio) for text in config.all_arms}
        names = dict.fromkeys(a.name for a in arms.values() if a.name not in TEXT_ARMS)
        self.compressors = {name: self._compressor(name) for name in names}
        self.fingerprints = {name: c.fingerprint for name, c in self.compressors.items()}
        own = {name: (c.config.ratio,) for name, c in self.compressors.items()}
        self.arms = {text: self._settled(arm, own.get(arm.name, ())) for text, arm in arms.items()}
        self._prefixes: dict[str, Prefix] = {}
        self._likeness = Likeness.of(named_judge(config.judge))

    def _compressor(self, name: str) -> Compressor:
        if name == "reuse":
            return make_compressor("full", self.backbone)
        own = self.config.settings if name == self.config.compressor else {}
        return make_compressor(name, self.backbone, own)

    def _settled(self, arm: Arm, own: tuple[float, ...]) -> Arm:
        """With ratios that its compressor takes, where it has one; ``own``, if it names none."""
        if arm.name in TEXT_ARMS:
            return arm
        ratios = own if arm.name == "reuse" else arm.ratios or own
        self.compressors[arm.name].set_ratio(*ratios)
        return replace(arm, ratios=ratios)

    def readings(self, example: Example, names: Sequence[str]) -> dict[str, list[_Reading]]:
        """Per arm, what a question reads: one prompt, or several that answer together."""
        arms = {name: self.arms[name] for name in names}
        ids = [self.backbone.tokenize(text) for text in example.passages]
        source = sum(len(i) for i in ids)
        states = self._states(ids, {a.gists for a in arms.values() if a.name not in TEXT_ARMS})
        judged = self._judged(example, states, {a.gists for a in arms.values() if a.chooses})
        out = {}
        for name, arm in arms.items():
            if arm.name not in TEXT_ARMS:
                found = judged[arm.gists] if arm.chooses else None
                out[name] = self._gists(example, states[arm.gists], source, arm, found)
            elif arm.name == "truncated":
                cut = [max(1, round(len(i) / arm.ratios[0])) for i in ids]
                texts = [self._text(i[:n]) for i, n in zip(ids, cut, strict=True)]
                out[name] = [self._plain(example.question, texts, sum(cut), source)]
            elif arm.name == "full":
                out[name] = [self._plain(example.question, example.passages, source, source)]
            else:
                out[name] = [self._plain(example.question, (), 0, source)]
        return out

    def _states(self, ids: Sequence[Tensor], wanted: Set[Gists]) -> _States:
        """Gists of each kind; those that differ in their ratios only come from one pass where the
        method can do that."""
        shared: Tensor | None = None
        out: _States = {}
        for name, compressor in self.compressors.items():
            asked = [gists for gists in wanted if gists[0] == name]
            passes = {ratios for _, ratios in asked}
            if isinstance(compressor.config, NestedConfig) and asked:
                passes = {tuple(sorted(set().union(*passes)))}
            for ratios in passes:
                compressor.set_ratio(*ratios)
                if compressor.reads_tokens_only:
                    shared = compressor.encode(ids) if shared is None else shared
                    states = compressor.distil(shared, ids)
                else:
                    states = compressor.compress(ids)
                if codec := self.config.codec:
                    states = [unpack(pack(s, codec), self.backbone.device) for s in states]
                for gists in asked:
                    if set(gists[1]) <= set(ratios):
                        out[gists] = [_only(s, ratios, gists[1]) for s in states]
        return out

    def _text(self, ids: Tensor) -> str:
        text: str = self.backbone.tokenizer.decode(ids)
        return text

    def _plain(self, question: str, texts: Sequence[str], slots: float, source: int) -> _Reading:
        ids = self.backbone.tokenize(self.backbone.render(rag_messages(question, texts)))
        begins = self.reader.begins(ids) if self.reader else len(ids)
        cut = min(begins, len(ids) - 1)
        prefix = self.backbone.prefix(ids[:cut])  # read once for scores and generation alike
        return _Reading(prefix, (), Local.after(ids[cut:], len(prefix), 0), slots, source)

    def _gists(
        self,
        example: Example,
        states: Sequence[GistState],
        source: int,
        arm: Arm,
        likelihoods: Tensor | None,
    ) -> list[_Reading]:
        """All passages as gists, or what the arm chooses of them."""
        everything = list(range(len(states)))
        as_text = [] if likelihoods is None else best(likelihoods, arm.expanded)
        if likelihoods is None or arm.focus is None:
            if arm.budget:
                fitted = dict(enumerate(arm.budget.chosen(states, likelihoods)))
                kept = {place: state for place, state in fitted.items() if state is not None}
                everything, states = [*kept], [kept.get(i, s) for i, s in enumerate(states)]
            row = self._reading(example, states, everything, source, as_text)
            if likelihoods is not None and arm.weighs:
                logs = zip(everything, log_weights(likelihoods[everything]), strict=True)
                gists = [weight for place, weight in logs if place not in as_text]
                row = replace(row, placed=weighed(row.placed, gists))
            return [row]
        readings, weights = arm.focus.readings(likelihoods)
        positions = APART if arm.focus.apart else None
        out = []
        for places, weight in zip(readings, weights.tolist(), strict=True):
            expanded = as_text if len(places) == 1 or not arm.focus.apart else ()
            row = self._reading(example, states, places, source, expanded, positions)
            out.append(replace(row, log_weight=weight))
        return out

    def _reading(
        self,
        example: Example,
        states: Sequence[GistState],
        places: Sequence[int],
        source: int,
        as_text: Sequence[int] = (),
        positions: Positions | None = None,
    ) -> _Reading:
        """Passages at ``places`` without the others, as gists unless they are to be text."""
        example = replace(example, passages=tuple(example.passages[i] for i in places))
        kept = {n: states[i] for n, i in enumerate(places) if i not in as_text}
        return self._mixed(example, kept, source, positions)

    def _judged(self, example: Example, states: _States, wanted: Set[Gists]) -> dict[Gists, Tensor]:
        """How much each passage has to do with the question, ``(P,)`` in nats, for the gists of
        those arms that ask; an embedder judges texts, so it says the same for all."""
        if self._likeness is None or not wanted:
            return {gists: self._likelihoods(example, states[gists]) for gists in wanted}
        passages = [*map(Passage, example.passages)]
        prompt = rag_segments(example.question, passages, self.backbone.render)
        known = [segment for segment in prompt if isinstance(segment, Known)]
        judged = self._likeness(question_of(prompt, self.backbone.plain), known)
        return dict.fromkeys(wanted, judged)

    def _likelihoods(self, example: Example, states: Sequence[GistState]) -> Tensor:
        alone = [self._reading(example, states, [place], 0) for place in range(len(states))]
        return log_likelihoods(
            self.backbone,
            [r.prefix for r in alone],
            [r.placed for r in alone],
            [r.text for r in alone],
            [len(r.text.ids) for r in alone],
        )

    def _mixed(
        self,
        example: Example,
        states: Mapping[int, GistState],
        source: int,
        positions: Positions | None = None,
    ) -> _Reading:
        """Some passages as gists, the others as text."""
        given = [None if place in states else t for place, t in enumerate(example.passages)]
        slots = sum(s.mean_slots for s in states.values())
        slots += sum(len(self.backbone.tokenize(t)) for t in given if t is not None)
        if not states:
            return self._plain(example.question, example.passages, slots, source)
        before, pieces = rag_pieces(example.question, given, self.backbone.render)
        prefix = self._prefixes.get(before)
        if prefix is None:
            prefix = self.backbone.prefix(self.backbone.tokenize(before))
            if given[0] is None:  # else there is a passage in it, and it will not come again
                self._prefixes[before] = prefix
        rest = iter(states.values())
        following = [next(rest) if p is None else self.backbone.tokenize(p) for p in pieces]
        placed, text = arrange(following, len(prefix), positions or self.config.positions)
        return _Reading(prefix, placed, text, slots, source)


def _only(state: GistState, ratios: Sequence[float], wanted: Sequence[float]) -> GistState:
    """A state at some of its ratios."""
    levels = zip(ratios, (state, *state.coarser), strict=True)
    return nested([level for ratio, level in levels if ratio in wanted])


def _predict(
    backbone: Backbone,
    arm: str,
    task: Task,
    examples: Sequence[Example],
    readings: Sequence[Sequence[_Reading]],
    reader: Reader | None,
) -> list[dict[str, Any]]:
    """Scores and greedy answers of a group of questions in one arm."""
    rows = [row for reading in readings for row in reading]
    owner = [i for i, reading in enumerate(readings) for _ in reading]
    weights = torch.tensor([row.log_weight for row in rows], device=backbone.device)
    context = Context([r.prefix for r in rows], compose([r.placed for r in rows], backbone))
    opened = backbone.open(context, [r.text for r in rows], reader, Mixture(owner, weights))
    doubts = opened.entropy.tolist()
    answers = backbone.write(opened, task.new_tokens)
    out = []
    for example, reading, answer, doubt in zip(examples, readings, answers, doubts, strict=True):
        losses = answer_losses(backbone, reading, (example.answers[0], *example.choices), reader)
        out.append(
            {
                "id": example.id,
                "arm": arm,
                "answer": answer,
                "doubt": round(doubt, 4),
                "gold": example.answers[0],
                "nll": losses[0],
                "choice": float(losses[0] < min(losses[1:], default=float("inf"))),
                "em": metrics.exact_match(answer, example.answers),
                "contains": metrics.contains(answer, example.answers),
                "f1": metrics.f1(answer, example.answers),
                "kv_slots": sum(row.kv_slots for row in reading),
                "source_tokens": reading[0].source_tokens,
                **({"scores": dict(scores)} if (scores := task.score(example, answer)) else {}),
            }
        )
    return out


def answer_losses(
    backbone: Backbone,
    readings: Sequence[_Reading],
    answers: Sequence[str],
    reader: Reader | None = None,
) -> list[float]:
    """NLL per token of several answers, under the readings' mixture (``gist_rag.mixture``)."""
    ends = torch.tensor([min(backbone.stop_ids)])
    targets = [torch.cat((backbone.tokenize(a), ends)) for a in answers]
    said = torch.stack([_log_probs(backbone, r, targets, reader) for r in readings])  # (R, A)
    weights = torch.tensor([r.log_weight for r in readings]).log_softmax(0)
    lengths = torch.tensor([len(t) for t in targets])
    losses: list[float] = (-(said + weights[:, None]).logsumexp(0) / lengths).tolist()
    return losses


def _log_probs(
    backbone: Backbone, reading: _Reading, branches: Sequence[Tensor], reader: Reader | None
) -> Tensor:
    """``(A,)`` of several answers, read in one pass as branches behind the same question.

    A branch's tokens see the question and their own branch; its positions go on from the question.
    """
    question, fed = reading.text, [b[:-1] for b in branches]
    start = int(question.positions[-1]) + 1
    seen = len(reading.placed)
    local = Local.join([question, *(Local.after(b, start, seen) for b in fed)])

    width, size = len(reading.prefix), len(local.ids)
    branch = torch.cat([torch.full((len(b),), i) for i, b in enumerate((question.ids, *fed))])
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    visible = causal & ((branch[None] == 0) | (branch[:, None] == branch[None]))
    mask = torch.cat((torch.ones(size, width, dtype=torch.bool), visible), dim=1)

    context = Context([reading.prefix], compose([reading.placed], backbone))
    logits = backbone.read(context, [local], mask=mask[None, None], adapter=reader)[0]
    logits = logits.float().log_softmax(-1)
    sums, at = [], len(question.ids)
    for target in branches:
        rows = torch.cat(
            (torch.tensor([len(question.ids) - 1]), at + torch.arange(len(target) - 1))
        )
        sums.append(logits[rows, target.to(logits.device)].sum())
        at += len(target) - 1
    return torch.stack(sums).cpu()
