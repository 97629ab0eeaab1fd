"""Plain torch ``compose_kv`` and ``compose_packed``: the truth that any kernel is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gist_rag_kernels.kv_quant import reference as kv_quant
from gist_rag_kernels.kv_quant.packed import PackedKV


class Composed(NamedTuple):
    """A buffer of composed slots.

    Attributes:
        keys: ``(S, D)`` after RoPE.
        values: ``(S, D)``.
        bias: ``(S,)`` float32 log-mass, ``-inf`` where there is no slot; ``None`` if not asked for.
        order: ``(S,)`` which passage a slot belongs to, 0 where there is no slot; or ``None``.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    order: Tensor | None


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in float32 to ``keys (..., D)``.

    Args:
        cos, sin: broadcast to ``(..., D)``, or to ``(..., D / 2)`` where both halves turn alike.
    """
    left, right = keys.float().chunk(2, dim=-1)
    whole = cos.shape[-1] == keys.shape[-1]
    left_cos, right_cos = cos.chunk(2, dim=-1) if whole else (cos, cos)
    left_sin, right_sin = sin.chunk(2, dim=-1) if whole else (sin, sin)
    turned = left * left_cos - right * left_sin, right * right_cos + left * right_sin
    return torch.cat(turned, dim=-1).to(keys.dtype)


def compose_kv(
    keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, destination: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    empty = keys.new_zeros(num_slots, keys.shape[1])
    rotated = rotate(keys, cos, sin)
    return empty.index_copy(0, destination, rotated), empty.index_copy(0, destination, values)


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
    lengths = packed.rows.diff().long()
    rows = torch.arange(packed.num_rows, device=lengths.device)
    row = rows.repeat_interleave(lengths)  # (M,)
    passage = row // max(packed.num_rows // max(len(base), 1), 1)

    def place(row: Tensor, local: Tensor) -> Tensor:
        slot = destination.long()[row] + local
        if block_table is None:
            return slot
        page = block_table.flatten()[slot // page_size].long()
        return page * page_size + slot % page_size

    slot = place(row, _rank(lengths))
    position = base.long()[passage] + offsets.long()
    floats = packed.keys.dtype if packed.bits == 16 else torch.float32
    keys, values = kv_quant.dequantise(packed, floats)
    rotated = rotate(keys.float(), cos[position], sin[position])
    out.keys.index_copy_(0, slot, rotated.to(out.keys.dtype))
    out.values.index_copy_(0, slot, values.to(out.values.dtype))
    if out.bias is not None and bias is not None:
        out.bias.index_copy_(0, slot, bias.float())
    if out.order is not None and order is not None:
        out.order.index_copy_(0, slot, order[passage].to(out.order.dtype))
    if room is not None:
        rest = (room.long() - lengths).clamp(min=0)
        row = rows.repeat_interleave(rest)
        slot = place(row, lengths[row] + _rank(rest))
        out.keys.index_fill_(0, slot, 0)
        out.values.index_fill_(0, slot, 0)
        if out.bias is not None:
            out.bias.index_fill_(0, slot, -torch.inf)
        if out.order is not None:
            out.order.index_fill_(0, slot, 0)
    return out


def _rank(counts: Tensor) -> Tensor:
    """``0, 1, .. counts[0] - 1, 0, 1, ..``: the place of each member within its group."""
    every = torch.arange(int(counts.sum()), device=counts.device)
    return every - (counts.cumsum(0) - counts).repeat_interleave(counts)
