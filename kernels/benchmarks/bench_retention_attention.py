"""``retention_attention`` against SDPA with a dense bias and FlexAttention with the same score.

    python kernels/benchmarks/bench_retention_attention.py [--dry-run] [--out FILE]

One sequence of 4k and 16k tokens, heads of an 8B Llama. The dense bias, one number per query, key
and KV head, is repeated for the query heads: at 16k tokens it does not fit. The floor counts the
products of visible pairs only; the backward needs 2.5 times those of the forward.

What it is to show: forward and backward at the speed of causal FlexAttention without decay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from common import Run, arguments, both, bound_implementation, rotated
from torch import Tensor

from gist_rag_kernels import retention_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CHECKED = 256
"""Queries, the last ones, that are compared with the reference."""


def main() -> None:
    run = arguments("retention_attention", __doc__)
    for tokens in (24,) if run.dry else (4096, 16384):
        measure(run, tokens)
    run.write()


def measure(run: Run, tokens: int) -> None:
    heads, group, size = (1, 2, 16) if run.dry else (8, 4, 128)

    def inputs_of(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        like = dict(device=run.device, dtype=torch.bfloat16)
        query, grad = torch.randn(2, 1, heads * group, tokens, size, **like)
        key, value = torch.randn(2, 1, heads, tokens, size, **like)
        log_beta = torch.nn.functional.logsigmoid(
            6 + 2 * torch.randn(1, heads, tokens, device=run.device)
        )
        return [*(t.requires_grad_() for t in (query, key, value, log_beta)), grad]

    query, key, value, log_beta, grad = inputs_of(0)
    last = [query[:, :, -CHECKED:], key, value, log_beta, grad[:, :, -CHECKED:]]
    with bound_implementation("reference"):
        truth = both(retention_attention, *last)
    with bound_implementation("triton"):
        mine = both(retention_attention, *last)
    run.check(f"retention_attention {tokens}", mine, truth, atol=6e-2, rtol=6e-2)

    flops = 2.0 * tokens * (tokens + 1) * heads * group * size
    candidates: dict[str, tuple[str, Attention]] = {"triton": ("triton", retention_attention)}
    if tokens <= 4096:
        candidates["sdpa"] = ("reference", retention_attention)
    if not run.dry:  # FlexAttention on CPU needs a C++ compiler and shows nothing
        candidates["flex"] = ("triton", flex(tokens, group, decay=True))
        candidates["flex without decay"] = ("triton", flex(tokens, group, decay=False))
    needed = float(2 * (query.nbytes + key.nbytes) + log_beta.nbytes)
    inputs = rotated(inputs_of, needed, dry=run.dry)
    for name, (implementation, attention) in candidates.items():
        with bound_implementation(implementation):
            with torch.no_grad():
                calls = [functools.partial(attention, *some[:4]) for some in inputs]
                run.time(
                    f"forward {name}", calls, floor_bytes=needed, floor_flops=flops, tokens=tokens
                )
            calls = [functools.partial(both, attention, *some) for some in inputs]
            run.time(
                f"forward+backward {name}",
                calls,
                floor_bytes=3 * needed,
                floor_flops=3.5 * flops,
                tokens=tokens,
            )


def flex(tokens: int, group: int, *, decay: bool) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    blocks = create_block_mask(visible, None, None, tokens, tokens, device="cuda")

    @torch.compile
    def attention(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
        def fade(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + (q - k) * log_beta[b, h // group, k]

        out: Tensor = flex_attention(
            query,
            key,
            value,
            score_mod=fade if decay else None,
            block_mask=blocks,
            enable_gqa=True,
        )
        return out if decay else out + 0 * log_beta.sum()  # a gradient for every input

    return attention


if __name__ == "__main__":
    main()
