"""What it costs to forget one's thoughts: worked answers, read and written step by step.

    python benchmarks/quality/thoughts.py --task gsm8k_dev.jsonl.gz --reader runs/thinker \
        --light-thinker runs/thoughts --trim trim_kv-4x runs/gates --budgets 64 96 --out F

    plain             the model as it is, nothing forgotten
    full              the reader, which has learnt to write such answers, nothing forgotten
    closed            the reader; each thought is told as if it were the first
    light_thinker     earlier thoughts as their cache tokens
    trim_kv-4x@B      the reader; every KV head keeps B entries of all, those that its gate values
    recent@B          the reader; the first four and the newest (StreamingLLM, arXiv:2309.17453)

``nll`` is of the given answer's tokens behind its first thought, since before that nothing has been
forgotten; the share kept lies between ``closed`` and ``full``, which had the same training.
``kv_slots`` is how many entries those tokens see, on average, ``peak`` at most. ``contains`` is
whether the last number that is written greedily is the result. A file that is there is gone on
with.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.compressors.base import Thoughts
from gist_rag.compressors.light_thinker import LightThinker
from gist_rag.compressors.trim_kv import TrimKV, TrimmedCache
from gist_rag.evaluate import metrics
from gist_rag.evaluate.environment import environment
from gist_rag.losses import cross_entropy
from gist_rag.reader import Reader, load_backbone
from gist_rag.train.students import thoughts_of
from gist_rag.train.traces import Trace, load_traces

SINKS = 4
SLACK = 8
"""Entries above a budget at which a cache is trimmed."""
EVERY = 8
FREE = ("limit", "written", "dtype", "out")
"""Options that may differ when a file is gone on with."""
Row: TypeAlias = dict[str, Any]


class Memory(Protocol):
    """What has been read so far, or what is left of it.

    Attributes:
        size: entries of a head.
        room: tokens until the next are forgotten.
    """

    backbone: Backbone

    @property
    def size(self) -> int: ...

    @property
    def room(self) -> int: ...

    def read(self, ids: Tensor) -> Tensor:
        """Logits ``(V,)`` after some more tokens ``(Q,)``."""
        ...


class Everything:
    """A KV cache that forgets nothing."""

    room = 1 << 30

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.cache = backbone, DynamicCache(config=backbone.model.config)

    @property
    def size(self) -> int:
        return int(self.cache.get_seq_length())

    def read(self, ids: Tensor) -> Tensor:
        return self.backbone.extend(self.cache, self.size + torch.arange(len(ids)), input_ids=ids)


class Trimmed(TrimmedCache):
    @property
    def size(self) -> int:
        return int(self.positions.shape[2])

    @property
    def room(self) -> int:
        return self.budget + self.slack - self.size


class Recent(Trimmed):
    """Keeps the first tokens, which never fade, and the newest, as all others fade alike."""

    def __init__(self, backbone: Backbone, budget: int, slack: int) -> None:
        shape = (backbone.num_layers, backbone.num_heads)

        def gates(x: Tensor) -> Tensor:
            at = self.length - x.shape[1] + torch.arange(x.shape[1])
            return -(at >= SINKS).float().expand(*shape, -1)

        super().__init__(SimpleNamespace(backbone=backbone, gates=gates), budget, slack)


@dataclass(frozen=True)
class Asked:
    """A worked answer in tokens."""

    trace: Trace
    tokens: Thoughts

    @classmethod
    def of(cls, trace: Trace, backbone: Backbone) -> Asked:
        return cls(trace, thoughts_of(backbone, trace))

    @property
    def prompt(self) -> Tensor:
        return self.tokens.ids[: self.tokens.num_given]

    @property
    def answer(self) -> Tensor:
        return self.tokens.ids[self.tokens.num_given :]

    @property
    def thoughts(self) -> list[Tensor]:
        """The last one has the end token."""
        return [self.tokens.ids[begin:end] for begin, end in pairwise(self.tokens.ends)]

    def scored(self, losses: Tensor, sizes: Tensor) -> Row:
        """Figures from ``(A,)`` losses of the answer's tokens and what each of them sees."""
        later = slice(len(self.thoughts[0]), None)
        return {
            "nll": float(losses[later].mean()),
            "kv_slots": float(sizes[later].float().mean()),
            "peak": int(sizes.max()),
        }


def in_force(reader: Reader | None, rows: Tensor | None = None) -> AbstractContextManager[None]:
    return nullcontext() if reader is None else reader.active(rows)


def opened(memory: Memory, prompt: Tensor, reader: Reader | None) -> Tensor:
    rows = None if reader is None else reader.rows(prompt)[None]
    with in_force(reader, rows):
        return memory.read(prompt)


def told(memory: Memory, asked: Asked, reader: Reader | None) -> Row:
    """The given answer, in one pass for what is read between two times of forgetting."""
    logits, sizes = [opened(memory, asked.prompt, reader)[None]], [memory.size]
    rest = asked.answer[:-1]
    while len(rest):
        part, rest = rest[: memory.room], rest[memory.room :]
        sizes += [memory.size + 1 + i for i in range(len(part) - 1)]
        with in_force(reader), memory.backbone.recording() as stream:
            memory.read(part)
        logits.append(memory.backbone.logits(stream[-1][0]))
        sizes.append(memory.size)
    losses = cross_entropy(torch.cat(logits), asked.answer.to(logits[0].device)).cpu()
    return asked.scored(losses, torch.tensor(sizes))


def told_apart(backbone: Backbone, asked: Asked, reader: Reader) -> Row:
    """Each thought of the given answer right after the prompt."""
    losses, sizes = [], []
    for thought in asked.thoughts:
        ids = torch.cat((asked.prompt, thought))
        with in_force(reader, reader.rows(ids)[None]):
            hidden = backbone.encode(ids[None])[-1, 0]
        losses.append(nll(backbone, hidden[len(asked.prompt) - 1 : -1], thought))
        sizes.append(torch.arange(len(asked.prompt), len(ids)))
    return asked.scored(torch.cat(losses), torch.cat(sizes))


def told_squeezed(thinker: LightThinker, asked: Asked) -> Row:
    """The given answer in one pass, under the mask that decoding comes down to."""
    layout = thinker.thought_layout(asked.tokens)
    before = (~layout.is_gist).nonzero()[len(asked.prompt) :, 0] - 1  # who tells each token
    hidden = thinker.encode([asked.tokens.ids], [layout])[-1, 0, before]
    losses = nll(thinker.backbone, hidden, asked.answer)
    return asked.scored(losses, layout.mask()[before].sum(1))


def nll(backbone: Backbone, hidden: Tensor, targets: Tensor) -> Tensor:
    """``(A,)`` of tokens told by residual streams ``(A, E)``."""
    return cross_entropy(backbone.logits(hidden), targets.to(hidden.device)).cpu()


def written(memory: Memory, prompt: Tensor, reader: Reader | None, stop: Any) -> Iterator[int]:
    """Greedy tokens; the end token is the last one."""
    logits = opened(memory, prompt, reader)
    while True:
        token = int(logits.argmax())
        yield token
        if token in stop:
            return
        with in_force(reader):
            logits = memory.read(torch.tensor([token]))


def result_of(text: str) -> str:
    """The last number in a text, without its commas."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else ""


class Arms:
    """Asks a question in every arm."""

    def __init__(self, backbone: Backbone, reader: Reader, args: argparse.Namespace) -> None:
        self.backbone, self.reader, self.longest = backbone, reader, args.max_tokens
        thinker = make_compressor(args.light_thinker, backbone)
        assert isinstance(thinker, LightThinker)
        self.thinker, self.fingerprints = thinker, {args.light_thinker: thinker.fingerprint}
        self.memories: dict[str, Callable[[], Memory]] = {}
        for name in args.trim:
            gates = make_compressor(name, backbone)
            assert isinstance(gates, TrimKV)
            self.fingerprints[name] = gates.fingerprint
            for budget in args.budgets:
                self.memories[f"{name}@{budget}"] = partial(Trimmed, gates, budget, SLACK)
        for budget in args.budgets:
            self.memories[f"recent@{budget}"] = partial(Recent, backbone, budget, SLACK)

    def __call__(self, asked: Asked, write: bool) -> Iterator[Row]:
        """Rows of all arms; answers are written as well if they are to be."""
        backbone, reader = self.backbone, self.reader
        stop, question = backbone.stop_ids, {"id": asked.trace.question}
        whole = partial(Everything, backbone)
        speakers = {"plain": (whole, None), "full": (whole, reader)}
        speakers |= {name: (memory, reader) for name, memory in self.memories.items()}
        for arm, (memory, who) in speakers.items():
            row = question | {"arm": arm} | told(memory(), asked, who)
            tokens = written(memory(), asked.prompt, who, stop)
            yield row | (self._answer(asked, tokens) if write else {})
        yield question | {"arm": "closed"} | told_apart(backbone, asked, reader)
        row = question | {"arm": "light_thinker"} | told_squeezed(self.thinker, asked)
        tokens = self.thinker.decode(asked.prompt, max_tokens=self.longest)
        yield row | (self._answer(asked, tokens) if write else {})

    def _answer(self, asked: Asked, tokens: Iterator[int]) -> Row:
        ids = [*islice(tokens, self.longest)]
        text = self.backbone.tokenizer.decode(ids, skip_special_tokens=True)
        right = result_of(text) == result_of(asked.trace.answer)
        return {"answer": text, "written": len(ids), "contains": float(right)}


def summarise(rows: Sequence[Row]) -> dict[str, Row]:
    """Means per arm, and the share kept with its interval."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)

    def scores(arm: str, field: str) -> metrics.Scores:
        return np.array([row[field] for row in arms[arm] if field in row])

    out = {}
    for arm in arms:
        kept = [scores(name, "nll") for name in (arm, "closed", "full")]
        low, high = metrics.bootstrap(*kept)
        share = {"m_norm": metrics.kept(*kept), "m_norm_low": low, "m_norm_high": high}
        fields = ("nll", "kv_slots", "peak", "written", "contains")
        means = {f: float(found.mean()) for f in fields if len(found := scores(arm, f))}
        out[arm] = {"n": len(arms[arm])} | {k: round(v, 4) for k, v in (means | share).items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--reader", required=True, help="who was trained on such answers")
    parser.add_argument("--light-thinker", required=True)
    parser.add_argument("--trim", nargs="+", default=["trim_kv-4x"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--written", type=int, help="first questions to write answers to; all")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    backbone, reader = load_backbone(args.model, args.reader, dtype=args.dtype)
    assert reader is not None
    arms = Arms(backbone, reader, args)
    given = vars(args) | {"task": args.task.name}
    same = {k: v for k, v in given.items() if k not in FREE}
    same |= {"compressors": arms.fingerprints, "reader_fingerprint": reader.fingerprint}
    rows: list[Row] = []
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if differing := [k for k in same if before["meta"].get(k) != same[k]]:
            raise SystemExit(f"{args.out} was made with another {', '.join(differing)}")
        rows = before["predictions"]
    known = {row["id"] for row in rows}
    asked = [Asked.of(trace, backbone) for trace in load_traces(args.task)[: args.limit]]
    asked = [a for a in asked if len(a.thoughts) > 1]
    to_write = {a.trace.question for a in asked[: args.written]}
    asked = [a for a in asked if a.trace.question not in known]
    meta = same | {"dtype": args.dtype, **environment()}
    for number, one in enumerate(asked, 1):
        with torch.no_grad():
            rows += arms(one, one.trace.question in to_write)
        if number % EVERY == 0 or number == len(asked):
            result = {"meta": meta, "arms": summarise(rows), "predictions": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{number} of {len(asked)}", flush=True)
    for arm, row in summarise(rows).items():
        print(f"{arm:14}", *(f"{k} {v:g}" for k, v in row.items()))


if __name__ == "__main__":
    main()
