"""Losses over logits. Nothing here knows a model or a state."""

from __future__ import annotations

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
