"""Ragged slots of one layer, and how their reading is split into pieces of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_CHUNK, MAX_CHUNK = 64, 1024
TARGET_PIECES = 512
"""Pieces that fill a large GPU (132 multiprocessors, a few programs on each) without a tail."""


@dataclass(frozen=True)
class RaggedSlots:
    """Slots of one layer inside a flat buffer of ``R`` slots, which all layers may share.

    Row ``(b, h)`` owns the slots ``starts[b, h]`` to ``starts[b, h] + lengths[b, h]``. Float slots
    are after RoPE. Quantised slots are before RoPE, since a scale per channel does not survive the
    rotation, and carry what is needed to rotate them while they are read::

        key[r]   = rotate(keys[r] * key_scales[scale_rows[r]], cos[positions[r]], sin[...])
        value[r] = values[r] * value_scales[r]

    Attributes:
        keys: ``(R, D)`` float or int8, or ``(R, D // 2)`` uint8 with two signed 4-bit numbers per
            byte: channel ``c`` in the low half, channel ``c + D // 2`` in the high half.
        values: like ``keys``.
        bias: ``(R,)`` float32 log-mass; ``-inf`` hides a slot.
        order: ``(R,)`` int32 passage of the prompt that a slot belongs to.
        starts: ``(B, H)`` int64.
        lengths: ``(B, H)`` int32, 0 or more.
        key_scales: ``(G, D)`` float, or ``None`` for float slots; so for all that follow.
        scale_rows: ``(R,)`` int32, the row of ``key_scales`` that a slot was quantised with.
        value_scales: ``(R,)`` float.
        positions: ``(R,)`` int32, rows of the tables.
        cos: ``(P, D)`` float table of the model, whose two halves are alike; float16 is enough.
        sin: ``(P, D)``.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    order: Tensor
    starts: Tensor
    lengths: Tensor
    key_scales: Tensor | None = None
    scale_rows: Tensor | None = None
    value_scales: Tensor | None = None
    positions: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def bits(self) -> int:
        """Stored bits per number: 4, 8, 16 or 32."""
        return 4 if self.keys.dtype == torch.uint8 else self.keys.element_size() * 8

    @property
    def quantised(self) -> bool:
        return not self.keys.is_floating_point()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are given."""
        return tuple(t for t in vars(self).values() if t is not None)


@dataclass(frozen=True)
class Plan:
    """Pieces of equal size that together cover the slots of all rows of one layer.

    Attributes:
        row: ``(W,)`` int32, ``b * H + h`` of each piece, rising.
        start: ``(W,)`` int64, first slot of each piece in the flat buffer.
        length: ``(W,)`` int32, 1 to ``chunk`` slots.
        first: ``(B * H + 1,)`` int32, where each row's pieces begin and end.
        chunk: slots of a full piece; local keys are split by it too.
    """

    row: Tensor
    start: Tensor
    length: Tensor
    first: Tensor
    chunk: int


def plan(starts: Tensor, lengths: Tensor, chunk: int | None = None) -> Plan:
    """Split the slots of one layer, ``starts`` and ``lengths (B, H)``, into pieces.

    Args:
        chunk: slots of a piece; by default what fills a large GPU.
    """
    return plan_layers(starts[None], lengths[None], chunk)[0]


def plan_layers(starts: Tensor, lengths: Tensor, chunk: int | None = None) -> list[Plan]:
    """Plans of all layers, made once per compose.

    The lists are small (``L * B * H`` rows) and are built on the CPU: one copy there, four back.

    Args:
        starts: ``(L, B, H)`` int64.
        lengths: ``(L, B, H)``.
    """
    if starts.dim() != 3 or starts.shape != lengths.shape:
        raise ValueError(
            f"starts {tuple(starts.shape)} and lengths {tuple(lengths.shape)} must be alike, "
            "(L, B, H)"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 or more")
    layers, rows = len(starts), starts[0].numel() if len(starts) else 0
    device = starts.device
    begin = starts.detach().reshape(layers, rows).cpu().long()
    size = lengths.detach().reshape(layers, rows).cpu().long()
    chunks = [chunk or _chunk(int(total)) for total in size.sum(1).tolist()]
    per_piece = torch.tensor(chunks, dtype=torch.long)[:, None]
    pieces = (size + per_piece - 1) // per_piece  # (L, rows)

    flat = pieces.flatten()
    owner = torch.arange(layers * rows).repeat_interleave(flat)
    rank = torch.arange(len(owner)) - (flat.cumsum(0) - flat)[owner]
    offset = rank * per_piece.expand(layers, rows).flatten()[owner]
    length = (size.flatten()[owner] - offset).minimum(
        per_piece.expand(layers, rows).flatten()[owner]
    )
    row = (owner % max(rows, 1)).to(torch.int32).to(device)
    start = (begin.flatten()[owner] + offset).to(device)
    length = length.to(torch.int32).to(device)
    first = torch.nn.functional.pad(pieces.cumsum(1), (1, 0)).to(torch.int32).to(device)
    counts = pieces.sum(1).tolist()
    parts = zip(row.split(counts), start.split(counts), length.split(counts), strict=True)
    return [
        Plan(*three, first=edges, chunk=slots)
        for three, edges, slots in zip(parts, first, chunks, strict=True)
    ]


def _chunk(total: int) -> int:
    """A power of two that cuts ``total`` slots into about ``TARGET_PIECES`` pieces."""
    wanted = max(1, -(-total // TARGET_PIECES))
    return min(MAX_CHUNK, max(MIN_CHUNK, 1 << (wanted - 1).bit_length()))
