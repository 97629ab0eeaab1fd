"""What each arm of ``evaluate`` reads of a question; passages are encoded once for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from gist_rag.backbone import Backbone, Local, Prefix
from gist_rag.compose import Placed, Positions, arrange, weighed
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.base import NestedConfig, nested
from gist_rag.evaluate.config import TEXT_ARMS, Arm, EvaluateConfig, Gists
from gist_rag.evaluate.tasks import Example
from gist_rag.focus import APART, best, log_likelihoods, log_weights
from gist_rag.likeness import Likeness, named_judge
from gist_rag.prompt import Known, question_of, rag_messages, rag_pieces, rag_segments
from gist_rag.reader import Reader
from gist_rag.store import pack, unpack
from gist_rag.types import GistState, Passage


@dataclass(frozen=True)
class Reading:
    """One question in one arm: everything before the answer, and what it costs."""

    prefix: Prefix
    placed: Sequence[Placed]
    text: Local
    kv_slots: float
    source_tokens: int
    log_weight: float = 0.0


_States: TypeAlias = dict[Gists, list[GistState]]


class Arms:
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

    def readings(self, example: Example, names: Sequence[str]) -> dict[str, list[Reading]]:
        """Per arm, what a question reads: one prompt, or several that answer together."""
        arms = {name: self.arms[name] for name in names}
        ids = [self.backbone.tokenize(text) for text in example.passages]
        source = sum(len(i) for i in ids)
        states = self.states(ids, {a.gists for a in arms.values() if a.name not in TEXT_ARMS})
        judged = self.judged(example, states, {a.gists for a in arms.values() if a.chooses})
        out = {}
        for name, arm in arms.items():
            if arm.name not in TEXT_ARMS:
                found = judged[arm.gists] if arm.chooses else None
                out[name] = self.gists(example, states[arm.gists], source, arm, found)
            elif arm.name == "truncated":
                cut = [max(1, round(len(i) / arm.ratios[0])) for i in ids]
                texts = [self._text(i[:n]) for i, n in zip(ids, cut, strict=True)]
                out[name] = [self._plain(example.question, texts, sum(cut), source)]
            elif arm.name == "full":
                out[name] = [self._plain(example.question, example.passages, source, source)]
            else:
                out[name] = [self._plain(example.question, (), 0, source)]
        return out

    def states(self, ids: Sequence[Tensor], wanted: Set[Gists]) -> _States:
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

    def _plain(self, question: str, texts: Sequence[str], slots: float, source: int) -> Reading:
        ids = self.backbone.tokenize(self.backbone.render(rag_messages(question, texts)))
        begins = self.reader.begins(ids) if self.reader else len(ids)
        cut = min(begins, len(ids) - 1)
        prefix = self.backbone.prefix(ids[:cut])  # read once for scores and generation alike
        return Reading(prefix, (), Local.after(ids[cut:], len(prefix), 0), slots, source)

    def gists(
        self,
        example: Example,
        states: Sequence[GistState],
        source: int,
        arm: Arm,
        likelihoods: Tensor | None,
    ) -> list[Reading]:
        """All passages as gists, or what the arm chooses of them."""
        everything = list(range(len(states)))
        as_text = [] if likelihoods is None else best(likelihoods, arm.expanded)
        if likelihoods is None or arm.focus is None:
            if arm.budget:
                fitted = dict(enumerate(arm.budget.chosen(states, likelihoods)))
                kept = {place: state for place, state in fitted.items() if state is not None}
                everything, states = [*kept], [kept.get(i, s) for i, s in enumerate(states)]
            row = self.reading(example, states, everything, source, as_text)
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
            row = self.reading(example, states, places, source, expanded, positions)
            out.append(replace(row, log_weight=weight))
        return out

    def reading(
        self,
        example: Example,
        states: Sequence[GistState],
        places: Sequence[int],
        source: int,
        as_text: Sequence[int] = (),
        positions: Positions | None = None,
    ) -> Reading:
        """Passages at ``places`` without the others, as gists unless they are to be text."""
        example = replace(example, passages=tuple(example.passages[i] for i in places))
        kept = {n: states[i] for n, i in enumerate(places) if i not in as_text}
        return self._mixed(example, kept, source, positions)

    def judged(self, example: Example, states: _States, wanted: Set[Gists]) -> dict[Gists, Tensor]:
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
        alone = [self.reading(example, states, [place], 0) for place in range(len(states))]
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
    ) -> Reading:
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
        return Reading(prefix, placed, text, slots, source)


def _only(state: GistState, ratios: Sequence[float], wanted: Sequence[float]) -> GistState:
    """A state at some of its ratios."""
    levels = zip(ratios, (state, *state.coarser), strict=True)
    return nested([level for ratio, level in levels if ratio in wanted])
