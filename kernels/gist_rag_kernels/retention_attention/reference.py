"""Plain torch ``retention_attention``: a dense bias, the truth that the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag_kernels.slot_attention.reference import slot_attention


def retention_attention(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, scaling: float
) -> Tensor:
    rows, keys = query.shape[2], key.shape[2]
    place = torch.arange(keys, device=key.device)
    age = place[keys - rows :, None] - place  # (Q, K)
    bias = (age * log_beta[:, :, None].float()).masked_fill(age < 0, -torch.inf)  # (B, H, Q, K)
    out = slot_attention(query.float(), key.float(), value.float(), bias, scaling)
    return out.to(query.dtype)
