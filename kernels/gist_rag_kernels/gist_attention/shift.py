"""The gist shift: raw slots first, gists at the right end, causality by the original place.

With raw slots and gists apart, what a block of queries sees are at most four contiguous ranges (raw
and gist, each a window and the prefix), and who sees a block of keys are at most two. Their ends
follow from the smallest and largest entries of a block and one count, so blocks are skipped without
a table of blocks. The idea is UniGist's (Deng et al., NeurIPS 2025, 2509.15763).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """Where slots go, and who sees whom; one for all layers.

    Attributes:
        order: ``(B, S)`` int32, the original slot at each shifted place.
        raws: ``(B, S + 1)`` int32, how many raw slots stand before each original slot.
        first: ``(2, B, S)`` int32, first raw slot and first gist that each original slot sees.
        until: ``(2, B, S)`` int32, behind the last raw query and the last gist query that may see
            each original slot as a key.
        prefix: ``(B,)`` int32, leading original slots that all later ones see.
    """

    order: Tensor
    raws: Tensor
    first: Tensor
    until: Tensor
    prefix: Tensor


def gist_shift(
    is_gist: Tensor, local_from: Tensor, gist_from: Tensor, prefix: Tensor | int = 0
) -> Shift:
    """The shift of a batch of layouts.

    Args:
        is_gist: ``(B, S)`` bool.
        local_from: ``(B, S)`` int, first raw slot that a slot sees; ``S`` or more for none.
        gist_from: ``(B, S)`` int, first gist that a slot sees.
        prefix: ``(B,)`` int, or one for all: leading slots that every later slot sees.

    Raises:
        ValueError: shapes or dtypes do not agree.
    """
    shape = is_gist.shape
    if is_gist.dim() != 2 or local_from.shape != shape or gist_from.shape != shape:
        raise ValueError(
            f"is_gist {tuple(shape)}, local_from {tuple(local_from.shape)} and gist_from "
            f"{tuple(gist_from.shape)} must all be (B, S)"
        )
    if is_gist.dtype != torch.bool:
        raise ValueError(f"is_gist is {is_gist.dtype}; it must be bool")
    prefix = as_prefix(prefix, is_gist)
    size = shape[1]
    slot = torch.arange(size, device=is_gist.device).expand(shape)
    first = torch.stack((local_from, gist_from)).long().clamp(0, size)  # (2, B, S)
    until = torch.stack(
        [
            torch.where(is_gist, _until(first[1], queries), _until(first[0], queries))
            for queries in (~is_gist, is_gist)
        ]
    )
    last = torch.stack([_last(queries, slot) for queries in (~is_gist, is_gist)])  # (2, B, 1)
    until = torch.where(slot < prefix[:, None], last, until)
    raws = torch.nn.functional.pad((~is_gist).cumsum(1), (1, 0))
    return Shift(
        order=is_gist.to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32).contiguous(),
        raws=raws.to(torch.int32).contiguous(),
        first=first.to(torch.int32).contiguous(),
        until=until.to(torch.int32).contiguous(),
        prefix=prefix.clamp(max=size).to(torch.int32),
    )


def as_prefix(prefix: Tensor | int, is_gist: Tensor) -> Tensor:
    """``(B,)`` of a batch.

    Raises:
        ValueError: it has another shape, or is negative.
    """
    if isinstance(prefix, int):
        if prefix < 0:
            raise ValueError(f"prefix is {prefix}; it must be 0 or more")
        return torch.full_like(is_gist[:, 0], prefix, dtype=torch.long)
    if prefix.shape != is_gist.shape[:1] or prefix.is_floating_point():
        raise ValueError(
            f"prefix {prefix.dtype} {tuple(prefix.shape)} must be ({len(is_gist)},) integers"
        )
    return prefix


def _until(first: Tensor, queries: Tensor) -> Tensor:
    """``(B, S)`` behind the last of ``queries`` whose ``first`` is not behind each slot."""
    batch, size = first.shape
    behind = (torch.arange(size, device=first.device) + 1) * queries
    latest = behind.new_zeros(batch, size + 1).scatter_reduce(1, first, behind, "amax")
    return latest.cummax(1).values[:, :size]


def _last(queries: Tensor, slot: Tensor) -> Tensor:
    """``(B, 1)`` behind the last of ``queries``."""
    if not slot.shape[1]:
        return slot[:, :1]
    return ((slot + 1) * queries).amax(1, keepdim=True)
