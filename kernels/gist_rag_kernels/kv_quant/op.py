"""``quantise`` and ``dequantise``: keys and values in eight or four bits."""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag_kernels.kv_quant import reference
from gist_rag_kernels.kv_quant.packed import LARGEST, SCALES, PackedKV, check_value_group
from gist_rag_kernels.runtime import choose


def quantise(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    bits: int = 8,
    *,
    key_group: int = 0,
    value_group: int = 0,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> PackedKV:
    """Store keys per channel and values per slot as integers, each group with its own step.

    A step is ``s = peak / Q``, the group's largest magnitude over the largest integer (``Q = 127``
    or 7), rounded to ``scale_dtype``; a number is stored as ``x / s`` rounded to the nearest
    integer. What ``dequantise`` returns in float32 differs from ``x`` by at most::

        peak / Q * (1 + u) / 2 + Q * tiny

    with ``u`` the relative rounding of ``scale_dtype`` (2**-8, 2**-11, 2**-24 for bfloat16,
    float16, float32) and ``tiny`` its smallest positive number (float16: 6e-8; else 1e-38). With
    bfloat16 that is 1/253 of the peak for eight bits and 1/13.9 for four. Rounding a step down
    clips the peak by less than half a step because ``Q * u < 1/2``, so the bound needs no other
    term. The default (8 bits, one group a row, bfloat16) stores exactly what gist-rag's ``int8``
    codec does.

    Args:
        keys: ``(M, D)`` keys before RoPE, finite, any float dtype, ``D`` even.
        values: ``(M, D)``.
        rows: ``(R + 1,)`` edges of the rows (layer x KV head), rising from 0 to ``M``.
        bits: 8 or 4.
        key_group: slots that share a step in each channel of ``keys``; 0 for all of a row. Reads
            the number of groups from the device when it is not 0.
        value_group: channels that share a step in each slot of ``values``: 0 for all, else a
            divisor of ``D / 2``.
        scale_dtype: bfloat16, float16 (for peaks below 65504 * Q) or float32.

    Raises:
        ValueError: shapes do not agree or a setting is unknown.
    """
    slots, size = keys.shape if keys.dim() == 2 else (0, 0)
    value_group = value_group or size
    if size == 0 or size % 2 or values.shape != keys.shape:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must both be (M, D), D even"
        )
    if not (keys.is_floating_point() and values.is_floating_point()):
        raise ValueError(f"keys {keys.dtype} and values {values.dtype} must be floats")
    if rows.dim() != 1 or len(rows) == 0 or rows.is_floating_point():
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)} must be (R + 1,) integers")
    if bits not in LARGEST:
        raise ValueError(f"bits is {bits}; choose one of {', '.join(map(str, LARGEST))}")
    if scale_dtype not in SCALES:
        raise ValueError(f"scale_dtype is {scale_dtype}; it must be bfloat16, float16 or float32")
    if key_group < 0:
        raise ValueError(f"key_group is {key_group}; it must not be negative")
    check_value_group(value_group, size)
    settings = (bits, key_group, value_group, scale_dtype)
    if slots and choose(keys, values, rows) == "triton":
        from gist_rag_kernels.kv_quant import kernel

        return kernel.quantise(keys, values, rows, *settings)
    return reference.quantise(keys, values, rows, *settings)


def dequantise(packed: PackedKV, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values ``(M, D)`` in ``dtype``; the product with the step is taken in float32.

    Raises:
        ValueError: the packed tensors do not fit together.
    """
    packed.check()
    if packed.num_slots and packed.bits < 16 and choose(*packed.tensors()) == "triton":
        from gist_rag_kernels.kv_quant import kernel

        return kernel.dequantise(packed, dtype)
    return reference.dequantise(packed, dtype)
