"""Plain torch ``kv_quant``: the truth that the kernels are compared with, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag_kernels.kv_quant.packed import LARGEST, PackedKV, group_edges


def quantise(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    bits: int,
    key_group: int,
    value_group: int,
    scale_dtype: torch.dtype,
) -> PackedKV:
    lengths = group_edges(rows, key_group).diff()
    group = torch.repeat_interleave(lengths)[:, None].expand_as(keys)
    peaks = keys.new_zeros(len(lengths), keys.shape[1], dtype=torch.float32)
    peaks = peaks.scatter_reduce(0, group, keys.float().abs(), "amax")  # (G, D)
    key_scales = (peaks / LARGEST[bits]).to(scale_dtype)

    grouped = values.float().unflatten(1, (-1, value_group))  # (M, D / g, g)
    value_scales = (grouped.abs().amax(2) / LARGEST[bits]).to(scale_dtype)
    return PackedKV(
        keys=_store(_round(keys.float(), key_scales.repeat_interleave(lengths, 0), bits), bits),
        values=_store(_round(grouped, value_scales[:, :, None], bits).flatten(1), bits),
        rows=rows,
        key_scales=key_scales,
        value_scales=value_scales if value_group < keys.shape[1] else value_scales[:, 0],
        key_group=key_group,
    )


def dequantise(packed: PackedKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if packed.key_scales is None or packed.value_scales is None:
        return packed.keys.to(dtype), packed.values.to(dtype)
    keys, values = load(packed.keys), load(packed.values)
    lengths = group_edges(packed.rows, packed.key_group).diff()
    key_scales = packed.key_scales.float().repeat_interleave(lengths, 0)  # (M, D)
    groups = packed.head_dim // packed.value_group
    value_scales = packed.value_scales.float().view(packed.num_slots, groups, 1)
    values = values.unflatten(1, (groups, packed.value_group)) * value_scales
    return (keys * key_scales).to(dtype), values.flatten(1).to(dtype)


def load(stored: Tensor) -> Tensor:
    """Stored numbers as float32 ``(M, D)``, not yet scaled."""
    if stored.dtype != torch.uint8:
        return stored.float()
    nibbles = torch.cat((stored & 15, stored >> 4), dim=1).int()
    return ((nibbles ^ 8) - 8).float()


def _round(x: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Integers nearest to ``x / scales``, ties to even."""
    steps, largest = scales.float(), LARGEST[bits]
    return (x / torch.where(steps > 0, steps, 1.0)).round().clamp(-largest, largest)


def _store(integers: Tensor, bits: int) -> Tensor:
    stored = integers.to(torch.int8)
    if bits == 8:
        return stored
    low, high = stored.view(torch.uint8).chunk(2, dim=1)
    return (low & 15) | (high << 4)
