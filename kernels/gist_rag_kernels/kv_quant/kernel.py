# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton ``kv_quant``.

Everything is done in halves of a head, channels ``j`` and ``j + D / 2``: they share a byte in four
bits, and RoPE turns them into each other. A program of the key kernels owns one group of slots and
32 channels of each half, and walks the group twice (peaks, then integers; the second walk reads the
cache). A program of the value kernels owns a block of slots' groups of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gist_rag_kernels.kv_quant.packed import PackedKV, group_edges
from gist_rag_kernels.runtime import Compilation

CHANNELS = tl.constexpr(32)
"""Channels of each half that a key program owns."""


@triton.jit
def nibbles(byte):
    """The signed integers in the low and the high half of bytes, as int32."""
    wide = byte.to(tl.int32)
    return ((wide & 15) ^ 8) - 8, ((wide >> 4) ^ 8) - 8


@triton.jit
def load_halves(pointer, row, column, mask, BITS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the given rows as float32, not yet scaled; zeros outside of ``mask``.

    ``row`` (int64) and ``column`` broadcast to the tile. ``BITS`` is 4, 8 or 16, where 16 stands
    for any float dtype.
    """
    if BITS == 4:
        byte = tl.load(pointer + row * HALF + column, mask=mask, other=0)
        low, high = nibbles(byte)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        left = tl.load(pointer + row * (2 * HALF) + column, mask=mask, other=0)
        right = tl.load(pointer + row * (2 * HALF) + column + HALF, mask=mask, other=0)
        return left.to(tl.float32), right.to(tl.float32)


@triton.jit
def _store_halves(pointer, row, column, left, right, mask, BITS: tl.constexpr, HALF: tl.constexpr):
    if BITS == 4:
        byte = (left.to(tl.int32) & 15) | ((right.to(tl.int32) & 15) << 4)
        tl.store(pointer + row * HALF + column, byte.to(tl.uint8), mask=mask)
    else:
        target = pointer + row * (2 * HALF) + column
        tl.store(target, left.to(pointer.dtype.element_ty), mask=mask)
        tl.store(target + HALF, right.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _step(peak, scales, Q: tl.constexpr):
    """A group's step, rounded to the dtype of ``scales``.

    To bfloat16 by hand: the error bound needs rounding to nearest, and Triton's interpreter cuts.
    """
    step = tl.math.div_rn(peak, Q)
    if scales.dtype.element_ty == tl.bfloat16:
        word = step.to(tl.int32, bitcast=True)
        word += 0x7FFF + ((word >> 16) & 1)
        return (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return step.to(scales.dtype.element_ty)


@triton.jit
def _round(x, step, Q: tl.constexpr):
    """The nearest integer to ``x / step`` as float32, ties to even as ``torch.round`` has them."""
    step = step.to(tl.float32)
    exact = tl.math.div_rn(x, tl.where(step > 0, step, 1.0))
    exact = tl.minimum(tl.maximum(exact, -Q), Q)
    return (exact + 12582912.0) - 12582912.0  # 1.5 * 2**23: float32 has no digits below one there


@triton.jit
def _quantise_keys(
    keys, edges, out, scales, D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    HALF: tl.constexpr = D // 2
    Q: tl.constexpr = 127.0 if BITS == 8 else 7.0
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < HALF
    first = tl.load(edges + group)
    length = (tl.load(edges + group + 1) - first).to(tl.int32)

    left_peak = tl.zeros((CHANNELS,), tl.float32)
    right_peak = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, length, BLOCK):
        local = start + tl.arange(0, BLOCK)
        mask = (local < length)[:, None] & inside[None, :]
        left, right = load_halves(keys, (first + local)[:, None], column[None, :], mask, 16, HALF)
        left_peak = tl.maximum(left_peak, tl.max(tl.abs(left), 0))
        right_peak = tl.maximum(right_peak, tl.max(tl.abs(right), 0))
    left_step, right_step = _step(left_peak, scales, Q), _step(right_peak, scales, Q)
    tl.store(scales + group * D + column, left_step, mask=inside)
    tl.store(scales + group * D + HALF + column, right_step, mask=inside)

    for start in range(0, length, BLOCK):
        local = start + tl.arange(0, BLOCK)
        row = (first + local)[:, None]
        mask = (local < length)[:, None] & inside[None, :]
        left, right = load_halves(keys, row, column[None, :], mask, 16, HALF)
        left, right = _round(left, left_step[None, :], Q), _round(right, right_step[None, :], Q)
        _store_halves(out, row, column[None, :], left, right, mask, BITS, HALF)


@triton.jit
def _dequantise_keys(
    keys, edges, scales, out, D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    HALF: tl.constexpr = D // 2
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < HALF
    first = tl.load(edges + group)
    length = (tl.load(edges + group + 1) - first).to(tl.int32)
    left_step = tl.load(scales + group * D + column, mask=inside, other=0).to(tl.float32)
    right_step = tl.load(scales + group * D + HALF + column, mask=inside, other=0).to(tl.float32)
    for start in range(0, length, BLOCK):
        local = start + tl.arange(0, BLOCK)
        row = (first + local)[:, None]
        mask = (local < length)[:, None] & inside[None, :]
        left, right = load_halves(keys, row, column[None, :], mask, BITS, HALF)
        left, right = left * left_step[None, :], right * right_step[None, :]
        _store_halves(out, row, column[None, :], left, right, mask, 16, HALF)


@triton.jit
def _quantise_values(
    values,
    out,
    scales,
    total,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile holds ``BLOCK`` pairs of groups, one in each half; one group per slot if it is D."""
    HALF: tl.constexpr = D // 2
    Q: tl.constexpr = 127.0 if BITS == 8 else 7.0
    SPAN: tl.constexpr = GROUP if GROUP < HALF else HALF
    PAIRS: tl.constexpr = HALF // SPAN  # pairs of groups in a slot
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < total
    row, part = pair // PAIRS, pair % PAIRS
    column = part[:, None] * SPAN + tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (tl.arange(0, WIDTH) < SPAN)[None, :]
    left, right = load_halves(values, row[:, None], column, mask, 16, HALF)
    left_peak, right_peak = tl.max(tl.abs(left), 1), tl.max(tl.abs(right), 1)
    if GROUP == D:
        step = _step(tl.maximum(left_peak, right_peak), scales, Q)
        tl.store(scales + row, step, mask=inside)
        left, right = _round(left, step[:, None], Q), _round(right, step[:, None], Q)
    else:
        left_step, right_step = _step(left_peak, scales, Q), _step(right_peak, scales, Q)
        target = scales + row * (2 * PAIRS) + part
        tl.store(target, left_step, mask=inside)
        tl.store(target + PAIRS, right_step, mask=inside)
        left, right = _round(left, left_step[:, None], Q), _round(right, right_step[:, None], Q)
    _store_halves(out, row[:, None], column, left, right, mask, BITS, HALF)


@triton.jit
def _dequantise_values(
    values,
    scales,
    out,
    total,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    row = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < total) & (column < HALF)
    left, right = load_halves(values, row, column, mask, BITS, HALF)
    left_step, right_step = load_steps(scales, row, column, row < total, mask, GROUP, D)
    _store_halves(out, row, column, left * left_step, right * right_step, mask, 16, HALF)


@triton.jit
def load_steps(scales, row, column, inside, mask, GROUP: tl.constexpr, D: tl.constexpr):
    """Steps of values for both halves of slots; they broadcast to the tile."""
    if GROUP == D:
        step = tl.load(scales + row, mask=inside, other=0).to(tl.float32)
        return step, step
    else:
        PARTS: tl.constexpr = D // GROUP
        source = scales + row * PARTS + column // GROUP
        left = tl.load(source, mask=mask, other=0).to(tl.float32)
        right = tl.load(source + PARTS // 2, mask=mask, other=0).to(tl.float32)
        return left, right


def quantise(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    bits: int,
    key_group: int,
    value_group: int,
    scale_dtype: torch.dtype,
) -> PackedKV:
    """As ``reference.quantise``, which it equals bit by bit."""
    keys, values = keys.detach().contiguous(), values.detach().contiguous()
    slots, size = keys.shape
    edges = group_edges(rows, key_group)
    groups, half = len(edges) - 1, size // 2
    stored = (size, torch.int8) if bits == 8 else (half, torch.uint8)
    out_keys = keys.new_empty(slots, stored[0], dtype=stored[1])
    out_values = torch.empty_like(out_keys)
    key_scales = keys.new_empty(groups, size, dtype=scale_dtype)
    value_scales = keys.new_empty(slots, size // value_group, dtype=scale_dtype)
    with torch.cuda.device_of(keys):
        _quantise_keys[(groups, triton.cdiv(half, CHANNELS.value))](
            keys, edges, out_keys, key_scales, size, bits, BLOCK=_slots_of(key_group), num_warps=4
        )
        block, width = _tile(min(value_group, half))
        total = slots * (half // min(value_group, half))
        _quantise_values[(triton.cdiv(total, block),)](
            values,
            out_values,
            value_scales,
            total,
            size,
            value_group,
            bits,
            block,
            width,
            num_warps=4,
        )
    if value_group == size:
        value_scales = value_scales[:, 0]
    return PackedKV(out_keys, out_values, rows, key_scales, value_scales, key_group)


def dequantise(packed: PackedKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``reference.dequantise`` for eight and four bits."""
    assert packed.key_scales is not None
    assert packed.value_scales is not None
    slots, size, bits = packed.num_slots, packed.head_dim, packed.bits
    keys = packed.keys.new_empty(slots, size, dtype=dtype)
    values = torch.empty_like(keys)
    edges = group_edges(packed.rows, packed.key_group)
    with torch.cuda.device_of(keys):
        _dequantise_keys[(len(edges) - 1, triton.cdiv(size // 2, CHANNELS.value))](
            packed.keys.contiguous(),
            edges,
            packed.key_scales.contiguous(),
            keys,
            size,
            bits,
            BLOCK=_slots_of(packed.key_group),
            num_warps=4,
        )
        block, width = _tile(size // 2)
        _dequantise_values[(triton.cdiv(slots, block),)](
            packed.values.contiguous(),
            packed.value_scales.contiguous(),
            values,
            slots,
            size,
            packed.value_group,
            bits,
            block,
            width,
            num_warps=4,
        )
    return keys, values


def compilations() -> list[Compilation]:
    """Eight bits as stored by default, and four bits in groups at a head size that needs masks."""
    found = []
    for bits, size, key_group, group in ((8, 128, 0, 128), (4, 80, 64, 40)):
        stored = "*i8" if bits == 8 else "*u8"
        head: dict[str, object] = {"D": size, "BITS": bits}
        keys = head | {"BLOCK": _slots_of(key_group)}
        narrow, wide = _tile(min(group, size // 2)), _tile(size // 2)
        into = {"keys": "*bf16", "edges": "*i64", "out": stored, "scales": "*bf16"}
        back = {"keys": stored, "edges": "*i64", "out": "*bf16", "scales": "*bf16"}
        end = f"int{bits}_d{size}"
        jobs: list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object]]] = [
            ("quantise_keys", _quantise_keys, into, keys),
            ("dequantise_keys", _dequantise_keys, back, keys),
            (
                "quantise_values",
                _quantise_values,
                {"values": "*bf16", "out": stored, "scales": "*bf16", "total": "i32"},
                head | {"GROUP": group, "BLOCK": narrow[0], "WIDTH": narrow[1]},
            ),
            (
                "dequantise_values",
                _dequantise_values,
                {"values": stored, "out": "*bf16", "scales": "*bf16", "total": "i32"},
                head | {"GROUP": group, "BLOCK": wide[0], "WIDTH": wide[1]},
            ),
        ]
        for name, kernel, signature, constants in jobs:
            hot = name.startswith("de")
            found.append(Compilation(f"{name}_{end}", kernel, signature, constants, 4, 2, hot))
    return found


def _slots_of(group: int) -> int:
    """Slots that a key program takes at once."""
    return min(max(triton.next_power_of_2(group), 16), 64) if group else 64


def _tile(span: int) -> tuple[int, int]:
    """Rows and padded width of a tile of 2048 numbers of each half."""
    width = triton.next_power_of_2(span)
    return max(2048 // width, 1), width
