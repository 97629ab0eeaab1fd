"""States > slots: give every passage its place in the prompt and rotate its keys there.

``place`` decides positions, ``compose`` does the work for a whole batch of prompts at once: one
rotation and one scatter over all layers, heads and passages (``gist_rag_kernels.compose_kv``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Local
from gist_rag.errors import BadInput
from gist_rag.layout import Slots
from gist_rag.types import GistState
from gist_rag_kernels import compose_kv

Positions = Literal["parallel", "sequence"]
"""Where passages go that stand side by side. ``sequence``: one after the other, as in the text.
``parallel``: all start at the same position, so that their order does not matter and a prompt grows
by the longest one only."""
DEFAULT_POSITIONS: Positions = "sequence"


@dataclass(frozen=True)
class Placed:
    """A state and the position of its first token."""

    state: GistState
    start: int


def place(
    states: Sequence[GistState], start: int, positions: Positions
) -> tuple[list[Placed], int]:
    """Positions of passages that stand side by side, and the first position after them."""
    placed, end = [], start
    for state in states:
        placed.append(Placed(state, start if positions == "parallel" else end))
        end = max(end, placed[-1].start + state.span)
    return placed, end


def arrange(
    pieces: Sequence[Tensor | GistState], start: int, positions: Positions
) -> tuple[list[Placed], Local]:
    """Positions of the gists and texts that follow a prompt's prefix, in prompt order.

    States with no text between them stand side by side. All texts are read in one pass, each piece
    seeing the passages before it.

    Args:
        pieces: token ids ``(n,)`` of texts, and states; the last one is a text.
        start: first position after the prefix.
    """
    placed: list[Placed] = []
    texts: list[Local] = []
    side: list[GistState] = []
    for piece in pieces:
        if isinstance(piece, GistState):
            side.append(piece)
            continue
        beside, start = place(side, start, positions)
        placed += beside
        side = []
        texts.append(Local.after(piece, start, len(placed)))
        start += len(piece)
    return placed, Local.join(texts)


def compose(batch: Sequence[Sequence[Placed]], backbone: Backbone) -> Slots | None:
    """Slots of a batch of prompts; ``None`` when no prompt has a passage.

    Args:
        batch: the placed states of each prompt, in prompt order.

    Raises:
        BadInput: a state does not have the backbone's layers, heads or head size, or some belong
            to a bank and others do not.
    """
    placed = [p for prompt in batch for p in prompt]
    if not placed:
        return None
    for p in placed:
        _check(p.state, backbone)
    device, dtype = backbone.device, backbone.dtype
    states = [p.state.to(device, dtype) for p in placed]
    keys = torch.cat([s.keys for s in states])
    values = torch.cat([s.values for s in states])
    bias = torch.cat([s.bias for s in states])
    starts = torch.tensor([p.start for p in placed], device=device)
    order = torch.tensor([i for prompt in batch for i in range(len(prompt))], device=device)
    sizes = torch.tensor([s.num_slots for s in states], device=device)
    positions = torch.cat([s.offsets for s in states]) + starts.repeat_interleave(sizes)
    bank = _bank(states)
    if bank is not None:  # it has no order, so no places either
        positions = torch.zeros_like(positions)
    destination, lengths = _destination(states, batch, backbone)
    widths = tuple(lengths.amax((1, 2)).tolist())
    total = len(batch) * backbone.num_heads * sum(widths)

    cos, sin = backbone.rotary(positions)
    keys, values = compose_kv(keys, values, cos, sin, destination, total)
    return Slots(
        keys=keys,
        values=values,
        bias=bias.new_full((total,), -torch.inf).index_copy(0, destination, bias),
        order=order.new_zeros(total).index_copy(0, destination, order.repeat_interleave(sizes)),
        lengths=lengths.to(torch.int32),
        widths=widths,
        batch=len(batch),
        heads=backbone.num_heads,
        bank=bank,
    )


def _bank(states: Sequence[GistState]) -> float | None:
    """The temperature of a bank of these states; ``None`` if they are no bank."""
    bank, *others = {state.bank for state in states}
    if others:
        raise BadInput(
            "gists of a bank and other gists, or banks of different temperatures, cannot stand in "
            "one batch of prompts; compress all passages with one compressor"
        )
    return bank


def _destination(
    states: Sequence[GistState], batch: Sequence[Sequence[Placed]], backbone: Backbone
) -> tuple[Tensor, Tensor]:
    """Where each slot goes in the flat (layer, batch row, head, slot) buffer, and how many slots
    each head has ``(L, B, H)``."""
    layers, heads = backbone.num_layers, backbone.num_heads
    lengths = torch.stack([s.lengths.long() for s in states])  # (states, L * H)
    before = torch.zeros_like(lengths)  # slots of earlier passages of the same prompt and head
    total = lengths.new_zeros(len(batch), layers * heads)
    first = 0
    for row, prompt in enumerate(batch):
        last = first + len(prompt)
        if prompt:
            running = lengths[first:last].cumsum(0)
            before[first:last], total[row] = running - lengths[first:last], running[-1]
        first = last
    lengths_of_rows = total.view(-1, layers, heads).transpose(0, 1)  # (L, B, H)
    widths = lengths_of_rows.amax((1, 2))  # (L,)
    layer_start = (widths.cumsum(0) - widths) * len(batch) * heads

    device = lengths.device
    prompt_of = torch.tensor([r for r, p in enumerate(batch) for _ in p], device=device)
    layer = torch.arange(layers, device=device).repeat_interleave(heads)  # (L * H,)
    head = torch.arange(heads, device=device).repeat(layers)
    row_start = layer_start[layer] + (prompt_of[:, None] * heads + head) * widths[layer]
    row_start = row_start + before  # (states, L * H), first slot of each state's row

    flat = lengths.flatten()
    rank = torch.arange(int(flat.sum()), device=device)
    rank = rank - (flat.cumsum(0) - flat).repeat_interleave(flat)
    return row_start.flatten().repeat_interleave(flat) + rank, lengths_of_rows


def _check(state: GistState, backbone: Backbone) -> None:
    given = (state.num_layers, state.num_heads, state.keys.shape[1])
    expected = (backbone.num_layers, backbone.num_heads, backbone.head_dim)
    if given != expected:
        raise BadInput(
            f"a gist with (layers, KV heads, head size) {given} cannot be read by "
            f"{backbone.name}, which has {expected}"
        )
