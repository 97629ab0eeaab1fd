# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton ``compose_kv`` and ``compose_packed``.

Both work on the two halves of a head, channels ``j`` and ``j + D / 2``, which RoPE turns into each
other. There is no reuse but that of scales and tables, so the only aim is to read and write each
number once, in full cache lines.

A program of ``compose_packed`` walks one row (a passage's slots in a layer and head), so that the
steps of the keys are loaded once; a row that is longer than the mean is shared by nobody, which the
many rows of a model even out. Rows of one passage run side by side and find its part of the cos and
sin tables in the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_rag_kernels.compose_kv.reference import Composed
from gist_rag_kernels.kv_quant.kernel import load_halves, load_steps
from gist_rag_kernels.kv_quant.packed import PackedKV
from gist_rag_kernels.runtime import Compilation

BLOCK = 16
"""Slots of a tile: 16 are about what a head keeps of a passage of 128 tokens at 8x."""


@triton.jit
def _move(
    keys,
    values,
    cos,
    sin,
    destination,
    out_keys,
    out_values,
    total,
    D: tl.constexpr,
    BACKWARD: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rotate and scatter; backward gathers and rotates back, since a rotation's transpose is its
    inverse. ``keys`` and ``values`` are what is read, so backward they are the gradients."""
    HALF: tl.constexpr = D // 2
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < total
    place = tl.load(destination + slot, mask=inside, other=0).to(tl.int64)
    if BACKWARD:
        source, target = place, slot
    else:
        source, target = slot, place
    column = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (column < HALF)

    left, right = load_halves(keys, source[:, None], column, mask, 16, HALF)
    left_cos, right_cos = load_halves(cos, slot[:, None], column, mask, 16, HALF)
    left_sin, right_sin = load_halves(sin, slot[:, None], column, mask, 16, HALF)
    if BACKWARD:
        turned_left = left * left_cos + right * right_sin
        turned_right = right * right_cos - left * left_sin
    else:
        turned_left = left * left_cos - right * left_sin
        turned_right = right * right_cos + left * right_sin
    _store(out_keys, target[:, None], column, turned_left, turned_right, mask, HALF)
    left, right = load_halves(values, source[:, None], column, mask, 16, HALF)
    _store(out_values, target[:, None], column, left, right, mask, HALF)


@triton.jit
def _compose_packed(
    keys,
    values,
    key_scales,
    value_scales,
    rows,
    key_starts,
    offsets,
    base,
    cos,
    sin,
    positions,
    destination,
    bias,
    order,
    room,
    block_table,
    out_keys,
    out_values,
    out_bias,
    out_order,
    rows_each,
    page_size,
    D: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    TABLE: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Program ``(g, i)`` takes every ``num_programs(1)``-th tile of row ``g``, from tile ``i`` on.

    Absent pointers are ``None`` and cost nothing. ``TABLE`` is the width of the tables.
    """
    HALF: tl.constexpr = D // 2
    row, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None, :]
    held = column < HALF
    first = tl.load(rows + row).to(tl.int64)
    length = (tl.load(rows + row + 1) - first).to(tl.int32)
    passage = row // rows_each
    start = tl.load(base + passage).to(tl.int64)
    target = tl.load(destination + row).to(tl.int64)
    limit = length
    if room is not None:
        limit = tl.maximum(tl.load(room + row).to(tl.int32), length)
    if out_order is not None:
        rank = tl.load(order + passage).to(out_order.dtype.element_ty)
    if key_scales is not None:
        scale_row = row.to(tl.int64)
        if KEY_GROUP > 0:
            scale_row = tl.load(key_starts + row).to(tl.int64)
        else:
            left_step, right_step = load_halves(key_scales, scale_row, column, held, 16, HALF)

    for tile in range(part * SLOTS, limit, tl.num_programs(1) * SLOTS):
        local = tile + tl.arange(0, SLOTS)
        there, inside = local < length, local < limit
        source = first + local
        slot = target + local
        if block_table is not None:
            page = tl.load(block_table + slot // page_size, mask=inside, other=0).to(tl.int64)
            slot = page * page_size + slot % page_size
        mask, room_mask = there[:, None] & held, inside[:, None] & held

        left, right = load_halves(keys, source[:, None], column, mask, BITS, HALF)
        if key_scales is not None:
            if KEY_GROUP > 0:
                group = scale_row + (local // KEY_GROUP)[:, None]
                left_step, right_step = load_halves(key_scales, group, column, mask, 16, HALF)
            left, right = left * left_step, right * right_step
        position = start + tl.load(offsets + source, mask=there, other=0).to(tl.int64)
        known = mask & ((position >= 0) & (position < positions))[:, None]
        angle = position.to(tl.int32)[:, None] * TABLE + column
        nan = float("nan")
        left_cos = tl.load(cos + angle, mask=known, other=nan)
        left_sin = tl.load(sin + angle, mask=known, other=nan)
        if TABLE == D:
            right_cos = tl.load(cos + angle + HALF, mask=known, other=nan)
            right_sin = tl.load(sin + angle + HALF, mask=known, other=nan)
        else:
            right_cos, right_sin = left_cos, left_sin
        turned_left = tl.where(mask, left * left_cos - right * left_sin, 0.0)
        turned_right = tl.where(mask, right * right_cos + left * right_sin, 0.0)
        _store(out_keys, slot[:, None], column, turned_left, turned_right, room_mask, HALF)

        left, right = load_halves(values, source[:, None], column, mask, BITS, HALF)
        if value_scales is not None:
            left_step2, right_step2 = load_steps(
                value_scales, source[:, None], column, there[:, None], mask, VALUE_GROUP, D
            )
            left, right = left * left_step2, right * right_step2
        _store(out_values, slot[:, None], column, left, right, room_mask, HALF)

        if out_bias is not None:
            mass = tl.load(bias + source, mask=there, other=-float("inf")).to(tl.float32)
            tl.store(out_bias + slot, mass, mask=inside)
        if out_order is not None:
            tl.store(out_order + slot, tl.where(there, rank, 0), mask=inside)


@triton.jit
def _store(pointer, row, column, left, right, mask, HALF: tl.constexpr):
    target = pointer + row * (2 * HALF) + column
    tl.store(target, left.to(pointer.dtype.element_ty), mask=mask)
    tl.store(target + HALF, right.to(pointer.dtype.element_ty), mask=mask)


def compose_kv(
    keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, destination: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """As ``reference.compose_kv``, with gradients for keys and values only."""
    found = _ComposeKV.apply(keys, values, cos, sin, destination, num_slots)
    return found[0], found[1]


class _ComposeKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, values, cos, sin, destination, num_slots):
        cos, sin, destination = cos.contiguous(), sin.contiguous(), destination.contiguous()
        ctx.save_for_backward(cos, sin, destination)
        new = keys.new_empty if len(keys) == num_slots else keys.new_zeros
        out_keys, out_values = new(num_slots, keys.shape[1]), new(num_slots, keys.shape[1])
        _launch_move(keys, values, cos, sin, destination, out_keys, out_values, False)
        return out_keys, out_values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_keys, grad_values):
        cos, sin, destination = ctx.saved_tensors
        out_keys = grad_keys.new_empty(cos.shape)
        out_values = grad_values.new_empty(cos.shape)
        _launch_move(grad_keys, grad_values, cos, sin, destination, out_keys, out_values, True)
        return out_keys, out_values, None, None, None, None


def _launch_move(
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    destination: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    backward: bool,
) -> None:
    slots, size = cos.shape
    with torch.cuda.device_of(keys):
        _move[(triton.cdiv(slots, BLOCK),)](
            keys.contiguous(),
            values.contiguous(),
            cos,
            sin,
            destination,
            out_keys,
            out_values,
            slots,
            size,
            backward,
            BLOCK,
            _width(size),
            num_warps=4,
        )


def compose_packed(
    packed: PackedKV,
    offsets: Tensor,
    base: Tensor,
    cos: Tensor,
    sin: Tensor,
    destination: Tensor,
    out: Composed,
    bias: Tensor | None,
    order: Tensor | None,
    room: Tensor | None,
    block_table: Tensor | None,
    page_size: int,
) -> Composed:
    """As ``reference.compose_packed``; nothing is read back from the device."""
    size = packed.head_dim
    filled = len(out.keys) if room is not None and block_table is None else packed.num_slots
    mean = triton.cdiv(filled, packed.num_rows)
    parts = min(max(triton.cdiv(mean, 2 * BLOCK), 1), 64)
    with torch.cuda.device_of(packed.keys):
        _compose_packed[(packed.num_rows, parts)](
            packed.keys.contiguous(),
            packed.values.contiguous(),
            _contiguous(packed.key_scales),
            _contiguous(packed.value_scales),
            packed.rows.contiguous(),
            packed.key_starts() if packed.key_group else None,
            offsets.contiguous(),
            base.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            len(cos),
            destination.contiguous(),
            _contiguous(bias),
            _contiguous(order),
            _contiguous(room),
            _contiguous(block_table),
            *out,
            packed.num_rows // len(base),
            max(page_size, 1),
            size,
            packed.bits,
            packed.key_group,
            packed.value_group,
            cos.shape[1],
            BLOCK,
            _width(size),
            num_warps=4,
        )
    return out


def compilations() -> list[Compilation]:
    """Both directions of ``compose_kv``; packed gists of each width, padded as an engine has them
    and paged."""
    found = []
    floats = dict.fromkeys(("keys", "values", "out_keys", "out_values"), "*bf16")
    move = floats | {"cos": "*fp32", "sin": "*fp32", "destination": "*i64", "total": "i32"}
    for name, backward in (("forward", False), ("backward", True)):
        sizes: dict[str, object] = {
            "D": 128,
            "BACKWARD": backward,
            "SLOTS": BLOCK,
            "WIDTH": _width(128),
        }
        found.append(Compilation(f"{name}_bf16_d128", _move, move, sizes, 4, 3, True))
    for stored, size, paged, group in (
        ("bf16", 128, False, 0),
        ("i8", 128, False, 0),
        ("i8", 128, True, 0),
        ("u8", 128, True, 64),
        ("u8", 80, False, 0),
    ):
        signature = dict.fromkeys(("rows", "base", "destination", "room", "key_starts"), "*i64")
        signature |= dict.fromkeys(("keys", "values"), f"*{stored}")
        signature |= dict.fromkeys(
            ("out_keys", "out_values", "key_scales", "value_scales"), "*bf16"
        )
        signature |= dict.fromkeys(("cos", "sin", "out_bias"), "*fp32")
        signature |= {"bias": "*fp32", "positions": "i32"}
        signature |= dict.fromkeys(("offsets", "order", "out_order", "block_table"), "*i32")
        signature |= {"rows_each": "i32:16", "page_size": "i32:16"}
        absent = ["room"] if paged else ["block_table"]
        absent += ["key_scales", "value_scales"] if stored == "bf16" else []
        absent += [] if group else ["key_starts"]
        for name in absent:
            del signature[name]
        constants: dict[str, object] = {
            **dict.fromkeys(absent),
            "D": size,
            "BITS": {"bf16": 16, "i8": 8, "u8": 4}[stored],
            "KEY_GROUP": group,
            "VALUE_GROUP": group // 2 or size,
            "TABLE": size // 2,
            "SLOTS": BLOCK,
            "WIDTH": _width(size),
        }
        kind = {"bf16": "bf16", "i8": "int8", "u8": "int4"}[stored]
        name = f"packed_{kind}_{'paged' if paged else 'padded'}_d{size}"
        found.append(Compilation(name, _compose_packed, signature, constants, 4, 3, True))
    return found


def _width(size: int) -> int:
    return int(triton.next_power_of_2(size // 2))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
