"""``gist_attention``: attention over tokens and gists, where a dense mask would be mostly empty."""

from __future__ import annotations

from torch import Tensor

from gist_rag_kernels.gist_attention import reference
from gist_rag_kernels.gist_attention.shift import Shift, as_prefix, gist_shift
from gist_rag_kernels.runtime import choose


def gist_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_gist: Tensor,
    local_from: Tensor,
    gist_from: Tensor,
    prefix: Tensor | int = 0,
    *,
    scaling: float | None = None,
    shift: Shift | None = None,
) -> Tensor:
    """Grouped-query attention under the visibility rule of gists.

    Slot ``q`` sees slot ``k`` when ``k <= q`` and one of these holds: ``k < prefix``; ``k`` is a
    gist and ``k >= gist_from[q]``; ``k`` is raw and ``k >= local_from[q]``.

    Args:
        query: ``(B, Hq, S, D)`` after RoPE; query head ``i`` reads KV head ``i // (Hq // H)``.
        key: ``(B, H, S, D)`` after RoPE.
        value: ``(B, H, S, D)``.
        is_gist: ``(B, S)`` bool.
        local_from: ``(B, S)`` int. Padding has ``S`` or more here and in ``gist_from``.
        gist_from: ``(B, S)`` int.
        prefix: ``(B,)`` int, or one for all: leading slots that every later slot sees.
        scaling: factor of the logits; default ``D ** -0.5``.
        shift: ``gist_shift`` of the same vectors, made once for all layers.

    Returns:
        ``(B, Hq, S, D)``, zeros for a slot that sees nothing; differentiable once.

    Raises:
        ValueError: shapes or dtypes do not agree.
    """
    _check(query, key, value, is_gist, local_from, gist_from)
    prefix = as_prefix(prefix, is_gist)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if choose(query, key, value, is_gist) == "triton":
        from gist_rag_kernels.gist_attention import kernel

        shift = shift or gist_shift(is_gist, local_from, gist_from, prefix)
        return kernel.gist_attention(query, key, value, shift, scaling)
    return reference.gist_attention(
        query, key, value, is_gist, local_from, gist_from, prefix, scaling
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_gist: Tensor,
    local_from: Tensor,
    gist_from: Tensor,
) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must be (B, Hq, S, D), (B, H, S, D) and (B, H, S, D)"
        )
    batch, heads, size, _ = key.shape
    if query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    if query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {heads} KV heads")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
    named = {"is_gist": is_gist, "local_from": local_from, "gist_from": gist_from}
    for name, vector in named.items():
        if vector.shape != (batch, size):
            raise ValueError(f"{name} {tuple(vector.shape)} must be ({batch}, {size})")
