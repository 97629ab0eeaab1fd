"""Plain torch: scores, which the kernel is compared with, and fits, which have no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RIDGE = 1e-4
CHUNK = 1 << 22
"""Elements of the attention matrices that are held at a time."""


def score_keys(
    queries: Tensor, prefix: Tensor, keys: Tensor, scaling: float, how: str
) -> tuple[Tensor, Tensor]:
    scores, shares = [], []
    for rows in _chunks(len(queries), queries.shape[1] * (prefix.shape[1] + keys.shape[1])):
        every = torch.cat((prefix[rows], keys[rows]), dim=1).transpose(1, 2)
        attention = (queries[rows] @ every * scaling).softmax(-1)[..., prefix.shape[1] :]
        scores.append(attention.amax(1) if how == "max" else attention.square().mean(1).sqrt())
        shares.append(attention.sum(-1))
    return torch.cat(scores), torch.cat(shares)


def fit_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    share: Tensor,
    scaling: float,
    masses: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    mass, fitted = torch.ones_like(keep, dtype=torch.float32), values.clone()
    for rows, index, real in kept_groups(keep, lambda _: queries.shape[1] * keys.shape[1]):
        weight = share[rows] / share[rows].square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
        attention = (queries[rows] @ keys[rows].transpose(1, 2) * scaling).softmax(-1)
        w, v = _fit(attention, values[rows], index, real, weight[..., None], masses)
        mass[rows[:, None], index] = torch.where(real, w, 1.0)
        fitted[rows[:, None], index] = v
    return mass[keep], fitted[keep]


def _fit(
    attention: Tensor,
    values: Tensor,
    index: Tensor,
    real: Tensor,
    weight: Tensor,
    masses: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Masses ``(R, n)`` and values ``(R, n, D)`` of the slots ``index``, padded where not real.

    ``attention`` is ``(R, Q, T)``, ``weight`` ``(R, Q, 1)``.
    """
    kept = attention.gather(2, index[:, None].expand(-1, attention.shape[1], -1)) * real[:, None]
    part = kept * weight
    target = (part * weight).sum(1)
    mass = nonnegative_least_squares(part.transpose(1, 2) @ part, target)
    mass = mass.clamp(*masses)

    read = kept * mass[:, None]
    read = read / read.sum(-1, keepdim=True).clamp_min(1e-9)
    old = values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
    residual = (attention @ values - read @ old) * weight
    read = read * weight
    ridge = RIDGE * attention.shape[1] / real.sum(1, keepdim=True)
    gram = read.transpose(1, 2) @ read + torch.where(real, ridge, 1.0).diag_embed()
    delta = torch.cholesky_solve(read.transpose(1, 2) @ residual, torch.linalg.cholesky(gram))
    return mass, old + delta


def kept_groups(
    keep: Tensor, elements: Callable[[int], int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that keep something, those of similar size together.

    Args:
        keep: ``(R, T)`` bool.
        elements: of the largest tensor per row, by the number of slots that the row keeps.

    Returns:
        Rows ``(r,)``, their kept tokens ``(r, n)`` in order and then padding, and which are real.
    """
    counts = keep.sum(1)
    order = counts.argsort(descending=True)[: int((counts > 0).sum())]
    sizes, first = counts[order].tolist(), 0
    while first < len(order):
        size = sizes[first]
        rows = order[first : first + max(1, CHUNK // max(1, elements(size)))]
        index = keep[rows].to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        index = index[:, :size]
        yield rows, index, keep[rows].gather(1, index)
        first += len(rows)


def _chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of rows whose attention matrices together stay near ``CHUNK`` elements."""
    step = max(1, CHUNK // max(1, elements_per_row))
    return (slice(first, first + step) for first in range(0, rows, step))


def nonnegative_least_squares(gram: Tensor, target: Tensor, steps: int = 100) -> Tensor:
    """``min over w >= 0 of |A w - y|^2`` for a batch of small problems, by FISTA with restarts.

    Args:
        gram: ``(R, n, n)``, ``A^T A``; a zero row and column keeps its ``w`` at the start value.
        target: ``(R, n)``, ``A^T y``.
        steps: iterations.

    Returns:
        ``(R, n)``.
    """
    step = 1 / torch.linalg.matrix_norm(gram, ord=float("inf")).clamp_min(1e-12)[:, None]
    w = torch.ones_like(target)
    ahead, momentum = w, torch.ones(len(w), 1, device=w.device)
    for _ in range(steps):
        gradient = (gram @ ahead[..., None])[..., 0] - target
        new = (ahead - step * gradient).clamp_min(0)
        uphill = ((ahead - new) * (new - w)).sum(1, keepdim=True) > 0
        next_momentum = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = new + torch.where(uphill, 0.0, (momentum - 1) / next_momentum) * (new - w)
        w, momentum = new, next_momentum
    return w
