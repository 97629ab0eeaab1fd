"""States > slots: give every passage its place in the prompt and rotate its keys there.

``place`` decides positions, ``compose`` does the work for a whole batch of prompts at once: one
launch over all layers, heads and passages (``gist_rag_kernels.compose_packed``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Local
from gist_rag.errors import BadInput
from gist_rag.layout import Slots, row_starts
from gist_rag.types import GistState
from gist_rag_kernels import Composed, PackedKV, compose_kv, compose_packed

Positions = Literal["parallel", "sequence"]
"""Where passages go that stand side by side. ``sequence``: one after the other, as in the text.
``parallel``: all start at the same position, so that their order does not matter and a prompt grows
by the longest one only."""
DEFAULT_POSITIONS: Positions = "sequence"


@dataclass(frozen=True)
class Placed:
    """A state and the position of its first token.

    Attributes:
        log_weight: added to the log-mass of its slots: how much of its attention a prompt is to
            give it, next to other passages.
    """

    state: GistState
    start: int
    log_weight: float = 0.0


def place(
    states: Sequence[GistState], start: int, positions: Positions
) -> tuple[list[Placed], int]:
    """Positions of passages that stand side by side, and the first position after them."""
    placed, end = [], start
    for state in states:
        placed.append(Placed(state, start if positions == "parallel" else end))
        end = max(end, placed[-1].start + state.span)
    return placed, end


def weighed(placed: Sequence[Placed], log_weights: Sequence[float]) -> list[Placed]:
    """The same passages, each with a weight."""
    pairs = zip(placed, log_weights, strict=True)
    return [replace(one, log_weight=weight) for one, weight in pairs]


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

    Gists are read as they are stored, all in one launch; those that gradients flow to must be
    floats.

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
    nothing = Placed(placed[0].state.emptied(), 0)
    batch = [prompt or [nothing] for prompt in batch]  # so that each prompt has rows
    joined = _Joined.of(batch, backbone)
    learnt = any(t.requires_grad for t in (joined.kv.keys, joined.kv.values, joined.bias))
    move = _compose_learnt if learnt and torch.is_grad_enabled() else _compose_stored
    composed = move(joined, backbone)
    assert composed.bias is not None
    assert composed.order is not None
    return Slots(
        keys=composed.keys,
        values=composed.values,
        bias=composed.bias,
        order=composed.order,
        lengths=joined.lengths.to(torch.int32),
        widths=joined.widths,
        heads=backbone.num_heads,
        bank=joined.bank,
    )


@dataclass(frozen=True)
class _Joined:
    """``P`` states of a batch of prompts one after the other, and where their rows go.

    The result is one flat buffer in (layer, batch row, head, slot) order. Rows have one of two
    widths in each layer, that of the widest or of those that have not half of it, so that a passage
    read apart is not padded to all of them together.

    Attributes:
        kv: keys and values, ``R = P * L * H`` rows.
        bias, offsets: ``(M,)``.
        starts, order: ``(P,)`` position of each state, and its place among those of its prompt.
        end: the first position that no slot can have.
        destination: ``(R,)`` where each row begins in the result.
        room: ``(R,)`` how much of the result it fills: padding belongs to a prompt's last state.
        lengths: ``(L, B, H)`` slots of each head of the result.
        widths: ``(L, B)``, the same with padding.
        bank: see ``Slots``.
    """

    kv: PackedKV
    bias: Tensor
    offsets: Tensor
    starts: Tensor
    order: Tensor
    end: int
    destination: Tensor
    room: Tensor
    lengths: Tensor
    widths: list[list[int]]
    bank: float | None

    @classmethod
    def of(cls, batch: Sequence[Sequence[Placed]], backbone: Backbone) -> Self:
        device, shape = backbone.device, (len(batch), backbone.num_layers, backbone.num_heads)
        placed = [p for prompt in batch for p in prompt]
        states = [p.state.to(device) for p in placed]
        sizes = torch.tensor([len(prompt) for prompt in batch], device=device)
        prompt = torch.repeat_interleave(sizes, output_size=len(placed))  # (P,)
        last = sizes.cumsum(0) - 1
        first = last - sizes + 1

        lengths = torch.stack([state.lengths.long() for state in states])  # (P, L * H)
        behind = lengths.cumsum(0)
        earlier = behind - lengths
        before = earlier - earlier[first][prompt]  # slots of a prompt's earlier states
        total = (before + lengths)[last].view(shape).transpose(0, 1)  # (L, B, H)
        widths = total.amax(2).cpu()  # (L, B); the only numbers that the host waits for
        widest = widths.amax(1, keepdim=True)
        narrow = 2 * widths <= widest
        widths = torch.where(narrow, (widths * narrow).amax(1, keepdim=True), widest)
        begins = row_starts(widths, shape[2])  # (L, B, H)
        begins, ends = (
            x.transpose(0, 1).flatten(1).to(device) for x in (begins, begins + widths[..., None])
        )
        room = lengths.index_copy(0, last, ends - begins - before[last])

        bank = _bank(states)
        bias = [s.bias.float() + p.log_weight for s, p in zip(states, placed, strict=True)]
        offsets = torch.cat([state.offsets for state in states])
        starts = [0 if bank is not None else p.start for p in placed]
        return cls(
            kv=_join(states, backbone.dtype),
            bias=torch.cat(bias),
            # a bank has no order, so no places either
            offsets=offsets if bank is None else torch.zeros_like(offsets),
            starts=torch.tensor(starts, device=device),
            order=(torch.arange(len(placed), device=device) - first[prompt]).to(torch.int32),
            end=max(p.start + max(p.state.span, p.state.num_tokens) for p in placed),
            destination=(begins[prompt] + before).flatten(),
            room=room.flatten(),
            lengths=total,
            widths=widths.tolist(),
            bank=bank,
        )

    @property
    def num_slots(self) -> int:
        """Of the result, padding included."""
        return sum(map(sum, self.widths)) * self.lengths.shape[2]


def _join(states: Sequence[GistState], dtype: torch.dtype) -> PackedKV:
    """Keys and values of all states; as they are stored where all are stored alike."""
    if len({kv.dtype for state in states for kv in (state.keys, state.values)}) > 1:
        states = [state.floats(dtype) for state in states]
    edges = [states[0].rows[:1].long()]
    for state in states:
        edges.append(state.rows[1:] + edges[-1][-1])
    key_scales = [s.key_scales for s in states if s.key_scales is not None]
    value_scales = [s.value_scales for s in states if s.value_scales is not None]
    return PackedKV(
        keys=torch.cat([state.keys for state in states]),
        values=torch.cat([state.values for state in states]),
        rows=torch.cat(edges),
        key_scales=torch.cat(key_scales) if key_scales else None,
        value_scales=torch.cat(value_scales) if value_scales else None,
        key_group=states[0].key_group,
    )


def _compose_stored(joined: _Joined, backbone: Backbone) -> Composed:
    """Gists as they are stored go to their places, in one launch."""
    return compose_packed(
        joined.kv,
        joined.offsets,
        joined.starts,
        *backbone.angles(joined.end),
        joined.destination,
        joined.num_slots,
        dtype=backbone.dtype,
        bias=joined.bias,
        order=joined.order,
        room=joined.room,
    )


def _compose_learnt(joined: _Joined, backbone: Backbone) -> Composed:
    """The same with gradients, which takes an angle for each slot."""
    lengths = joined.kv.rows.diff()
    rank = torch.arange(len(joined.bias), device=lengths.device)
    shift = joined.destination - joined.kv.rows[:-1]
    slot = rank + shift.repeat_interleave(lengths)
    state = torch.arange(len(joined.starts), device=lengths.device)
    state = state.repeat_interleave(lengths.view(len(state), -1).sum(1))
    keys, values = compose_kv(
        joined.kv.keys.to(backbone.dtype),
        joined.kv.values.to(backbone.dtype),
        *backbone.rotary(joined.offsets + joined.starts[state]),
        slot,
        joined.num_slots,
    )
    nothing = joined.bias.new_full((joined.num_slots,), -torch.inf)
    order = joined.order.new_zeros(joined.num_slots)
    return Composed(
        keys,
        values,
        nothing.index_copy(0, slot, joined.bias),
        order.index_copy(0, slot, joined.order[state]),
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


def _check(state: GistState, backbone: Backbone) -> None:
    given = (state.num_layers, state.num_heads, state.kv.head_dim)
    expected = (backbone.num_layers, backbone.num_heads, backbone.head_dim)
    if given != expected:
        raise BadInput(
            f"a gist with (layers, KV heads, head size) {given} cannot be read by "
            f"{backbone.name}, which has {expected}"
        )
