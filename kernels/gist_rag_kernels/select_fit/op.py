"""``select_fit``: which keys a text needs, and what the kept ones must become to stand for all."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gist_rag_kernels.runtime import choose
from gist_rag_kernels.select_fit import reference


def score_keys(
    queries: Tensor,
    prefix: Tensor,
    keys: Tensor,
    scaling: float,
    how: Literal["rms", "max"] = "rms",
) -> tuple[Tensor, Tensor]:
    """Attention that each key of a passage gets, beside the prefix that always stands before it.

    Args:
        queries: ``(R, Q, D)`` after RoPE, one row per layer and KV head.
        prefix: ``(R, P, D)`` keys after RoPE.
        keys: ``(R, T, D)`` keys after RoPE.
        scaling: factor of the logits, usually ``D ** -0.5``.
        how: RMS or maximum over the queries.

    Returns:
        Scores ``(R, T)``, and ``(R, Q)`` the share of each query's attention that the passage as a
        whole gets; float32 from the kernel. Differentiable, by the reference.

    Raises:
        ValueError: shapes or dtypes do not agree, or there is no query.
    """
    if any(t.dim() != 3 or t.shape[::2] != queries.shape[::2] for t in (queries, prefix, keys)):
        raise ValueError(
            f"queries {tuple(queries.shape)}, prefix {tuple(prefix.shape)} and keys "
            f"{tuple(keys.shape)} must be (R, Q, D), (R, P, D) and (R, T, D)"
        )
    if not queries.dtype == prefix.dtype == keys.dtype:
        raise ValueError(
            f"queries, prefix and keys are {queries.dtype}, {prefix.dtype} and {keys.dtype}"
        )
    if not queries.numel():
        raise ValueError(f"queries {tuple(queries.shape)}: scores need at least one")
    if how not in ("rms", "max"):
        raise ValueError(f"how is {how!r}; it must be 'rms' or 'max'")
    tensors = (queries, prefix, keys)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not differentiable and choose(*tensors) == "triton":
        from gist_rag_kernels.select_fit import kernel

        return kernel.score_keys(queries, prefix, keys, scaling, how)
    return reference.score_keys(queries, prefix, keys, scaling, how)


def fit_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor,
    share: Tensor,
    scaling: float,
    *,
    masses: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Masses and values with which the kept slots stand for all slots; plain torch everywhere.

    Args:
        queries: ``(R, Q, D)`` after RoPE, one row per layer and KV head.
        keys: ``(R, T, D)`` after RoPE.
        values: ``(R, T, D)``.
        keep: ``(R, T)`` bool; rows may keep different numbers, also none.
        share: ``(R, Q)`` weight of each query in the fits: how much it looks at the passage at all.
        scaling: factor of the logits, usually ``D ** -0.5``.
        masses: smallest and largest that are allowed.

    Returns:
        Masses ``(m,)`` and values ``(m, D)`` of the kept slots, in (row, token) order.
    """
    return reference.fit_slots(queries, keys, values, keep, share, scaling, masses)
