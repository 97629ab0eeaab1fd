"""``retention_attention``: causal attention in which each key fades at a rate of its own."""

from __future__ import annotations

from torch import Tensor

from gist_rag_kernels.retention_attention import reference
from gist_rag_kernels.runtime import choose


def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    scaling: float | None = None,
) -> Tensor:
    """Grouped-query attention with ``(t - i) log beta_i`` added to the logit of key ``i`` at ``t``.

    Keys and values of padding on the right are seen by padding only.

    Args:
        query: ``(B, Hq, Q, D)`` after RoPE, the last ``Q`` of ``K`` tokens; query head ``i`` reads
            KV head ``i // (Hq // H)``.
        key: ``(B, H, K, D)`` after RoPE.
        value: ``(B, H, K, D)``.
        log_beta: ``(B, H, K)``, 0 or less and finite; 0 is a key that does not fade.
        scaling: factor of the logits; default ``D ** -0.5``.

    Returns:
        ``(B, Hq, Q, D)``; differentiable once, also by ``log_beta``.

    Raises:
        ValueError: shapes or dtypes do not agree.
    """
    _check(query, key, value, log_beta)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if choose(query, key, value, log_beta) == "triton":
        from gist_rag_kernels.retention_attention import kernel

        return kernel.retention_attention(query, key, value, log_beta, scaling)
    return reference.retention_attention(query, key, value, log_beta, scaling)


def _check(query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must be (B, Hq, Q, D), (B, H, K, D) and (B, H, K, D)"
        )
    batch, heads, keys, size = key.shape
    if query.shape[0] != batch or query.shape[3] != size or query.shape[2] > keys:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    if query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {heads} KV heads")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
    if log_beta.shape != (batch, heads, keys):
        raise ValueError(f"log_beta {tuple(log_beta.shape)} must be ({batch}, {heads}, {keys})")
