"""``slot_attention``: attention with an additive bias per key and KV head (the log-mass), dense or
over ragged slots."""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag_kernels.runtime import choose
from gist_rag_kernels.slot_attention import reference
from gist_rag_kernels.slot_attention.ragged import Plan, RaggedSlots


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


def ragged_slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: RaggedSlots,
    scaling: float,
    *,
    visible: Tensor | None = None,
    seen: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Grouped-query attention over ragged slots and local tokens, one softmax over both.

    Args:
        query: ``(B, Hq, Q, D)`` after RoPE; query head ``i`` reads KV head ``i // (Hq // H)``.
        key: ``(B, H, K, D)`` after RoPE, of the local tokens; the last one is the last query's own.
        value: ``(B, H, K, D)``.
        slots: the slots of this layer, each row its own number of them.
        scaling: factor of the logits, usually ``D ** -0.5``.
        visible: bool over the local tokens. ``(B, K)`` hides keys from everyone, on top of a causal
            mask that is aligned to the right end; ``(B, 1, Q, K)`` is the whole rule by itself.
        seen: ``(B, Q)`` number of passages that come before each query: it sees slots with
            ``order < seen``. ``None`` where all do.
        plan: how ``slots`` are split among programs; without one it is made here, which waits for
            the GPU.

    Returns:
        ``(B, Hq, Q, D)`` in the dtype of ``query``; zeros for a query that sees nothing.
        Differentiable, by the reference.

    Raises:
        ValueError: shapes or dtypes do not agree.
    """
    _check_local(query, key, value, visible, seen)
    _check_slots(slots, key.shape[0], key.shape[1], key.shape[3])
    tensors = (query, key, value, *slots.tensors)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not differentiable and choose(*tensors) == "triton":
        from gist_rag_kernels.slot_attention import kernel

        return kernel.ragged_slot_attention(query, key, value, slots, scaling, visible, seen, plan)
    return reference.ragged_slot_attention(query, key, value, slots, scaling, visible, seen)


def _check_local(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, seen: Tensor | None
) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must be (B, Hq, Q, D), (B, H, K, D) and (B, H, K, D)"
        )
    batch, heads, keys, size = key.shape
    rows = query.shape[2]
    if query.shape[0] != batch or query.shape[3] != size or query.shape[1] % heads or size % 2:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    if visible is not None and (
        visible.dtype != torch.bool or visible.shape not in ((batch, keys), (batch, 1, rows, keys))
    ):
        raise ValueError(
            f"visible {visible.dtype} {tuple(visible.shape)} must be bool, ({batch}, {keys}) or "
            f"({batch}, 1, {rows}, {keys})"
        )
    if seen is not None and seen.shape != (batch, rows):
        raise ValueError(f"seen {tuple(seen.shape)} must be ({batch}, {rows})")


def _check_slots(slots: RaggedSlots, batch: int, heads: int, size: int) -> None:
    count = len(slots.keys)
    width = size // 2 if slots.bits == 4 else size
    expected: dict[str, tuple[int, ...]] = {
        "keys": (count, width),
        "values": (count, width),
        "bias": (count,),
        "order": (count,),
        "starts": (batch, heads),
        "lengths": (batch, heads),
    }
    if slots.quantised:
        expected |= {
            "key_scales": (_len(slots.key_scales), size),
            "scale_rows": (count,),
            "value_scales": (count,),
            "positions": (count,),
            "cos": (_len(slots.cos), size),
            "sin": (_len(slots.cos), size),
        }
    for name, shape in expected.items():
        tensor = getattr(slots, name)
        given = None if tensor is None else tuple(tensor.shape)
        if given != shape:
            raise ValueError(f"slots.{name} has shape {given}, expected {shape}")
        if not tensor.is_contiguous() and name not in ("starts", "lengths"):
            raise ValueError(f"slots.{name} must be contiguous")
    if slots.values.dtype != slots.keys.dtype:
        raise ValueError(f"slot keys are {slots.keys.dtype}, values {slots.values.dtype}")
    if slots.quantised and slots.keys.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"slot keys are {slots.keys.dtype}; expected float, int8 or uint8 (int4)")


def _len(tensor: Tensor | None) -> int:
    return 0 if tensor is None else len(tensor)
