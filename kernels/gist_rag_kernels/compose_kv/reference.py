"""Plain torch ``compose_kv``: the truth that any kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in float32 to ``keys (..., D)`` with ``cos`` and ``sin`` that broadcast to it."""
    left, right = keys.float().chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (keys.float() * cos + turned * sin).to(keys.dtype)


def compose_kv(
    keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, destination: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    empty = keys.new_zeros(num_slots, keys.shape[1])
    rotated = rotate(keys, cos, sin)
    return empty.index_copy(0, destination, rotated), empty.index_copy(0, destination, values)
