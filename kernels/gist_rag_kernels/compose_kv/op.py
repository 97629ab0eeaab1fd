"""``compose_kv``: rotate position-free keys to their new places and scatter them into a cache.

``compose_kv`` takes floats and is differentiable; ``compose_packed`` takes gists as they are
stored and needs one launch for all layers, heads and passages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag_kernels.compose_kv import reference
from gist_rag_kernels.compose_kv.reference import Composed
from gist_rag_kernels.kv_quant.packed import PackedKV
from gist_rag_kernels.runtime import choose


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
        Keys and values ``(num_slots, D)`` in the dtype of ``keys``; differentiable in keys and
        values.

    Raises:
        ValueError: shapes or dtypes do not agree.
    """
    if keys.dim() != 2 or values.shape != keys.shape or destination.shape != keys.shape[:1]:
        raise ValueError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and destination "
            f"{tuple(destination.shape)} must be (M, D), (M, D) and (M,)"
        )
    if cos.shape != keys.shape or sin.shape != keys.shape:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {tuple(keys.shape)}"
        )
    if values.dtype != keys.dtype or not keys.is_floating_point():
        raise ValueError(f"keys {keys.dtype} and values {values.dtype} must be one float dtype")
    if keys.shape[1] == 0 or keys.shape[1] % 2:
        raise ValueError(f"head size {keys.shape[1]} must be even and positive")
    if len(keys) > num_slots:
        raise ValueError(f"{len(keys)} slots do not fit into {num_slots}")
    if len(keys) and choose(keys, values, cos, sin, destination) == "triton":
        from gist_rag_kernels.compose_kv import kernel

        return kernel.compose_kv(keys, values, cos, sin, destination, num_slots)
    return reference.compose_kv(keys, values, cos, sin, destination, num_slots)


def compose_packed(
    packed: PackedKV,
    offsets: Tensor,
    base: Tensor,
    cos: Tensor,
    sin: Tensor,
    destination: Tensor,
    num_slots: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    room: Tensor | None = None,
    block_table: Tensor | None = None,
    page_size: int = 0,
    out: Composed | None = None,
) -> Composed:
    """Dequantise, rotate and place the gists of several passages, in one launch.

    Row ``g = p * L * H + l * H + h`` of ``packed`` holds the slots of passage ``p`` in layer ``l``
    and KV head ``h``, for ``P`` passages; they follow one another in the result too, from slot
    ``destination[g]`` on. Contiguous, padded and ragged caches are all such buffers of slots. For
    a paged cache, ``destination`` counts in a cache without holes whose page ``i`` lies at page
    ``block_table.flatten()[i]`` of the buffer: with one table row of ``W`` pages per sequence,
    layer and head, the first slot of table row ``t`` is ``t * W * page_size``.

    Args:
        packed: keys before RoPE and values, ``M`` slots in ``R = P * L * H`` rows, in bfloat16
            (or another float dtype), int8 or int4 with their scales.
        offsets: ``(M,)`` place of each slot inside its passage, any integer dtype.
        base: ``(P,)`` position of each passage's first token, any integer dtype.
        cos: ``(positions, D)`` float32, the model's own table; ``(positions, D / 2)`` where both
            halves of a head have the same angles, which saves half the reading. Every
            ``base + offset`` must be below ``positions``; beyond it the kernel writes NaN.
        sin: as ``cos``.
        destination: ``(R,)`` first slot of each row, any integer dtype. No two slots may share a
            place.
        num_slots: ``S``, slots of the result; not with ``out``.
        dtype: of the result; not with ``out``.
        bias: ``(M,)`` log-mass of each slot, scattered alike.
        order: ``(P,)`` a number per passage, such as its rank in the prompt, written to each of
            its slots.
        room: ``(R,)`` slots that each row must fill, at least its length; the rest of them is
            zero (bias ``-inf``, order 0). Without ``out`` the rooms must cover the whole result,
            which then is not cleared before: each byte is written once. A cache row without
            passages can be given a passage without slots.
        block_table: page numbers, any shape and integer dtype.
        page_size: slots of a page; with ``block_table``.
        out: write here instead and leave other slots alone, as a paged cache requires; ``bias``
            and ``order`` of it are there if and only if those are given.

    Returns:
        ``out``, or a new ``Composed`` of ``num_slots`` slots, zero (bias ``-inf``) where no row
        lies. There is no gradient.

    Raises:
        ValueError: shapes or dtypes do not agree.
    """
    packed.check()
    _check_places(packed, offsets, base, destination, room)
    _check_tables(packed, cos, sin)
    if bias is not None and (bias.shape != offsets.shape or not bias.is_floating_point()):
        raise ValueError(f"bias {bias.dtype} {tuple(bias.shape)} must be {tuple(offsets.shape)}")
    if order is not None and order.shape != base.shape:
        raise ValueError(f"order {tuple(order.shape)} must be {tuple(base.shape)}")
    if (block_table is None) != (page_size == 0) or page_size < 0:
        raise ValueError("block_table and a positive page_size go together")
    if (out is None) == (num_slots is None):
        raise ValueError("give either num_slots or out")
    tensors = [*packed.tensors(), offsets, base, cos, sin, destination]
    tensors += [t for t in (bias, order, room, block_table, *(out or ())) if t is not None]
    triton = packed.num_rows and choose(*tensors) == "triton"
    if out is None:
        assert num_slots is not None
        if not triton:
            room = None  # plain torch clears all sooner than the rest of each row
        out = _fresh(packed, num_slots, dtype, bias, order, room)
    _check_out(packed, out, bias, order)

    settings = (bias, order, room, block_table, page_size)
    if triton:
        from gist_rag_kernels.compose_kv import kernel

        return kernel.compose_packed(packed, offsets, base, cos, sin, destination, out, *settings)
    with torch.no_grad():
        return reference.compose_packed(
            packed, offsets, base, cos, sin, destination, out, *settings
        )


def _fresh(
    packed: PackedKV,
    num_slots: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    order: Tensor | None,
    room: Tensor | None,
) -> Composed:
    """A cleared result, or an uncleared one where the rooms are to cover it."""
    device = packed.keys.device
    shape = (num_slots, packed.head_dim)
    if room is not None:
        return Composed(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
            None if bias is None else torch.empty(num_slots, device=device),
            None if order is None else order.new_empty(num_slots),
        )
    return Composed(
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
        None if bias is None else torch.full((num_slots,), -torch.inf, device=device),
        None if order is None else order.new_zeros(num_slots),
    )


def _check_places(
    packed: PackedKV, offsets: Tensor, base: Tensor, destination: Tensor, room: Tensor | None
) -> None:
    rows = packed.num_rows
    if offsets.shape != (packed.num_slots,):
        raise ValueError(f"offsets {tuple(offsets.shape)} must be ({packed.num_slots},)")
    if destination.shape != (rows,) or (room is not None and room.shape != (rows,)):
        raise ValueError(f"destination and room must be ({rows},), one per row")
    if base.dim() != 1 or (rows % len(base) if len(base) else rows):
        raise ValueError(f"base {tuple(base.shape)} must be (P,), and P must divide {rows} rows")


def _check_tables(packed: PackedKV, cos: Tensor, sin: Tensor) -> None:
    size = packed.head_dim
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] not in (size, size // 2):
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be (positions, {size}) "
            f"or (positions, {size // 2})"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos {cos.dtype} and sin {sin.dtype} must be float32")


def _check_out(packed: PackedKV, out: Composed, bias: Tensor | None, order: Tensor | None) -> None:
    slots, size = len(out.keys), packed.head_dim
    if out.keys.shape != (slots, size) or out.values.shape != (slots, size):
        raise ValueError(
            f"out.keys {tuple(out.keys.shape)} and out.values {tuple(out.values.shape)} "
            f"must be (slots, {size})"
        )
    for name, there, given in (("bias", out.bias, bias), ("order", out.order, order)):
        if (there is None) != (given is None) or (there is not None and there.shape != (slots,)):
            raise ValueError(f"out.{name} must be ({slots},) if {name} is given, else None")
    for tensor in out:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("the tensors of out must be contiguous")
