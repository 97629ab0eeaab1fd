"""Plain torch ``slot_attention``: query heads of one group are folded into rows, so that keys
and values are never repeated and a bias per KV head fits SDPA's mask."""

from __future__ import annotations

import torch
from torch import Tensor


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
