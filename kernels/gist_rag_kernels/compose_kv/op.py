"""``compose_kv``: rotate position-free keys to their new places and scatter them into a cache."""

from __future__ import annotations

from torch import Tensor

from gist_rag_kernels.compose_kv import reference


def compose_kv(
    keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, destination: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Rotate ``keys`` and move keys and values to their slots; slots not named stay zero.

    Args:
        keys: ``(M, D)`` keys before RoPE, any float dtype; rotated in float32.
        values: ``(M, D)``.
        cos: ``(M, D)`` float32, the model's own table at each slot's new position.
        sin: ``(M, D)`` float32.
        destination: ``(M,)`` int64, distinct, each in ``[0, num_slots)``.
        num_slots: slots of the result.

    Returns:
        Keys and values ``(num_slots, D)`` in the dtype of ``keys``; differentiable.

    Raises:
        ValueError: shapes do not agree.
    """
    slots, size = keys.shape
    if values.shape != keys.shape or destination.shape != (slots,):
        raise ValueError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and destination "
            f"{tuple(destination.shape)} must be (M, D), (M, D) and (M,)"
        )
    if cos.shape != (slots, size) or sin.shape != (slots, size):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {keys.shape}")
    return reference.compose_kv(keys, values, cos, sin, destination, num_slots)
