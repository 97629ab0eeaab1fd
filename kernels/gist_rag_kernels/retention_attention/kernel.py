"""Triton ``retention_attention``, forward and backward.

Forward and ``dq``: a program holds a block of queries and walks the keys up to its last one.
``dk``, ``dv`` and the gradient of ``log_beta``: a program holds a block of keys and walks the
queries from its first one on, for all query heads of its group, so that no sums need atomics. The
online softmax and the recomputation in the backward are FlashAttention-2's (Dao, 2023).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_rag_kernels.runtime import Compilation
from gist_rag_kernels.tiles import LOG2E, dot, head_constants, load_rows, store_rows


@triton.jit
def _logits(product, age, log_beta, scale):
    """In base 2; hidden where a query comes before the key. Ages are exact up to 2^24 tokens."""
    logits = product * scale + age * log_beta
    return tl.where(age >= 0, logits, float("-inf"))


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    log_beta,
    out,
    lse,
    scale,
    num_queries,
    num_keys,
    query_heads,
    query_batch,
    query_head,
    query_row,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``scale`` includes log2(e), and so does ``lse (B, Hq, Q)``."""
    batch = (tl.program_id(1) // query_heads).to(tl.int64)
    head = (tl.program_id(1) % query_heads).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < num_queries
    channel = tl.arange(0, WIDTH)
    query += batch * query_batch + head * query_head
    q = load_rows(query, row, live, channel, query_row, SIZE, WIDTH)
    place = (row + num_keys - num_queries).to(tl.float32)
    end = tl.minimum((block + 1) * BLOCK_M + num_keys - num_queries, num_keys)

    kv = (batch * (query_heads // GROUP) + head // GROUP) * num_keys
    key += kv * SIZE
    value += kv * SIZE
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, end, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        inside = column < end
        k = load_rows(key, column, inside, channel, SIZE, SIZE, WIDTH)
        v = load_rows(value, column, inside, channel, SIZE, SIZE, WIDTH)
        fade = tl.load(log_beta + kv + column, mask=inside, other=0.0) * LOG2E
        age = place[:, None] - column.to(tl.float32)[None, :]
        logits = _logits(dot(q, tl.trans(k), zeros), age, fade[None, :], scale)
        peak = tl.maximum(top, tl.max(logits, 1))
        share = tl.exp2(logits - peak[:, None])
        shrink = tl.exp2(top - peak)
        total = total * shrink + tl.sum(share, 1)
        result = dot(share.to(v.dtype), v, result * shrink[:, None])
        top = peak

    rows = (batch * query_heads + head) * num_queries
    store_rows(out + rows * SIZE, row, live, channel, SIZE, result / total[:, None], SIZE, WIDTH)
    tl.store(lse + rows + row, top + tl.log2(total), mask=live)


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    log_beta,
    out,
    grad,
    lse,
    delta,
    d_query,
    scale,
    num_queries,
    num_keys,
    query_heads,
    query_batch,
    query_head,
    query_row,
    grad_batch,
    grad_head,
    grad_row,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dq``, and ``delta (B, Hq, Q)``, the product of output and gradient of each row."""
    batch = (tl.program_id(1) // query_heads).to(tl.int64)
    head = (tl.program_id(1) % query_heads).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < num_queries
    channel = tl.arange(0, WIDTH)
    rows = (batch * query_heads + head) * num_queries
    query += batch * query_batch + head * query_head
    grad += batch * grad_batch + head * grad_head
    q = load_rows(query, row, live, channel, query_row, SIZE, WIDTH)
    do = load_rows(grad, row, live, channel, grad_row, SIZE, WIDTH)
    o = load_rows(out + rows * SIZE, row, live, channel, SIZE, SIZE, WIDTH)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + rows + row, product, mask=live)
    sums = tl.load(lse + rows + row, mask=live, other=float("inf"))
    place = (row + num_keys - num_queries).to(tl.float32)
    end = tl.minimum((block + 1) * BLOCK_M + num_keys - num_queries, num_keys)

    kv = (batch * (query_heads // GROUP) + head // GROUP) * num_keys
    key += kv * SIZE
    value += kv * SIZE
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, end, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        inside = column < end
        k = load_rows(key, column, inside, channel, SIZE, SIZE, WIDTH)
        v = load_rows(value, column, inside, channel, SIZE, SIZE, WIDTH)
        fade = tl.load(log_beta + kv + column, mask=inside, other=0.0) * LOG2E
        age = place[:, None] - column.to(tl.float32)[None, :]
        logits = _logits(dot(q, tl.trans(k), zeros), age, fade[None, :], scale)
        share = tl.exp2(logits - sums[:, None])
        slope = share * (dot(do, tl.trans(v), zeros) - product[:, None])
        result = dot(slope.to(k.dtype), k, result)
    result = result * (scale / LOG2E)
    store_rows(d_query + rows * SIZE, row, live, channel, SIZE, result, SIZE, WIDTH)


@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    log_beta,
    grad,
    lse,
    delta,
    d_key,
    d_value,
    d_log_beta,
    scale,
    num_queries,
    num_keys,
    heads,
    query_batch,
    query_head,
    query_row,
    grad_batch,
    grad_head,
    grad_row,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dk``, ``dv`` and the gradient of ``log_beta`` of one block of keys."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    column = begin + tl.arange(0, BLOCK_N)
    place = column.to(tl.float32)
    inside = column < num_keys
    channel = tl.arange(0, WIDTH)
    kv = (batch * heads + head) * num_keys
    k = load_rows(key + kv * SIZE, column, inside, channel, SIZE, SIZE, WIDTH)
    v = load_rows(value + kv * SIZE, column, inside, channel, SIZE, SIZE, WIDTH)
    fade = tl.load(log_beta + kv + column, mask=inside, other=0.0) * LOG2E
    offset = num_keys - num_queries
    first = tl.maximum(begin - offset, 0)  # the first query that sees any of these keys
    blocks = tl.cdiv(num_queries - first, BLOCK_M)

    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    d_fade = tl.zeros([BLOCK_N], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, blocks * GROUP):
        query_at = head * GROUP + step // blocks
        rows = (batch * heads * GROUP + query_at) * num_queries
        row = first + step % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < num_queries
        q_base = query + batch * query_batch + query_at * query_head
        q = load_rows(q_base, row, live, channel, query_row, SIZE, WIDTH)
        grad_base = grad + batch * grad_batch + query_at * grad_head
        do = load_rows(grad_base, row, live, channel, grad_row, SIZE, WIDTH)
        sums = tl.load(lse + rows + row, mask=live, other=float("inf"))
        product = tl.load(delta + rows + row, mask=live, other=0.0)
        age = (row + offset).to(tl.float32)[None, :] - place[:, None]  # keys down, queries across
        logits = _logits(dot(k, tl.trans(q), zeros), age, fade[:, None], scale)
        share = tl.exp2(logits - sums[None, :])
        dv = dot(share.to(do.dtype), do, dv)
        slope = share * (dot(v, tl.trans(do), zeros) - product[None, :])
        dk = dot(slope.to(q.dtype), q, dk)
        d_fade += tl.sum(slope * age, 1)
    dk = dk * (scale / LOG2E)
    store_rows(d_key + kv * SIZE, column, inside, channel, SIZE, dk, SIZE, WIDTH)
    store_rows(d_value + kv * SIZE, column, inside, channel, SIZE, dv, SIZE, WIDTH)
    tl.store(d_log_beta + kv + column, d_fade, mask=inside)


class _RetentionAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, scaling: float
    ) -> Tensor:
        query = query if query.stride(3) == 1 else query.contiguous()
        key, value, log_beta = (t.contiguous() for t in (key, value, log_beta))
        batch, heads, rows, size = query.shape
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        if out.numel():
            tile = _tile("forward", size, query.element_size())
            forward_kernel[(triton.cdiv(rows, tile["BLOCK_M"]), batch * heads)](
                *(query, key, value, log_beta, out, lse),
                *(scaling * LOG2E.value, rows, key.shape[2], heads),
                *query.stride()[:3],
                GROUP=heads // key.shape[1],
                **head_constants(size),
                **tile,
            )
        ctx.save_for_backward(query, key, value, log_beta, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        query, key, value, log_beta, out, lse = ctx.saved_tensors
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        batch, query_heads, rows, size = query.shape
        heads, keys = key.shape[1], key.shape[2]
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        d_key, d_value, d_log_beta, delta = (
            torch.empty_like(t) for t in (key, value, log_beta, lse)
        )
        if not out.numel():
            return d_query, d_key.zero_(), d_value.zero_(), d_log_beta.zero_(), None
        scale = ctx.scaling * LOG2E.value
        strides = (*query.stride()[:3], *grad.stride()[:3])
        tile = _tile("query_gradient", size, query.element_size())
        query_gradient_kernel[(triton.cdiv(rows, tile["BLOCK_M"]), batch * query_heads)](
            *(query, key, value, log_beta, out, grad, lse, delta, d_query),
            *(scale, rows, keys, query_heads),
            *strides,
            GROUP=query_heads // heads,
            **head_constants(size),
            **tile,
        )
        tile = _tile("key_gradient", size, query.element_size())
        key_gradient_kernel[(triton.cdiv(keys, tile["BLOCK_N"]), batch * heads)](
            *(query, key, value, log_beta, grad, lse, delta, d_key, d_value, d_log_beta),
            *(scale, rows, keys, heads),
            *strides,
            GROUP=query_heads // heads,
            **head_constants(size),
            **tile,
        )
        return d_query, d_key, d_value, d_log_beta, None


def retention_attention(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, scaling: float
) -> Tensor:
    """Launch the kernels; arguments as in ``op.retention_attention``, already checked."""
    out: Tensor = _RetentionAttention.apply(query, key, value, log_beta.float(), scaling)
    return out


def _tile(kernel: str, size: int, itemsize: int) -> dict[str, int]:
    """Tile of queries x keys, warps and stages: what fits registers and shared memory of every
    target, with keys x queries of the key gradient in two accumulators."""
    if itemsize == 4 or size > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    small = size <= 64
    rows, keys, num_warps, stages = {
        "forward": (64, 64 if small else 32, 4, 2),
        "query_gradient": (64, 32, 4, 2),
        "key_gradient": (32, 64, 4, 2) if small else (32, 32, 4, 2),
    }[kernel]
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": num_warps, "num_stages": stages}


def compilations() -> list[Compilation]:
    """Forward and backward at the head sizes of 8B, 1B and (padded) 3B-class models."""
    return [_job(kernel, size) for kernel in _KERNELS for size in (64, 96, 128)]


_KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}


def _job(kernel: str, size: int) -> Compilation:
    function = _KERNELS[kernel]
    tile = _tile(kernel, size, itemsize=2)
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    types = dict.fromkeys(
        ("query", "key", "value", "out", "grad", "d_query", "d_key", "d_value"), "*bf16"
    )
    types |= dict.fromkeys(("log_beta", "lse", "delta", "d_log_beta"), "*fp32")
    types |= {"scale": "fp32"}
    types |= dict.fromkeys(("num_queries", "num_keys", "query_heads", "heads"), "i32")
    types |= {
        f"{name}_{axis}": "i32:16"
        for name in ("query", "grad")
        for axis in ("batch", "head", "row")
    }
    return Compilation(
        name=f"{kernel}_bf16_d{size}",
        kernel=function,
        signature={name: types[name] for name in function.arg_names if name in types},
        constants={"GROUP": 4, **head_constants(size), **tile},
        num_warps=num_warps,
        num_stages=num_stages,
        hot=True,
    )
