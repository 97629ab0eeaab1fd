"""``quantise`` and ``dequantise`` against the copy bandwidth, plain torch and ``torch.compile``.

    python kernels/benchmarks/bench_kv_quant.py [--dry-run] [--out FILE]

Ragged keys and values of 5 and 50 passages of an 8B Llama (32 layers, 8 KV heads, D 128), 16 slots
per passage, layer and head. The floor is every number read once and every byte written once, at
the measured copy bandwidth.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from common import LLAMA_8B, TINY, Run, arguments, bound_implementation, passage_rows, rotated
from torch import Tensor

from gist_rag_kernels import PackedKV, dequantise, quantise

SETTINGS: tuple[dict[str, Any], ...] = (
    dict(bits=8),
    dict(bits=4),
    dict(bits=4, key_group=32, value_group=32),
)


def main() -> None:
    run = arguments("kv_quant", __doc__)
    shape = TINY if run.dry else LLAMA_8B
    for passages in (1,) if run.dry else (5, 50):
        for settings in SETTINGS:
            measure(run, shape, passages, settings)
    run.write()


def measure(run: Run, shape: tuple[int, int, int], passages: int, settings: dict[str, Any]) -> None:
    layers, heads, size = shape
    mean = 4 if run.dry else 16

    def inputs_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = passage_rows(passages, layers * heads, mean, generator).flatten()
        rows = torch.tensor([0, *lengths.tolist()]).cumsum(0).to(run.device)
        slots = int(lengths.sum())
        torch.manual_seed(seed)
        keys, values = torch.randn(2, slots, size, device=run.device, dtype=torch.bfloat16)
        return keys, values, rows

    keys, values, rows = inputs_of(0)
    with bound_implementation("reference"):
        truth = quantise(keys, values, rows, **settings)
        numbers = dequantise(truth, torch.bfloat16)
    with bound_implementation("triton"):
        run.check(
            f"quantise {settings}",
            stored(quantise(keys, values, rows, **settings)),
            stored(truth),
            0,
        )
        ours = dequantise(truth, torch.bfloat16)
        run.check(f"dequantise {settings}", ours, numbers, atol=0, rtol=2.0**-7)

    needed = float(keys.nbytes + values.nbytes + sum(t.nbytes for t in truth.tensors()))
    inputs = rotated(inputs_of, needed, dry=run.dry)
    facts = dict(passages=passages, slots=len(keys), **settings)
    for implementation in (
        ("triton", "reference") if run.dry else ("triton", "reference", "compile")
    ):
        with bound_implementation("triton" if implementation == "triton" else "reference"):
            pack, unpack = functools.partial(quantise, **settings), dequantise
            if implementation == "compile":
                pack, unpack = torch.compile(pack), torch.compile(dequantise)
            calls = [functools.partial(pack, *given) for given in inputs]
            run.time(f"quantise {implementation}", calls, floor_bytes=needed, **facts)
            kept = [call() for call in calls]
            backward = [functools.partial(unpack, p, torch.bfloat16) for p in kept]
            run.time(f"dequantise {implementation}", backward, floor_bytes=needed, **facts)


def stored(packed: PackedKV) -> list[Tensor]:
    return packed.tensors()


if __name__ == "__main__":
    main()
