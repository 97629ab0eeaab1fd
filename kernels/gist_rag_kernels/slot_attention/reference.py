"""Plain torch: the truth that the kernel is compared with, and the path wherever it cannot run.

Query heads of one group are folded into rows, so that keys and values are never repeated and a
bias per KV head fits SDPA's mask. Ragged rows are padded to the longest one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag_kernels.slot_attention.ragged import RaggedSlots


def slot_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    batch, query_heads, rows, size = query.shape
    heads, group = key.shape[1], query_heads // key.shape[1]
    if bias.shape[2] > 1 and group > 1:
        bias = bias[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)  # (B, H, group * Q, K)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, heads, group * rows, size),
        key,
        value,
        attn_mask=bias.to(query.dtype),
        scale=scaling,
    )
    return out.view(batch, query_heads, rows, size)


def ragged_slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: RaggedSlots,
    scaling: float,
    visible: Tensor | None,
    seen: Tensor | None,
) -> Tensor:
    slot_keys, slot_values, slot_bias, order = padded(slots, query.dtype)
    bias = slot_bias[:, :, None]  # (B, H, 1, N)
    if seen is not None:
        bias = bias.masked_fill(order[:, :, None] >= seen[:, None, :, None], -torch.inf)
    local = torch.zeros((), device=key.device).masked_fill(
        ~local_visibility(visible, query.shape[2], key.shape[2], key.device), -torch.inf
    )
    bias = torch.cat(
        (
            bias.expand(-1, -1, query.shape[2], -1),
            local.expand(key.shape[0], key.shape[1], query.shape[2], -1),
        ),
        dim=-1,
    )
    if bias.shape[-1] == 0:
        return torch.zeros_like(query)
    blind = bias.isneginf().all(dim=-1, keepdim=True)  # (B, H, Q, 1), padding that sees nothing
    out = slot_attention(
        query,
        torch.cat((slot_keys, key), dim=2),
        torch.cat((slot_values, value), dim=2),
        bias.masked_fill(blind, 0.0),
        scaling,
    )
    group = query.shape[1] // key.shape[1]
    return out.masked_fill(blind.repeat_interleave(group, dim=1), 0.0)


def local_visibility(visible: Tensor | None, rows: int, keys: int, device: torch.device) -> Tensor:
    """``(B or 1, 1, Q, K)`` bool: a mask per query is the whole rule; otherwise it is causal,
    aligned to the right end, and ``(B, K)`` hides keys from everyone."""
    if visible is not None and visible.dim() == 4:
        return visible
    causal = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)[None, None]
    return causal if visible is None else causal & visible[:, None, None]


def padded(slots: RaggedSlots, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated keys and values ``(B, H, N, D)`` in ``dtype``, bias (``-inf`` on padding) and order
    ``(B, H, N)``."""
    width = int(slots.lengths.max()) if slots.lengths.numel() else 0
    rank = torch.arange(width, device=slots.starts.device)
    inside = rank < slots.lengths[..., None]
    index = torch.where(inside, slots.starts[..., None] + rank, 0)  # (B, H, N)
    bias = slots.bias[index].masked_fill(~inside, -torch.inf)
    keys, values = (
        _dequantised(slots, index)
        if slots.quantised
        else (
            slots.keys[index],
            slots.values[index],
        )
    )
    keys = keys.masked_fill(~inside[..., None], 0)
    values = values.masked_fill(~inside[..., None], 0)
    return keys.to(dtype), values.to(dtype), bias, slots.order[index]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Signed 4-bit numbers ``(..., D)`` of bytes ``(..., D // 2)``, low halves first."""
    both = torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8)
    return torch.where(both > 7, both - 16, both)


def _dequantised(slots: RaggedSlots, index: Tensor) -> tuple[Tensor, Tensor]:
    assert slots.key_scales is not None
    assert slots.scale_rows is not None
    assert slots.value_scales is not None
    assert slots.positions is not None
    assert slots.cos is not None
    assert slots.sin is not None
    keys, values = slots.keys[index], slots.values[index]
    if slots.bits == 4:
        keys, values = unpack_nibbles(keys), unpack_nibbles(values)
    keys = keys.float() * slots.key_scales[slots.scale_rows[index].long()].float()
    place = slots.positions[index].long()
    half = keys.shape[-1] // 2
    cos, sin = slots.cos[place, :half].float(), slots.sin[place, :half].float()
    left, right = keys.split(half, dim=-1)
    keys = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return keys, values.float() * slots.value_scales[index].float()[..., None]
