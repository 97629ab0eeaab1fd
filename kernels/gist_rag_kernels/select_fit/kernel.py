"""Triton ``score_keys``: two passes over queries and keys, of which no product is kept.

Pass 1: a program holds a block of queries and walks prefix and passage, as the forward of
FlashAttention-2 does without values: log-sum-exp of each query, and the passage's share of it.
Pass 2: a program holds a block of keys and walks the queries: what each key gets is summed up over
them, so that nothing needs atomics. Logits are in base 2 throughout.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_rag_kernels.runtime import Compilation
from gist_rag_kernels.tiles import LOG2E, dot, head_constants, load_rows


@triton.jit
def sum_kernel(
    query,
    key,
    lse,
    share,
    scale,
    num_queries,
    num_prefix,
    num_keys,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``lse (R, Q)`` of a block of queries over all ``num_keys`` keys, of which the first are the
    prefix, and the ``share (R, Q)`` of the others; ``scale`` includes log2(e), and so does
    ``lse``."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = place < num_queries
    channel = tl.arange(0, WIDTH)
    q = load_rows(query + row * num_queries * SIZE, place, live, channel, SIZE, SIZE, WIDTH)
    key += row * num_keys * SIZE
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    inside = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, num_keys, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        there = column < num_keys
        k = load_rows(key, column, there, channel, SIZE, SIZE, WIDTH)
        logits = tl.where(there[None, :], dot(q, tl.trans(k), zeros) * scale, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, 1))
        part = tl.exp2(logits - peak[:, None])
        fade = tl.exp2(top - peak)
        total = total * fade + tl.sum(part, 1)
        inside = inside * fade + tl.sum(tl.where(column[None, :] < num_prefix, 0.0, part), 1)
        top = peak
    tl.store(lse + row * num_queries + place, top + tl.log2(total), mask=live)
    tl.store(share + row * num_queries + place, inside / total, mask=live)


@triton.jit
def score_kernel(
    query,
    key,
    lse,
    score,
    scale,
    num_queries,
    num_prefix,
    num_keys,
    MAX: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``score (R, T)`` of a block of keys behind the prefix: maximum or RMS of their attention over
    all queries."""
    row = tl.program_id(1).to(tl.int64)
    column = num_prefix + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < num_keys
    channel = tl.arange(0, WIDTH)
    k = load_rows(key + row * num_keys * SIZE, column, inside, channel, SIZE, SIZE, WIDTH)
    query += row * num_queries * SIZE
    lse += row * num_queries
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    gathered = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # summed up over rows once, at the end
    for begin in range(0, num_queries, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        live = place < num_queries
        q = load_rows(query, place, live, channel, SIZE, SIZE, WIDTH)
        sums = tl.load(lse + place, mask=live, other=float("inf"))
        share = tl.exp2(dot(k, tl.trans(q), zeros) * scale - sums[None, :])  # keys down
        if MAX:
            gathered = tl.maximum(gathered, share)
        else:
            gathered += share * share
    if MAX:
        result = tl.max(gathered, 1)
    else:
        result = tl.sqrt(tl.sum(gathered, 1) / num_queries)
    score += row * (num_keys - num_prefix)
    tl.store(score + column - num_prefix, result, mask=inside)


def score_keys(
    queries: Tensor, prefix: Tensor, keys: Tensor, scaling: float, how: str
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments as in ``op.score_keys``, already checked."""
    rows, num_queries, size = queries.shape
    num_prefix, num_keys = prefix.shape[1], prefix.shape[1] + keys.shape[1]
    score, lse, share = (
        torch.empty(rows, n, dtype=torch.float32, device=queries.device)
        for n in (num_keys - num_prefix, num_queries, num_queries)
    )
    if not score.numel():
        return score, share.zero_()
    queries, keys = queries.contiguous(), torch.cat((prefix, keys), dim=1).contiguous()
    sizes = scaling * LOG2E.value, num_queries, num_prefix, num_keys
    tile = _tile(size, queries.element_size())
    sum_kernel[(triton.cdiv(num_queries, tile["BLOCK_M"]), rows)](
        *(queries, keys, lse, share, *sizes), **head_constants(size), **tile
    )
    score_kernel[(triton.cdiv(score.shape[1], tile["BLOCK_N"]), rows)](
        *(queries, keys, lse, score, *sizes), MAX=how == "max", **head_constants(size), **tile
    )
    return score, share


def _tile(size: int, itemsize: int) -> dict[str, int]:
    """Tile of queries x keys, warps and stages: what fits registers and shared memory of every
    target."""
    if itemsize == 4 or size > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def compilations() -> list[Compilation]:
    """Both passes in float32, as ``attention_matching`` asks for, and in bfloat16."""
    kinds = [("fp32", 64), ("fp32", 96), ("fp32", 128), ("bf16", 64), ("bf16", 128)]
    return [_job(name, size, dtype) for dtype, size in kinds for name in ("sums", "rms")]


def _job(name: str, size: int, dtype: str) -> Compilation:
    kernel = sum_kernel if name == "sums" else score_kernel
    tile = _tile(size, {"bf16": 2, "fp32": 4}[dtype])
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    constants = {**head_constants(size), **tile}
    if name != "sums":
        constants["MAX"] = name == "max"
    types = dict.fromkeys(("query", "key"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "share", "score"), "*fp32")
    types |= {"scale": "fp32", "num_queries": "i32", "num_prefix": "i32", "num_keys": "i32"}
    return Compilation(
        name=f"{name}_{dtype}_d{size}",
        kernel=kernel,
        signature={name: types[name] for name in kernel.arg_names if name in types},
        constants=dict(constants),
        num_warps=num_warps,
        num_stages=num_stages,
        hot=True,
    )
