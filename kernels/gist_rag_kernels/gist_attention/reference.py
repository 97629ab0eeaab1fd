"""Plain torch ``gist_attention``: a dense mask, the truth that the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(is_gist: Tensor, local_from: Tensor, gist_from: Tensor, prefix: Tensor) -> Tensor:
    """``(B, S, S)`` bool: row ``q`` may see column ``k``; ``prefix (B,)``."""
    slot = torch.arange(is_gist.shape[1], device=is_gist.device)
    q, k = slot[:, None], slot[None, :]
    first = torch.where(is_gist[:, None, :], gist_from[:, :, None], local_from[:, :, None])
    return (k <= q) & ((k >= first) | (k < prefix[:, None, None]))


def gist_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_gist: Tensor,
    local_from: Tensor,
    gist_from: Tensor,
    prefix: Tensor,
    scaling: float,
) -> Tensor:
    mask = visibility(is_gist, local_from, gist_from, prefix)[:, None]  # (B, 1, S, S)
    blind = ~mask.any(dim=-1, keepdim=True)  # padding that sees nothing
    group = query.shape[1] // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, dim=1),
        value.repeat_interleave(group, dim=1),
        attn_mask=mask | blind,
        scale=scaling,
    )
    return out.masked_fill(blind, 0.0)
