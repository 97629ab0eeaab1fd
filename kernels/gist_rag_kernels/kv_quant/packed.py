"""``PackedKV``: keys and values of a ragged state in 16, 8 or 4 bits, and how they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = {8: 127, 4: 7}
"""Largest stored integer per width; the range is symmetric, so there is no zero point."""

SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PackedKV:
    """Keys and values ``(M, D)`` before RoPE, rows of slots one after the other.

    Four bits go two to a byte: byte ``j`` holds channel ``j`` in its low half and channel
    ``j + D / 2`` in its high half, in two's complement. These are the two channels that RoPE turns
    into each other, so a thread that holds a byte holds all it needs.

    Attributes:
        keys: ``(M, D)`` int8 or a float dtype, or ``(M, D / 2)`` uint8 for four bits.
        values: as ``keys``.
        rows: ``(R + 1,)`` where each row's slots begin and end, any integer dtype.
        key_scales: a scale per channel and group of slots, ``(R, D)`` where a row is one group;
            else ``(G, D)``, the groups of row ``r`` from ``key_starts()[r]`` on. ``None`` for
            floats.
        value_scales: ``(M,)``, or ``(M, D / g)`` for groups of ``g`` channels. ``None`` for floats.
        key_group: slots that share a key scale, 0 for all of a row. The last group of a row may be
            shorter.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_group: int = 0

    @property
    def bits(self) -> int:
        """16 stands for any float dtype."""
        return {torch.int8: 8, torch.uint8: 4}.get(self.keys.dtype, 16)

    @property
    def num_slots(self) -> int:
        """``M``."""
        return self.keys.shape[0]

    @property
    def num_rows(self) -> int:
        """``R``."""
        return len(self.rows) - 1

    @property
    def head_dim(self) -> int:
        """``D``."""
        return self.keys.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def value_group(self) -> int:
        """Channels that share a value scale, ``D`` for all."""
        if self.value_scales is None or self.value_scales.dim() == 1:
            return self.head_dim
        return self.head_dim // max(self.value_scales.shape[1], 1)

    def key_starts(self) -> Tensor:
        """``(R + 1,)`` int64, the first scale row of each row."""
        return group_starts(self.rows, self.key_group)

    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        every = (self.keys, self.values, self.rows, self.key_scales, self.value_scales)
        return [tensor for tensor in every if tensor is not None]

    def check(self) -> None:
        """Shapes and dtypes; whether ``rows`` rises is the caller's to know, on the device.

        Raises:
            ValueError: they do not fit together.
        """
        keys, values, size = self.keys, self.values, self.head_dim
        if keys.dim() != 2 or values.shape != keys.shape or values.dtype != keys.dtype:
            raise ValueError(
                f"keys {keys.dtype} {tuple(keys.shape)} and values {values.dtype} "
                f"{tuple(values.shape)} must be of one dtype and shape (M, D)"
            )
        if size == 0 or size % 2:
            raise ValueError(f"head size {size} must be even and positive")
        if self.bits == 16 and not keys.is_floating_point():
            raise ValueError(f"keys are {keys.dtype}; they must be int8, uint8 (4 bits) or floats")
        if self.rows.dim() != 1 or len(self.rows) == 0 or self.rows.is_floating_point():
            raise ValueError(f"rows {tuple(self.rows.shape)} must be (R + 1,) integers")
        if self.key_group < 0:
            raise ValueError(f"key_group is {self.key_group}; it must not be negative")
        if self.bits == 16:
            if self.key_scales is not None or self.value_scales is not None:
                raise ValueError(f"{keys.dtype} keys and values have no scales")
            return
        self._check_scales(size)

    def _check_scales(self, size: int) -> None:
        keys, values = self.key_scales, self.value_scales
        if keys is None or values is None:
            raise ValueError(f"{self.bits}-bit keys and values need key_scales and value_scales")
        if keys.dim() != 2 or keys.shape[1] != size or keys.dtype not in SCALES:
            raise ValueError(
                f"key_scales {keys.dtype} {tuple(keys.shape)} must be (groups, {size})"
            )
        if self.key_group == 0 and len(keys) != self.num_rows:
            raise ValueError(f"{len(keys)} key scales for {self.num_rows} rows")
        if len(values) != self.num_slots or values.dim() > 2 or values.dtype not in SCALES:
            raise ValueError(
                f"value_scales {values.dtype} {tuple(values.shape)} must be ({self.num_slots},) "
                f"or ({self.num_slots}, groups)"
            )
        if values.dim() == 2 and (values.shape[1] == 0 or size % values.shape[1]):
            raise ValueError(f"{values.shape[1]} value scales do not divide a head of {size}")
        check_value_group(self.value_group, size)


def check_value_group(group: int, size: int) -> None:
    """Groups of channels must not cross the middle of a head, unless one group is all of it.

    Raises:
        ValueError: they do, or do not divide it.
    """
    if group != size and (group <= 0 or (size // 2) % group):
        raise ValueError(f"value_group {group} must be {size} (the head) or divide {size // 2}")


def group_starts(rows: Tensor, group: int) -> Tensor:
    """First group of each row, ``(R + 1,)`` int64; 0 makes one group of a row."""
    if group == 0:
        return torch.arange(len(rows), device=rows.device)
    counts = (rows.diff().long() + group - 1) // group
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def group_edges(rows: Tensor, group: int) -> Tensor:
    """First slot of each group and the end of the last one, ``(G + 1,)`` int64.

    Reads the number of groups from the device, unless a row is one group.
    """
    if group == 0:
        return rows.long()
    starts, rows = group_starts(rows, group), rows.long()
    row = torch.arange(len(rows) - 1, device=rows.device).repeat_interleave(starts.diff())
    first = rows[row] + (torch.arange(len(row), device=rows.device) - starts[row]) * group
    return torch.cat((first, rows[-1:]))
