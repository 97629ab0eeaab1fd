"""Time to the first token on a GPU at the size of real models: text, reuse and gists.

    python benchmarks/serving/first_token.py [--shapes llama-3.1-8b,...] [--out FILE] [--dry-run]

Random weights in bf16: time depends on shapes alone. A prompt is 32 tokens of instruction (cached,
as in use), passages of 128 tokens and a question of 32. Four ways to its first token:

text    the model reads everything
reuse   the passages' uncompressed keys and values, in pinned host memory, are loaded and read
gists   the same at 4x, 8x and 16x, heads ragged as one budget makes them, bf16 and int8
graph   the read of the gists again, as one CUDA graph: what launches cost

Loading is counted and stands apart from composing and reading. The floor is what the chip needs at
least: the weights read once or the tokens' products, whichever takes longer, and the gists' way
over PCIe. Correctness first: a passage that is not compressed reads as its text does, or nothing is
timed. A dry run does everything but timing, with a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gist_rag.backbone import Backbone, Context, Local, Prefix
from gist_rag.compose import compose, place
from gist_rag.compressors import make_compressor
from gist_rag.evaluate.environment import environment
from gist_rag.store import pack, unpack
from gist_rag.types import GistState, PackedState

COMMON = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **COMMON,
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "qwen2.5-7b": {
        **COMMON,
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
}
TINY = {
    **COMMON,
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
HBM, PCIE, FLOPS = 3.35e12, 55e9, 800e12
"""Bytes per second of an H100's memory and of its PCIe 5 link, and what its products reach."""
INSTRUCTION, PASSAGE, QUESTION = 32, 128, 32
STORED = [(1, "bf16"), *((ratio, codec) for ratio in (4, 8, 16) for codec in ("bf16", "int8"))]
"""Ratios and codecs of the gists; at 1 they are what is reused."""
REPEATS, WARM = 7, 2
BOUND = 0.05
"""Largest difference between gist and text, as a share of the logits' range: the engine's gate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which models")
    parser.add_argument("--passages", default="5,10,50,100")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, no timing")
    parser.add_argument("--out", type=Path, help="result file")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU to time on; --dry-run checks this script without one")
    rows: list[dict[str, Any]] = []
    for name in ("tiny",) if args.dry_run else args.shapes.split(","):
        counts = (2, 3) if args.dry_run else tuple(map(int, args.passages.split(",")))
        bench = Bench(name, make_backbone(TINY if args.dry_run else SHAPES[name]), args.dry_run)
        bench.check()
        for row in bench.rows(counts):
            print(json.dumps(row), flush=True)
            rows.append(row)
        del bench
        torch.cuda.empty_cache()
    if args.out:
        meta = {**environment(), "dry_run": args.dry_run, "repeats": REPEATS}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"meta": meta, "results": rows}, indent=1) + "\n")


def make_backbone(shape: dict[str, Any]) -> Backbone:
    """A model with random weights, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(bos_token_id=0, eos_token_id=0, **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    return Backbone(model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"))


@dataclass
class Bench:
    """One model's rows."""

    name: str
    backbone: Backbone
    dry: bool

    def ids(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(
            1, self.backbone.model.config.vocab_size, (count,), generator=generator
        )

    @torch.no_grad()
    def check(self) -> None:
        """An uncompressed passage reads as its text does."""
        passage, question = self.ids(PASSAGE, 1), self.ids(QUESTION, 2)
        [state] = make_compressor("full", self.backbone).compress([passage])
        placed, end = place([state], 0, "sequence")
        nothing = self.backbone.prefix(passage[:0])
        slots = compose([placed], self.backbone)
        ours = self.backbone.read(Context([nothing], slots), [Local.after(question, end, 1)])
        everything = Local.after(torch.cat((passage, question)), 0, 0)
        plain = self.backbone.read(Context([nothing], None), [everything], num_logits=QUESTION)
        error = float((ours - plain).abs().max() / (plain.max() - plain.min()))
        if not error <= BOUND:
            raise SystemExit(
                f"{self.name}: gists differ from text by {error:.1e}; nothing is timed"
            )

    @torch.no_grad()
    def rows(self, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Text first for each number of passages, then what is set against it."""
        passages = [self.ids(PASSAGE, 10 + i) for i in range(max(counts))]
        full = make_compressor("full", self.backbone)
        states = [state for ids in passages for state in full.compress([ids])]
        prefix = self.backbone.prefix(self.ids(INSTRUCTION, 3))
        for count in counts:
            text = self.text(passages[:count], prefix)
            yield text
            for ratio, codec in STORED:
                kept = [ragged(state, ratio, i) for i, state in enumerate(states[:count])]
                stored = [pinned(pack(state, codec)) for state in kept]
                row = self.gists(stored, prefix, text["tokens"])
                row |= {"arm": "reuse" if ratio == 1 else "gists", "ratio": ratio, "codec": codec}
                if not self.dry:
                    row["speedup"] = round(text["ttft_ms"] / row["ttft_ms"], 2)
                yield {"shape": self.name, "passages": count, **row}

    def text(self, passages: Sequence[Tensor], prefix: Prefix) -> dict[str, Any]:
        whole = torch.cat((*passages, self.ids(QUESTION, 4)))
        local = Local.after(whole, len(prefix), 0)
        read = partial(self.backbone.open, Context([prefix], None), [local])
        tokens = sum(map(len, passages))
        row = {"shape": self.name, "passages": len(passages), "arm": "text", "tokens": tokens}
        floor = max(self.weight_bytes / HBM, 2 * self.weights * len(whole) / FLOPS)
        return row | self.timed({"read": read}) | {"floor_ms": round(floor * 1e3, 3)}

    def gists(self, stored: Sequence[PackedState], prefix: Prefix, tokens: int) -> dict[str, Any]:
        """Load, compose and read, each timed; then the read as a CUDA graph."""
        backbone, question = self.backbone, self.ids(QUESTION, 4)
        kept: dict[str, Any] = {}

        def load() -> None:
            kept["states"] = [unpack(state, backbone.device) for state in stored]

        def put() -> None:
            placed, kept["end"] = place(kept["states"], len(prefix), "sequence")
            kept["slots"] = compose([placed], backbone)

        def read() -> None:
            local = Local.after(question, kept["end"], len(stored))
            backbone.open(Context([prefix], kept["slots"]), [local])

        row = {"tokens": tokens, "bytes": sum(state.num_bytes for state in stored)}
        row |= self.timed({"load": load, "compose": put, "read": read})
        floor = max(self.weight_bytes / HBM, 2 * self.weights * QUESTION / FLOPS)
        row["floor_ms"] = round((floor + row["bytes"] / PCIE) * 1e3, 3)
        if not self.dry:
            local = Local.after(question, kept["end"], len(stored))
            row |= self.graph(Context([prefix], kept["slots"]), local)
        return row

    def graph(self, context: Context, local: Local) -> dict[str, Any]:
        """The read captured once and replayed."""
        backbone = self.backbone
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm up where nothing is captured
                backbone._hidden(backbone._start(context, [local]))
            torch.cuda.current_stream().wait_stream(side)
            step, graph = backbone._start(context, [local]), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                backbone._logits(backbone._hidden(step), 1)
        except RuntimeError as error:  # a step that the capture does not allow
            return {"graph": f"not captured: {str(error).splitlines()[0]}"}
        return {"graph_read_ms": self.timed({"read": graph.replay})["read_ms"]}

    def timed(self, steps: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Medians of each step and of all, in milliseconds; the step alone in a dry run."""
        runs: list[list[float]] = []
        for _ in range(1 if self.dry else WARM + REPEATS):
            times = []
            for step in steps.values():
                synchronise()
                started = time.perf_counter()
                step()
                synchronise()
                times.append((time.perf_counter() - started) * 1e3)
            runs.append(times)
        if self.dry:
            return {}
        kept = runs[WARM:]
        each = {
            f"{name}_ms": round(statistics.median(times), 3)
            for name, times in zip(steps, zip(*kept, strict=True), strict=True)
        }
        return each | {"ttft_ms": round(statistics.median(map(sum, kept)), 3)}

    @property
    def weights(self) -> int:
        """Of what each token is multiplied with: all but the table of embeddings."""
        model = self.backbone.model
        embeddings = model.get_input_embeddings().weight.numel()
        return sum(p.numel() for p in model.parameters()) - embeddings

    @property
    def weight_bytes(self) -> int:
        return self.weights * self.backbone.model.dtype.itemsize


def ragged(state: GistState, ratio: int, seed: int) -> GistState:
    """A state of ``1 / ratio`` of the slots, spread over heads as one budget spreads them: most
    keep little, a few much."""
    if ratio == 1:
        return state
    generator = torch.Generator().manual_seed(seed)
    rows = len(state.rows) - 1
    weight = torch.rand(rows, generator=generator).pow(3).to(state.rows.device)
    score = torch.rand(state.num_slots, generator=generator).to(state.rows.device)
    score = score.log() / weight[state.row_of_slot()].clamp(min=1e-6)
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep[score.topk(state.num_slots // ratio).indices] = True
    return state.select(keep)


def pinned(packed: PackedState) -> PackedState:
    """Where a copy to the GPU goes at full speed."""
    if not torch.cuda.is_available():
        return packed
    tensors = {name: tensor.pin_memory() for name, tensor in packed.tensors.items()}
    return PackedState(**{**vars(packed), "tensors": tensors})


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
