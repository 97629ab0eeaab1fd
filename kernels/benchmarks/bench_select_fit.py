"""``score_keys`` of ``select_fit`` against plain torch, which holds queries x keys in chunks.

    python kernels/benchmarks/bench_select_fit.py [--dry-run] [--out FILE]

One passage of 128 and 2048 tokens behind a prefix of 16, layers and heads of an 8B Llama; its
queries are those of the repeat pass, four heads per group and 12 tokens of instruction. In float32,
which is what compression asks for, and in bfloat16. The floor counts queries x keys twice, at
60 TFLOP/s in float32.

What it is to show: 4 times as fast as plain torch at 2048 tokens, without its 16 MB chunks.
"""

from __future__ import annotations

import functools

import torch
from common import LLAMA_8B, PEAK_FLOPS, TINY, Run, arguments, bound_implementation, rotated
from torch import Tensor

from gist_rag_kernels import score_keys

FLOPS = {torch.float32: 60e12, torch.bfloat16: PEAK_FLOPS}
"""An H100 multiplies float32 without its tensor cores; the data sheet says 67e12."""


def main() -> None:
    run = arguments("select_fit", __doc__)
    for tokens in (20,) if run.dry else (128, 2048):
        for dtype in FLOPS:
            measure(run, tokens, dtype)
    run.write()


def measure(run: Run, tokens: int, dtype: torch.dtype) -> None:
    layers, heads, size = TINY if run.dry else LLAMA_8B
    rows, num_queries, prefix = layers * heads, 4 * (tokens + 12), 16

    def inputs_of(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tuple(
            torch.randn(rows, n, size, device=run.device, dtype=dtype)
            for n in (num_queries, prefix, tokens)
        )

    given = inputs_of(0)
    scaling = size**-0.5
    with bound_implementation("reference"):
        truth = score_keys(*(t.float() for t in given), scaling)
    with bound_implementation("triton"):
        run.check(f"score_keys {tokens} {dtype}", score_keys(*given, scaling), truth, atol=1e-3)

    needed = float(sum(t.nbytes for t in given) + 4 * rows * (tokens + num_queries))
    pairs = rows * num_queries * (2.0 * tokens + prefix)
    inputs = rotated(inputs_of, needed, dry=run.dry)
    for implementation in ("triton", "reference"):
        with bound_implementation(implementation):
            calls = [functools.partial(score_keys, *some, scaling) for some in inputs]
            run.time(
                f"score_keys {implementation}",
                calls,
                floor_bytes=needed,
                floor_flops=pairs * 2 * size,
                peak_flops=FLOPS[dtype],
                tokens=tokens,
                dtype=str(dtype),
            )


if __name__ == "__main__":
    main()
