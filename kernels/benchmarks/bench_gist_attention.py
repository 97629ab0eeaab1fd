"""``gist_attention`` against SDPA with a dense mask and FlexAttention with the same block mask.

    python kernels/benchmarks/bench_gist_attention.py [--dry-run] [--out FILE]

One sequence of 4k and 16k tokens with a gist after every r-th (r 4 and 8), heads of an 8B Llama. A
slot sees the raw tokens of the last 128, all earlier gists and 128 sinks, as in UniGist. The floor
counts the products of visible pairs only; the backward needs 2.5 times those of the forward.

What it is to show: forward at least 3 times as fast as SDPA with a mask at 16k tokens and r = 4,
and ahead of FlexAttention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from common import Run, arguments, both, bound_implementation, rotated
from torch import Tensor

from gist_rag_kernels import Shift, gist_attention, gist_shift, visibility
from gist_rag_kernels.gist_attention.shift import as_prefix

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Vectors = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    run = arguments("gist_attention", __doc__)
    for tokens in (24,) if run.dry else (4096, 16384):
        for ratio in (4, 8):
            measure(run, tokens, ratio)
    run.write()


def measure(run: Run, tokens: int, ratio: int) -> None:
    window, prefix = (8, 3) if run.dry else (128, 128)
    heads, group, size = (1, 2, 16) if run.dry else (8, 4, 128)
    given = unigist(tokens, ratio, window, run.device)
    slots = given[0].shape[1]
    shift = gist_shift(*given, prefix)

    def inputs_of(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        like = dict(device=run.device, dtype=torch.bfloat16)
        query, grad = torch.randn(2, 1, heads * group, slots, size, **like)
        key, value = torch.randn(2, 1, heads, slots, size, **like)
        return [query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad]

    query, key, value, grad = inputs_of(0)
    with bound_implementation("reference"):
        truth = both(functools.partial(ours, given, prefix, None), query, key, value, grad)
    with bound_implementation("triton"):
        mine = both(functools.partial(ours, given, prefix, shift), query, key, value, grad)
    run.check(f"gist_attention {tokens}/{ratio}", mine, truth, atol=6e-2, rtol=6e-2)

    mask = visibility(*given, as_prefix(prefix, given[0]))[:, None]
    flops = 4.0 * int(mask.sum()) * heads * group * size
    candidates: dict[str, Attention] = {
        "triton": functools.partial(ours, given, prefix, shift),
        "sdpa": functools.partial(dense, mask),
    }
    if not run.dry:  # FlexAttention on CPU needs a C++ compiler and shows nothing
        candidates["flex"] = flex(given, prefix)
    needed = float(2 * (query.nbytes + key.nbytes))
    facts = dict(tokens=tokens, ratio=ratio, slots=slots, visible=float(mask.float().mean()))
    inputs = rotated(inputs_of, needed, dry=run.dry)
    for name, attention in candidates.items():
        with bound_implementation("triton"):
            with torch.no_grad():
                calls = [functools.partial(attention, *some[:3]) for some in inputs]
                run.time(f"forward {name}", calls, floor_bytes=needed, floor_flops=flops, **facts)
            calls = [functools.partial(both, attention, *some) for some in inputs]
            run.time(
                f"forward+backward {name}",
                calls,
                floor_bytes=3 * needed,
                floor_flops=3.5 * flops,
                **facts,
            )


def unigist(tokens: int, ratio: int, window: int, device: torch.device) -> Vectors:
    """A gist after every ``ratio`` tokens; windows in units of tokens, all gists visible."""
    unit = torch.arange(tokens + tokens // ratio, device=device) // (ratio + 1)
    slot = torch.arange(len(unit), device=device)
    is_gist = slot % (ratio + 1) == ratio
    local_from = (unit - window // ratio).clamp(min=0) * (ratio + 1)
    return is_gist[None], local_from[None], torch.zeros_like(slot)[None]


def ours(
    given: Vectors, prefix: int, shift: Shift | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return gist_attention(query, key, value, *given, prefix, shift=shift)


def dense(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads are repeated, since of SDPA's kernels only the slowest takes a mask and groups."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def flex(given: Vectors, prefix: int) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    is_gist, local_from, gist_from = (vector[0] for vector in given)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first = torch.where(is_gist[k], gist_from[q], local_from[q])
        return (k <= q) & ((k >= first) | (k < prefix))

    size = len(is_gist)
    blocks = create_block_mask(visible, None, None, size, size, device=str(is_gist.device))
    compiled = torch.compile(flex_attention)
    return functools.partial(compiled, block_mask=blocks, enable_gqa=True)


if __name__ == "__main__":
    main()
