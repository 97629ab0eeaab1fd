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


def token_importance(full: Tensor, closed: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """How much more the context says about a token than guessing does.

    ``exp(min(log P_full - log P_closed, gamma))`` (arXiv:2412.17483), not normalised.

    Args:
        full, closed: ``(N, V)`` logits with and without the context.
        targets: ``(N,)``.

    Returns:
        ``(N,)``, without gradient.
    """
    with torch.no_grad():
        gain = cross_entropy(closed, targets) - cross_entropy(full, targets)
        return gain.clamp_max(gamma).exp()


def capacity(occupancy: Tensor, budget: float, num_tokens: int | Tensor) -> Tensor:
    """How far a soft cache is filled above its budget, as a share of all tokens; a scalar.

    ``mean over heads and times t of max(0, occupancy_t - budget) / t`` (arXiv:2512.03324).

    Args:
        occupancy: ``(R,)`` what is left of a text in each head, in tokens, after ``num_tokens`` of
            it, or ``(R, T)`` after each of ``num_tokens`` ``(T,)``.
    """
    return ((occupancy - budget).relu() / num_tokens).mean()
