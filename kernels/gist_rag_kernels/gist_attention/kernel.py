"""Triton ``gist_attention``, forward and backward, over slots after the gist shift.

Keys and values are shifted once (raw slots, then gists), so that the inner loops read contiguous
rows; queries, gradients and the output are addressed through ``order``, so that nothing else moves.
Blocks never straddle the border between raw slots and gists.

Forward and ``dq``: a program holds a block of queries and walks the ranges of keys that it sees.
``dk``/``dv``: a program holds a block of keys and walks the ranges of queries that see it, for all
query heads of its group, so that no sums need atomics. The online softmax and the recomputation in
the backward are FlashAttention-2's (Dao, 2023).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_rag_kernels.gist_attention.shift import Shift
from gist_rag_kernels.runtime import Compilation
from gist_rag_kernels.tiles import LOG2E, dot, head_constants, load_rows, store_rows


@triton.jit
def _block(raws, block, slots, BLOCK: tl.constexpr):
    """First place and end of a block of the shifted order: blocks of raw slots, then of gists."""
    num_raws = tl.load(raws + slots)
    raw_blocks = tl.cdiv(num_raws, BLOCK)
    is_raw = block < raw_blocks
    begin = tl.where(is_raw, block * BLOCK, num_raws + (block - raw_blocks) * BLOCK)
    return begin, tl.where(is_raw, num_raws, slots), num_raws


@triton.jit
def _key_ranges(raws, first, of_gists, original, live, num_raws, slots, prefix):
    """Ranges of shifted keys that a block of queries may see: raw prefix, raw window, and the same
    of gists. Begin and end of each, and the block's first raw slot and first gist per query."""
    raw_from = tl.load(first + original, mask=live, other=slots)
    gist_from = tl.load(first + of_gists + original, mask=live, other=slots)
    stop = tl.max(original, 0) + 1
    raw_stop = tl.load(raws + stop)
    sinks = tl.minimum(prefix, stop)
    raw_sinks = tl.load(raws + sinks)
    window = tl.minimum(tl.min(raw_from, 0), stop)
    raw_begin = tl.load(raws + window)
    gists = tl.minimum(tl.min(gist_from, 0), stop)
    gist_begin = num_raws + gists - tl.load(raws + gists)
    gist_sinks = num_raws + sinks - raw_sinks
    gist_stop = num_raws + stop - raw_stop
    # A window that reaches into the prefix is one range with it.
    apart = raw_begin > raw_sinks
    raw_begin = tl.where(apart, raw_begin, 0)
    raw_sinks = tl.where(apart, raw_sinks, 0)
    apart = gist_begin > gist_sinks
    gist_begin = tl.where(apart, gist_begin, num_raws)
    gist_sinks = tl.where(apart, gist_sinks, num_raws)
    return (
        raw_from,
        gist_from,
        raw_sinks,
        raw_begin,
        raw_stop,
        gist_sinks,
        gist_begin,
        gist_stop,
    )


@triton.jit
def _pick(step, end_a, end_b, begin_a, stop_a, begin_b, stop_b, BLOCK: tl.constexpr):
    """Begin and end of block ``step``, where steps below ``end_a`` walk range a, then range b."""
    first = step < end_a
    begin = tl.where(first, begin_a + step * BLOCK, begin_b + (step - end_a) * BLOCK)
    return begin, tl.where(first, stop_a, stop_b)


@triton.jit
def _next_keys(
    step,
    raw_sink_blocks,
    raw_blocks,
    gist_sink_blocks,
    raw_sinks,
    raw_begin,
    raw_stop,
    gist_sinks,
    gist_begin,
    gist_stop,
    num_raws,
    BLOCK: tl.constexpr,
):
    """Begin and end of the ``step``-th block of keys, and whether they are gists."""
    is_gist = step >= raw_blocks
    a, a_stop = _pick(step, raw_sink_blocks, raw_blocks, 0, raw_sinks, raw_begin, raw_stop, BLOCK)
    b, b_stop = _pick(
        step - raw_blocks,
        gist_sink_blocks,
        0,
        num_raws,
        gist_sinks,
        gist_begin,
        gist_stop,
        BLOCK,
    )
    return tl.where(is_gist, b, a), tl.where(is_gist, b_stop, a_stop), is_gist


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    order,
    raws,
    first,
    prefixes,
    scale,
    slots,
    query_heads,
    of_gists,
    query_batch,
    query_head,
    query_row,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``key`` and ``value (B, H, S, D)`` are shifted; ``scale`` includes log2(e), and so does
    ``lse (B, Hq, S)``, which is ``+inf`` for a slot that sees nothing."""
    batch = (tl.program_id(1) // query_heads).to(tl.int64)
    head = (tl.program_id(1) % query_heads).to(tl.int64)
    order += batch * slots
    raws += batch * (slots + 1)
    first += batch * slots
    prefix = tl.load(prefixes + batch)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    begin, end, num_raws = _block(raws, block, slots, BLOCK_M)
    if begin >= end:
        return
    place = begin + tl.arange(0, BLOCK_M)
    live = place < end
    original = tl.load(order + place, mask=live, other=-1)
    channel = tl.arange(0, WIDTH)
    query += batch * query_batch + head * query_head
    q = load_rows(query, original, live, channel, query_row, SIZE, WIDTH)
    ranges = _key_ranges(raws, first, of_gists, original, live, num_raws, slots, prefix)
    raw_from, gist_from, raw_sinks, raw_begin, raw_stop, gist_sinks, gist_begin, gist_stop = ranges
    a = tl.cdiv(raw_sinks, BLOCK_N)
    b = a + tl.cdiv(tl.maximum(raw_stop - raw_begin, 0), BLOCK_N)
    c = tl.cdiv(gist_sinks - num_raws, BLOCK_N)
    d = b + c + tl.cdiv(tl.maximum(gist_stop - gist_begin, 0), BLOCK_N)

    kv = (batch * (query_heads // GROUP) + head // GROUP) * slots * SIZE
    key += kv
    value += kv
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, d):
        at, stop, is_gist = _next_keys(
            step,
            a,
            b,
            c,
            raw_sinks,
            raw_begin,
            raw_stop,
            gist_sinks,
            gist_begin,
            gist_stop,
            num_raws,
            BLOCK_N,
        )
        column = at + tl.arange(0, BLOCK_N)
        inside = column < stop
        k_original = tl.load(order + column, mask=inside, other=slots)
        k = load_rows(key, column, inside, channel, SIZE, SIZE, WIDTH)
        v = load_rows(value, column, inside, channel, SIZE, SIZE, WIDTH)
        logits = dot(q, tl.trans(k), zeros) * scale
        start = tl.where(is_gist, gist_from, raw_from)
        shown = (k_original[None, :] >= start[:, None]) | (k_original < prefix)[None, :]
        shown = shown & (k_original[None, :] <= original[:, None])
        logits = tl.where(shown, logits, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)  # nothing visible yet: no inf - inf
        share = tl.exp2(logits - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(share, 1)
        result = dot(share.to(v.dtype), v, result * fade[:, None])
        top = peak

    blind = total == 0.0
    result = result / tl.where(blind, 1.0, total)[:, None]
    rows = (batch * query_heads + head) * slots
    store_rows(out + rows * SIZE, original, live, channel, SIZE, result, SIZE, WIDTH)
    sums = tl.where(blind, float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(lse + rows + original, sums, mask=live)


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    out,
    grad,
    lse,
    delta,
    d_query,
    order,
    raws,
    first,
    prefixes,
    scale,
    slots,
    query_heads,
    of_gists,
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
    """``dq``, and ``delta (B, Hq, S)``, the product of output and gradient of each row."""
    batch = (tl.program_id(1) // query_heads).to(tl.int64)
    head = (tl.program_id(1) % query_heads).to(tl.int64)
    order += batch * slots
    raws += batch * (slots + 1)
    first += batch * slots
    prefix = tl.load(prefixes + batch)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    begin, end, num_raws = _block(raws, block, slots, BLOCK_M)
    if begin >= end:
        return
    place = begin + tl.arange(0, BLOCK_M)
    live = place < end
    original = tl.load(order + place, mask=live, other=-1)
    channel = tl.arange(0, WIDTH)
    rows = (batch * query_heads + head) * slots
    query += batch * query_batch + head * query_head
    grad += batch * grad_batch + head * grad_head
    q = load_rows(query, original, live, channel, query_row, SIZE, WIDTH)
    do = load_rows(grad, original, live, channel, grad_row, SIZE, WIDTH)
    o = load_rows(out + rows * SIZE, original, live, channel, SIZE, SIZE, WIDTH)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + rows + original, product, mask=live)
    sums = tl.load(lse + rows + original, mask=live, other=float("inf"))
    ranges = _key_ranges(raws, first, of_gists, original, live, num_raws, slots, prefix)
    raw_from, gist_from, raw_sinks, raw_begin, raw_stop, gist_sinks, gist_begin, gist_stop = ranges
    a = tl.cdiv(raw_sinks, BLOCK_N)
    b = a + tl.cdiv(tl.maximum(raw_stop - raw_begin, 0), BLOCK_N)
    c = tl.cdiv(gist_sinks - num_raws, BLOCK_N)
    d = b + c + tl.cdiv(tl.maximum(gist_stop - gist_begin, 0), BLOCK_N)

    kv = (batch * (query_heads // GROUP) + head // GROUP) * slots * SIZE
    key += kv
    value += kv
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, d):
        at, stop, is_gist = _next_keys(
            step,
            a,
            b,
            c,
            raw_sinks,
            raw_begin,
            raw_stop,
            gist_sinks,
            gist_begin,
            gist_stop,
            num_raws,
            BLOCK_N,
        )
        column = at + tl.arange(0, BLOCK_N)
        inside = column < stop
        k_original = tl.load(order + column, mask=inside, other=slots)
        k = load_rows(key, column, inside, channel, SIZE, SIZE, WIDTH)
        v = load_rows(value, column, inside, channel, SIZE, SIZE, WIDTH)
        logits = dot(q, tl.trans(k), zeros) * scale
        start = tl.where(is_gist, gist_from, raw_from)
        shown = (k_original[None, :] >= start[:, None]) | (k_original < prefix)[None, :]
        shown = shown & (k_original[None, :] <= original[:, None])
        share = tl.exp2(tl.where(shown, logits, float("-inf")) - sums[:, None])
        slope = share * (dot(do, tl.trans(v), zeros) - product[:, None])
        result = dot(slope.to(k.dtype), k, result)
    result = result * (scale / LOG2E)
    store_rows(d_query + rows * SIZE, original, live, channel, SIZE, result, SIZE, WIDTH)


@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    d_key,
    d_value,
    order,
    raws,
    first,
    until,
    prefixes,
    scale,
    slots,
    heads,
    of_gists,
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
    """``dk`` and ``dv`` of one block of keys, in the original order."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    order += batch * slots
    raws += batch * (slots + 1)
    first += batch * slots
    until += batch * slots
    prefix = tl.load(prefixes + batch)
    begin, end, num_raws = _block(raws, tl.program_id(0), slots, BLOCK_N)
    if begin >= end:
        return
    column = begin + tl.arange(0, BLOCK_N)
    inside = column < end
    k_original = tl.load(order + column, mask=inside, other=slots)
    channel = tl.arange(0, WIDTH)
    kv = (batch * heads + head) * slots * SIZE
    k = load_rows(key + kv, column, inside, channel, SIZE, SIZE, WIDTH)
    v = load_rows(value + kv, column, inside, channel, SIZE, SIZE, WIDTH)
    if begin >= num_raws:  # keys are gists: what counts is the first gist that a query sees
        first += of_gists

    low = tl.min(k_original, 0)
    raw_until = tl.max(tl.load(until + k_original, mask=inside, other=0), 0)
    gist_until = tl.max(tl.load(until + of_gists + k_original, mask=inside, other=0), 0)
    raw_until = tl.maximum(raw_until, low)
    gist_until = tl.maximum(gist_until, low)
    raws_before = tl.load(raws + low)
    raw_begin = raws_before
    raw_stop = tl.load(raws + raw_until)
    gist_begin = num_raws + low - raws_before
    gist_stop = num_raws + gist_until - tl.load(raws + gist_until)
    raw_blocks = tl.cdiv(raw_stop - raw_begin, BLOCK_M)
    blocks = raw_blocks + tl.cdiv(gist_stop - gist_begin, BLOCK_M)

    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, blocks * GROUP):
        query_at = head * GROUP + step // blocks
        rows = (batch * heads * GROUP + query_at) * slots
        at, stop = _pick(
            step % blocks, raw_blocks, blocks, raw_begin, raw_stop, gist_begin, gist_stop, BLOCK_M
        )
        place = at + tl.arange(0, BLOCK_M)
        live = place < stop
        original = tl.load(order + place, mask=live, other=-1)
        q_base = query + batch * query_batch + query_at * query_head
        q = load_rows(q_base, original, live, channel, query_row, SIZE, WIDTH)
        grad_base = grad + batch * grad_batch + query_at * grad_head
        do = load_rows(grad_base, original, live, channel, grad_row, SIZE, WIDTH)
        sums = tl.load(lse + rows + original, mask=live, other=float("inf"))
        product = tl.load(delta + rows + original, mask=live, other=0.0)
        start = tl.load(first + original, mask=live, other=slots)
        logits = dot(k, tl.trans(q), zeros) * scale  # keys down, queries across
        shown = (k_original[:, None] >= start[None, :]) | (k_original < prefix)[:, None]
        shown = shown & (k_original[:, None] <= original[None, :])
        share = tl.exp2(tl.where(shown, logits, float("-inf")) - sums[None, :])
        dv = dot(share.to(do.dtype), do, dv)
        slope = share * (dot(v, tl.trans(do), zeros) - product[None, :])
        dk = dot(slope.to(q.dtype), q, dk)
    dk = dk * (scale / LOG2E)
    store_rows(d_key + kv, k_original, inside, channel, SIZE, dk, SIZE, WIDTH)
    store_rows(d_value + kv, k_original, inside, channel, SIZE, dv, SIZE, WIDTH)


class _GistAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shift: Shift, scaling: float
    ) -> Tensor:
        query = query if query.stride(3) == 1 else query.contiguous()
        index = shift.order.long()[:, None, :, None].expand(key.shape)
        key, value = key.gather(2, index), value.gather(2, index)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        if out.numel():
            batch, heads, slots, size = query.shape
            tile = _tile("forward", size, query.element_size())
            forward_kernel[(triton.cdiv(slots, tile["BLOCK_M"]) + 1, batch * heads)](
                query,
                key,
                value,
                out,
                lse,
                *(shift.order, shift.raws, shift.first, shift.prefix),
                scaling * LOG2E.value,
                *(slots, heads, batch * slots),
                *query.stride()[:3],
                GROUP=heads // key.shape[1],
                **head_constants(size),
                **tile,
            )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.shift, ctx.scaling = shift, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        batch, query_heads, slots, size = query.shape
        heads = key.shape[1]
        shift: Shift = ctx.shift
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        delta = torch.empty_like(lse)
        if not out.numel():
            return d_query, d_key, d_value, None, None
        scale = ctx.scaling * LOG2E.value
        strides = (*query.stride()[:3], *grad.stride()[:3])
        tile = _tile("query_gradient", size, query.element_size())
        query_gradient_kernel[(triton.cdiv(slots, tile["BLOCK_M"]) + 1, batch * query_heads)](
            *(query, key, value, out, grad, lse, delta, d_query),
            *(shift.order, shift.raws, shift.first, shift.prefix),
            *(scale, slots, query_heads, batch * slots),
            *strides,
            GROUP=query_heads // heads,
            **head_constants(size),
            **tile,
        )
        tile = _tile("key_gradient", size, query.element_size())
        key_gradient_kernel[(triton.cdiv(slots, tile["BLOCK_N"]) + 1, batch * heads)](
            *(query, key, value, grad, lse, delta, d_key, d_value),
            *(shift.order, shift.raws, shift.first, shift.until, shift.prefix),
            *(scale, slots, heads, batch * slots),
            *strides,
            GROUP=query_heads // heads,
            **head_constants(size),
            **tile,
        )
        return d_query, d_key, d_value, None, None


def gist_attention(
    query: Tensor, key: Tensor, value: Tensor, shift: Shift, scaling: float
) -> Tensor:
    """Launch the kernels; arguments as in ``op.gist_attention``, already checked."""
    out: Tensor = _GistAttention.apply(query, key, value, shift, scaling)
    return out


def _tile(kernel: str, size: int, itemsize: int) -> dict[str, int]:
    """Tile of queries x keys, warps and stages: what fits registers and shared memory of every
    target, with keys x queries of the key gradient in two accumulators."""
    if itemsize == 4 or size > 128:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    rows, keys, stages = {
        "forward": (64, 64, 2),
        "query_gradient": (64, 32, 2),
        "key_gradient": (32, 64, 2 if size <= 64 else 1),
    }[kernel]
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": stages}


def compilations() -> list[Compilation]:
    """Forward and backward at the head sizes of 8B, 1B and (padded) 3B-class models."""
    jobs = [_job(kernel, size, "bf16") for kernel in _KERNELS for size in (64, 128)]
    jobs.append(_job("forward", 96, "bf16"))
    jobs += [_job(kernel, 128, "fp32", hot=False) for kernel in _KERNELS]
    return jobs


_KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
}


def _job(kernel: str, size: int, dtype: str, *, hot: bool = True) -> Compilation:
    function = _KERNELS[kernel]
    tile = _tile(kernel, size, {"bf16": 2, "fp32": 4}[dtype])
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    types = dict.fromkeys(
        ("query", "key", "value", "out", "grad", "d_query", "d_key", "d_value"), f"*{dtype}"
    )
    types |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("order", "raws", "first", "until", "prefixes"), "*i32")
    types |= dict.fromkeys(("slots", "query_heads", "heads", "of_gists"), "i32")
    types |= {
        f"{name}_{axis}": "i32:16"
        for name in ("query", "grad")
        for axis in ("batch", "head", "row")
    }
    return Compilation(
        name=f"{kernel}_{dtype}_d{size}",
        kernel=function,
        signature={name: types[name] for name in function.arg_names if name in types},
        constants={"GROUP": 4, **head_constants(size), **tile},
        num_warps=num_warps,
        num_stages=num_stages,
        hot=hot,
    )
