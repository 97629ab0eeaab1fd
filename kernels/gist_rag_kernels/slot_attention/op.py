"""``slot_attention``: attention with an additive bias per key and KV head (the log-mass)."""

from __future__ import annotations

from torch import Tensor

from gist_rag_kernels.slot_attention import reference


def slot_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    """Grouped-query attention over slots and local tokens.

    Args:
        query: ``(B, Hq, Q, D)`` after RoPE; query head ``i`` reads KV head ``i // (Hq // H)``.
        key: ``(B, H, K, D)`` after RoPE.
        value: ``(B, H, K, D)``.
        bias: ``(B, H, Q, K)`` or ``(B, H, 1, K)``, added to the scaled logits; ``-inf`` hides a
            key. Every query must see at least one key.
        scaling: factor of the logits, usually ``D ** -0.5``.

    Returns:
        ``(B, Hq, Q, D)``.

    Raises:
        ValueError: shapes do not agree.
    """
    batch, heads, keys, size = key.shape
    if query.shape[0] != batch or query.shape[3] != size or query.shape[1] % heads:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    if bias.shape not in ((batch, heads, query.shape[2], keys), (batch, heads, 1, keys)):
        raise ValueError(
            f"bias {tuple(bias.shape)} must be ({batch}, {heads}, 1 or {query.shape[2]}, {keys})"
        )
    return reference.slot_attention(query, key, value, bias, scaling)
