"""Triton ``ragged_slot_attention``: split over slots, or one program per row and block of queries.

A program reads a run of one row's slots, then a run of its local keys, for all query heads of the
group at once: ``G * Q`` query rows fill the tensor cores' tile. Heads are halved (channel ``c``
and ``c + D / 2``), which is how RoPE pairs channels and how 4-bit numbers are packed, so that a
quantised key is unpacked, scaled and rotated in registers without a shuffle.

*Split* (few query rows, as in decoding): the runs are pieces of equal size, of slots or of local
keys; ``merge_kernel`` puts their partial results together by log-sum-exp. *Whole* (many query
rows): a run is everything the row has, and the program writes the output itself.

The split over keys is flash-decoding's (Dao et al., 2023); the ragged list of pieces is ours.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_rag_kernels.runtime import Compilation
from gist_rag_kernels.slot_attention.ragged import Plan, RaggedSlots
from gist_rag_kernels.slot_attention.ragged import plan as make_plan
from gist_rag_kernels.tiles import LOG2E, dot

ENOUGH_PROGRAMS = 264
"""Programs that keep a large GPU busy without splitting: two on each of 132 multiprocessors."""


@triton.jit
def _load_halves(base, rows, live, channel, stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Both halves of the rows ``base + rows * stride``, ``(N, HALF)`` each."""
    left = base + rows[:, None] * stride + channel[None, :]
    inside = live[:, None]
    if PADDED:
        inside = inside & (channel < SIZE // 2)[None, :]
    return (
        tl.load(left, mask=inside, other=0.0),
        tl.load(left + SIZE // 2, mask=inside, other=0.0),
    )


@triton.jit
def _load_nibbles(base, rows, live, channel, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Both halves of packed rows, as signed numbers of 4 bits."""
    inside = live[:, None]
    if PADDED:
        inside = inside & (channel < SIZE // 2)[None, :]
    packed = tl.load(base + rows[:, None] * (SIZE // 2) + channel[None, :], mask=inside, other=0)
    low = packed.to(tl.int32) & 15
    high = packed.to(tl.int32) >> 4
    return (low ^ 8) - 8, (high ^ 8) - 8


@triton.jit
def _load_stored(
    base, rows, live, channel, BITS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    if BITS == 4:
        left, right = _load_nibbles(base, rows, live, channel, SIZE, PADDED)
    else:
        left, right = _load_halves(base, rows, live, channel, SIZE, SIZE, PADDED)
    return left, right


@triton.jit
def _accumulate(logits, value_left, value_right, weight, top, total, left, right):
    """One step of the online softmax; ``weight`` scales values per key. Base-2 logits."""
    peak = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(peak == float("-inf"), 0.0, peak)  # nothing visible yet: no inf - inf
    share = tl.exp2(logits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(share, 1)
    share = (share * weight[None, :]).to(value_left.dtype)
    left = dot(share, value_left, left * fade[:, None])
    right = dot(share, value_right, right * fade[:, None])
    return peak, total, left, right


@triton.jit
def attend_kernel(
    query,
    key,
    value,
    visible,
    seen,
    slot_keys,
    slot_values,
    slot_bias,
    slot_order,
    key_scales,
    scale_rows,
    value_scales,
    positions,
    cos,
    sin,
    run_row,
    run_start,
    run_length,
    out,
    part_top,
    part_sum,
    scale,
    num_runs,
    local_pieces,
    local_chunk,
    rows,
    keys,
    heads,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    visible_batch,
    visible_row,
    visible_key,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    ROTATE: tl.constexpr,
    SPLIT: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One run of slots and one of local keys against ``BLOCK_M`` query rows of one KV head.

    ``scale`` includes log2(e). ``MASK`` is 0 (causal), 2 (causal and ``visible (B, K)``) or 4
    (``visible (B, 1, Q, K)`` alone). Split: ``out (pieces, G * Q, D)`` float32 is not normalised
    and comes with ``part_top`` and ``part_sum (pieces, G * Q)``. Whole: ``out (B, Hq, Q, D)``.
    """
    PADDED: tl.constexpr = HALF * 2 != SIZE
    piece = tl.program_id(0)
    is_slots = True
    local_begin = 0
    local_end = keys
    if SPLIT:
        is_slots = piece < num_runs
        item = piece - num_runs
        row = tl.load(run_row + piece, mask=is_slots, other=0)
        each = tl.maximum(local_pieces, 1)
        row = tl.where(is_slots, row, item // each)
        local_begin = tl.where(is_slots, 0, (item % each) * local_chunk)
        local_end = tl.where(is_slots, 0, tl.minimum(local_begin + local_chunk, keys))
    else:
        row = piece
    start = tl.load(run_start + piece, mask=is_slots, other=0).to(tl.int64)
    length = tl.load(run_length + piece, mask=is_slots, other=0)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # query row: q * GROUP + g
    asked = m < GROUP * rows
    q = tl.where(asked, m // GROUP, 0)
    channel = tl.arange(0, HALF)
    query_rows = (head * GROUP + m % GROUP) * query_head + q.to(tl.int64) * query_row
    q_left, q_right = _load_halves(
        query + batch * query_batch, query_rows, asked, channel, 1, SIZE, PADDED
    )
    if seen is not None:
        num_seen = tl.load(seen + batch * rows + q, mask=asked, other=0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    left = tl.zeros([BLOCK_M, HALF], tl.float32)
    right = tl.zeros([BLOCK_M, HALF], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    WIDTH: tl.constexpr = SIZE // 2 if BITS == 4 else SIZE
    slot_keys += start * WIDTH  # 64 bits once, so that offsets inside a row need only 32
    slot_values += start * WIDTH
    slot_bias += start
    if seen is not None:
        slot_order += start
    if ROTATE:
        scale_rows += start
        positions += start
        value_scales += start
    for begin in range(0, length, BLOCK_N):
        slot = begin + tl.arange(0, BLOCK_N)
        live = slot < length
        k_left, k_right = _load_stored(slot_keys, slot, live, channel, BITS, SIZE, PADDED)
        v_left, v_right = _load_stored(slot_values, slot, live, channel, BITS, SIZE, PADDED)
        bias = tl.load(slot_bias + slot, mask=live, other=float("-inf")) * LOG2E
        weight = tl.full([BLOCK_N], 1.0, tl.float32)
        if ROTATE:
            scales = tl.load(scale_rows + slot, mask=live, other=0)
            s_left, s_right = _load_halves(key_scales, scales, live, channel, SIZE, SIZE, PADDED)
            inside = live[:, None]
            if PADDED:
                inside = inside & (channel < SIZE // 2)[None, :]
            place = tl.load(positions + slot, mask=live, other=0)
            angle = place[:, None] * SIZE + channel[None, :]
            c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
            x = k_left.to(tl.float32) * s_left.to(tl.float32)
            y = k_right.to(tl.float32) * s_right.to(tl.float32)
            k_left = x * c - y * s
            k_right = y * c + x * s
            weight = tl.load(value_scales + slot, mask=live, other=0.0).to(tl.float32)
            v_left, v_right = v_left.to(tl.float32), v_right.to(tl.float32)
        k_left, k_right = k_left.to(q_left.dtype), k_right.to(q_left.dtype)
        logits = dot(q_left, tl.trans(k_left), zeros)
        logits = dot(q_right, tl.trans(k_right), logits) * scale + bias[None, :]
        if seen is not None:
            order = tl.load(slot_order + slot, mask=live, other=0)
            logits = tl.where(order[None, :] < num_seen[:, None], logits, float("-inf"))
        top, total, left, right = _accumulate(
            logits,
            v_left.to(q_left.dtype),
            v_right.to(q_left.dtype),
            weight,
            top,
            total,
            left,
            right,
        )

    if MASK != 4:  # no query of this block sees keys behind its last one
        last = (tl.minimum(tl.program_id(1) * BLOCK_M + BLOCK_M, GROUP * rows) - 1) // GROUP
        local_end = tl.minimum(local_end, last + 1 + keys - rows)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    if MASK:
        visible += batch * visible_batch
    one = tl.full([BLOCK_N], 1.0, tl.float32)
    for begin in range(local_begin, local_end, BLOCK_N):
        place = begin + tl.arange(0, BLOCK_N)
        live = place < local_end
        k_left, k_right = _load_halves(
            key,
            place,
            live,
            channel,
            key_row,
            SIZE,
            PADDED,
        )
        v_left, v_right = _load_halves(
            value,
            place,
            live,
            channel,
            value_row,
            SIZE,
            PADDED,
        )
        logits = dot(q_left, tl.trans(k_left), zeros)
        logits = dot(q_right, tl.trans(k_right), logits) * scale
        if MASK == 4:
            shown = tl.load(
                visible + q[:, None] * visible_row + place[None, :] * visible_key,
                mask=asked[:, None] & live[None, :],
                other=0,
            )
            shown = shown != 0
        else:
            shown = live[None, :] & (place[None, :] <= q[:, None] + keys - rows)
        if MASK == 2:
            kept = tl.load(visible + place * visible_key, mask=live, other=0)
            shown = shown & (kept != 0)[None, :]
        logits = tl.where(shown, logits, float("-inf"))
        top, total, left, right = _accumulate(logits, v_left, v_right, one, top, total, left, right)

    inside = asked[:, None]
    if PADDED:
        inside = inside & (channel < SIZE // 2)[None, :]
    if SPLIT:
        part = piece.to(tl.int64) * GROUP * rows + m
        tl.store(part_top + part, top, mask=asked)
        tl.store(part_sum + part, total, mask=asked)
        target = out + part[:, None] * SIZE + channel[None, :]
    else:
        norm = tl.where(total == 0.0, 1.0, total)[:, None]
        left, right = left / norm, right / norm
        target = (batch * heads + head) * GROUP + m % GROUP
        target = out + (target * rows + q)[:, None] * SIZE + channel[None, :]
    tl.store(target, left.to(out.dtype.element_ty), mask=inside)
    tl.store(target + SIZE // 2, right.to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    parts,
    part_top,
    part_sum,
    first,
    out,
    num_runs,
    local_pieces,
    rows,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Partial results of one query row: its KV head's pieces of slots, then of local keys."""
    row = tl.program_id(0) // (GROUP * rows)
    m = tl.program_id(0) % (GROUP * rows)
    begin = tl.load(first + row)
    of_slots = tl.load(first + row + 1) - begin
    local = num_runs + row * local_pieces - of_slots
    channel = tl.arange(0, BLOCK_D)

    top = float("-inf")
    total = 0.0
    merged = tl.zeros([BLOCK_D], tl.float32)
    for base in range(0, of_slots + local_pieces, BLOCK_P):
        place = base + tl.arange(0, BLOCK_P)
        live = place < of_slots + local_pieces
        piece = tl.where(place < of_slots, begin + place, local + place)
        part = piece.to(tl.int64) * GROUP * rows + m
        tops = tl.load(part_top + part, mask=live, other=float("-inf"))
        sums = tl.load(part_sum + part, mask=live, other=0.0)
        values = tl.load(
            parts + part[:, None] * SIZE + channel[None, :],
            mask=live[:, None] & (channel < SIZE)[None, :],
            other=0.0,
        )
        peak = tl.maximum(top, tl.max(tops, 0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        share = tl.exp2(tops - safe)
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(share * sums, 0)
        merged = merged * fade + tl.sum(share[:, None] * values, 0)
        top = peak
    merged = merged / tl.where(total == 0.0, 1.0, total)
    target = ((row * GROUP + m % GROUP) * rows + m // GROUP).to(tl.int64) * SIZE
    tl.store(out + target + channel, merged.to(out.dtype.element_ty), mask=channel < SIZE)


def ragged_slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: RaggedSlots,
    scaling: float,
    visible: Tensor | None,
    seen: Tensor | None,
    plan: Plan | None,
) -> Tensor:
    """Launch the kernels; arguments as in ``op.ragged_slot_attention``, already checked."""
    batch, query_heads, rows, size = query.shape
    heads, keys = key.shape[1], key.shape[2]
    group = query_heads // heads
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    out = torch.empty((batch, query_heads, rows, size), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out

    if visible is not None:
        visible = visible[:, 0, 0] if visible.dim() == 4 and rows == 1 else visible
    mask = 0 if visible is None else visible.dim()
    most, block_n = _blocks(slots.quantised, mask)
    block_m = min(most, max(16, triton.next_power_of_2(group * rows)))
    blocks = triton.cdiv(group * rows, block_m)
    split = batch * heads * blocks < ENOUGH_PROGRAMS
    parts: Tensor | None = None
    part_top: Tensor | None = None
    part_sum: Tensor | None = None
    run_row: Tensor | None = None
    if split:
        plan = plan or make_plan(slots.starts, slots.lengths)
        num_runs, local_pieces = len(plan.row), triton.cdiv(keys, plan.chunk)
        pieces = num_runs + batch * heads * local_pieces
        run_row, run_start, run_length = plan.row, plan.start, plan.length
        parts, part_top, part_sum = (
            torch.empty(pieces, group * rows, *tail, dtype=torch.float32, device=query.device)
            for tail in ((size,), (), ())
        )
        target = parts
    else:
        num_runs, local_pieces, pieces = 0, 0, batch * heads
        run_start, run_length = slots.starts.contiguous(), slots.lengths.contiguous()
        target = out

    shown = None if visible is None else visible.view(torch.uint8)
    if pieces:
        attend_kernel[(pieces, blocks)](
            query,
            key,
            value,
            shown,
            None if seen is None else seen.contiguous(),
            slots.keys,
            slots.values,
            slots.bias,
            slots.order,
            slots.key_scales,
            slots.scale_rows,
            slots.value_scales,
            slots.positions,
            slots.cos,
            slots.sin,
            run_row,
            run_start,
            run_length,
            target,
            part_top,
            part_sum,
            scaling * LOG2E.value,
            num_runs,
            local_pieces,
            plan.chunk if split and plan is not None else 0,
            rows,
            keys,
            heads,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if shown is None else shown.stride(0),
            0 if shown is None else shown.stride(-2),
            0 if shown is None else shown.stride(-1),
            GROUP=group,
            SIZE=size,
            HALF=_half(size),
            BITS=slots.bits,
            ROTATE=slots.quantised,
            SPLIT=split,
            MASK=mask,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
            num_stages=2,
        )
    if split:
        assert plan is not None
        merge_kernel[(batch * query_heads * rows,)](
            parts,
            part_top,
            part_sum,
            plan.first,
            out,
            num_runs,
            local_pieces,
            rows,
            GROUP=group,
            SIZE=size,
            BLOCK_D=triton.next_power_of_2(size),
            BLOCK_P=16,
            num_warps=4,
        )
    return out


def _half(size: int) -> int:
    """Half a head, up to what a tile of ``tl.dot`` needs."""
    return max(16, int(triton.next_power_of_2(size // 2)))


def _blocks(quantised: bool, mask: int) -> tuple[int, int]:
    """Most query rows, and keys, of a tile: what fits the registers of every target."""
    if quantised:
        return 32, 32
    return (32, 64) if mask == 4 else (64, 32)


def compilations() -> list[Compilation]:
    """Decoding (split) and prefill (whole) at the head sizes of 8B and 1B models, and the merge."""
    jobs = []
    for size in (64, 128):
        for stored in ("bf16", "i8", "u8"):
            jobs += [_attend(size, stored, split=True, rows=16), _attend(size, stored, split=False)]
    jobs.append(_attend(128, "bf16", split=True))
    jobs.append(_attend(96, "bf16", split=True, rows=16))
    jobs.append(_attend(128, "bf16", split=False, mask=4))
    jobs.append(_attend(128, "fp32", split=False, hot=False))
    for size in (64, 128):
        jobs.append(
            Compilation(
                name=f"merge_d{size}",
                kernel=merge_kernel,
                signature={
                    "parts": "*fp32",
                    "part_top": "*fp32",
                    "part_sum": "*fp32",
                    "first": "*i32",
                    "out": "*bf16",
                    "num_runs": "i32",
                    "local_pieces": "i32",
                    "rows": "i32",
                },
                constants={"GROUP": 4, "SIZE": size, "BLOCK_D": size, "BLOCK_P": 16},
                num_warps=4,
                num_stages=2,
                hot=True,
            )
        )
    return jobs


def _attend(
    size: int, stored: str, *, split: bool, rows: int = 0, mask: int = 2, hot: bool = True
) -> Compilation:
    quantised = stored in ("i8", "u8")
    most, block_n = _blocks(quantised, mask)
    rows = rows or most
    local = "*bf16" if quantised else f"*{stored}"
    bits = {"bf16": 16, "fp32": 32, "i8": 8, "u8": 4}[stored]
    signature = {
        "query": local,
        "key": local,
        "value": local,
        "visible": "*u8",
        "seen": "*i64",
        "slot_keys": f"*{stored}",
        "slot_values": f"*{stored}",
        "slot_bias": "*fp32",
        "slot_order": "*i32",
        "run_start": "*i64",
        "run_length": "*i32",
        "out": "*fp32" if split else local,
        "scale": "fp32",
    }
    signature |= dict.fromkeys(("num_runs", "local_pieces", "local_chunk"), "i32")
    signature |= dict.fromkeys(("rows", "keys", "heads", "visible_batch", "visible_row"), "i32")
    signature |= {
        f"{tensor}_{axis}": "i32:16"
        for tensor in ("query", "key", "value")
        for axis in ("batch", "head", "row")
    }
    signature |= {"visible_key": "i32"}
    absent: list[str] = []
    if quantised:
        signature |= {
            "key_scales": "*fp16",
            "scale_rows": "*i32",
            "value_scales": "*fp16",
            "positions": "*i32",
            "cos": "*fp16",
            "sin": "*fp16",
        }
    else:
        absent += ["key_scales", "scale_rows", "value_scales", "positions", "cos", "sin"]
    if split:
        signature |= {"run_row": "*i32", "part_top": "*fp32", "part_sum": "*fp32"}
    else:
        absent += ["run_row", "part_top", "part_sum"]
    constants: dict[str, object] = dict.fromkeys(absent)
    constants |= {
        "GROUP": 4,
        "SIZE": size,
        "HALF": _half(size),
        "BITS": bits,
        "ROTATE": quantised,
        "SPLIT": split,
        "MASK": mask,
        "BLOCK_M": rows,
        "BLOCK_N": block_n,
    }
    name = {"i8": "int8", "u8": "int4"}.get(stored, stored)
    return Compilation(
        name=f"{'split' if split else 'whole'}_{name}_d{size}_m{rows}_mask{mask}",
        kernel=attend_kernel,
        signature=signature,
        constants=constants,
        num_warps=4,
        num_stages=2,
        hot=hot,
    )
