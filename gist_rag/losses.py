"""Losses over logits. Nothing here knows a model or a state."""

from __future__ import annotations

import torch
from torch import Tensor


def distill(teacher: Tensor, student: Tensor) -> Tensor:
    """``KL(teacher || student)`` per row, in nats.

    Args:
        teacher: ``(..., V)`` logits.
        student: ``(..., V)`` logits.

    Returns:
        ``(...)``.
    """
    target, given = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (target.exp() * (target - given)).sum(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood per row, in nats.

    Args:
        logits: ``(N, V)``.
        targets: ``(N,)``.

    Returns:
        ``(N,)``.
    """
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
