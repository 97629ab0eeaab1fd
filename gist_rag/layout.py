"""Where tokens and gists stand while a passage is encoded, and who sees whom.

One visibility rule serves every gist-token method. A slot is a raw token or a gist; slot ``q`` sees
slot ``k`` when ``k`` is not later and one of these holds:

- ``k`` is a raw token and ``k >= local_from[q]``,
- ``k`` is a gist and ``k >= gist_from[q]``,
- ``k < prefix`` (sinks, seen by everyone).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Literal, Self

import torch
from torch import Tensor

from gist_rag_kernels import Shift, gist_shift, visibility

NEVER = 1 << 30
"""A ``gist_from`` or ``local_from`` that hides all slots of the kind."""

Place = Literal["last", "next", "own"]
"""RoPE position of a gist among tokens: that of its window's ``last`` token, of the ``next``
token after it, or one of its ``own``, so that later tokens move on."""


@dataclass(frozen=True)
class Layout:
    """Slots of one passage, in the order in which they are fed to the model.

    Attributes:
        source: ``(S,)`` index of the passage token, or ``-1 - i`` for gist embedding ``i``.
        position: ``(S,)`` RoPE position inside the passage.
        local_from: ``(S,)`` first raw slot that a slot sees.
        gist_from: ``(S,)`` first gist slot that a slot sees.
        prefix: leading slots that every slot sees.
    """

    source: Tensor
    position: Tensor
    local_from: Tensor
    gist_from: Tensor
    prefix: int = 0

    @classmethod
    def tokens(cls, num_tokens: int) -> Layout:
        """Raw tokens only, causal."""
        index, zeros = torch.arange(num_tokens), torch.zeros(num_tokens, dtype=torch.long)
        return cls(index, index, zeros, zeros)

    @classmethod
    def append(cls, num_tokens: int, num_gists: int, kinds: int = 1) -> Layout:
        """All tokens, then the gists, causal throughout (``t t t t g g``).

        Args:
            kinds: different gist embeddings, taken in turn.
        """
        size = num_tokens + num_gists
        source = torch.cat((torch.arange(num_tokens), -1 - torch.arange(num_gists) % kinds))
        zeros = torch.zeros(size, dtype=torch.long)
        return cls(source, torch.arange(size), zeros, zeros)

    @classmethod
    def interleave(
        cls,
        ends: Sequence[int],
        *,
        gists: Sequence[Sequence[int]] | None = None,
        place: Place = "last",
        raw_sees_gists: bool = True,
        gists_see_gists: bool = True,
        raw_is_local: bool = True,
        gists_are_local: bool = True,
        reach: int = 0,
        prefix: int = 0,
    ) -> Layout:
        """Gists after each window of tokens (``t t g t t g``).

        Args:
            ends: exclusive token ends of the windows, rising; the last one is ``T``.
            gists: which gist embeddings follow each window; default: one, always the same.
            place: where gists stand.
            raw_sees_gists: raw tokens see the gists of earlier windows.
            gists_see_gists: a gist sees the gists of earlier windows too, not only of its own.
            raw_is_local: raw tokens see raw tokens of their own window only.
            gists_are_local: gists see raw tokens of their own window only.
            reach: how many earlier windows count as one's own, for what is local.
            prefix: leading tokens that every slot sees (and the gists that stand between them).
        """
        source: list[int] = []
        position: list[int] = []
        local_from: list[int] = []
        gist_from: list[int] = []
        starts: list[int] = []  # first slot of each window
        token = 0
        for end, kinds in zip(ends, gists or [(0,)] * len(ends), strict=True):
            starts.append(len(source))
            near = starts[max(0, len(starts) - 1 - reach)]
            own = len(source) + end - token  # first gist of this window
            for t in range(token, end):
                position.append(len(source) if place == "own" else t)
                source.append(t)
                local_from.append(near if raw_is_local else 0)
                gist_from.append(0 if raw_sees_gists else NEVER)
            for kind in kinds:
                position.append({"last": end - 1, "next": end, "own": len(source)}[place])
                source.append(-1 - kind)
                local_from.append(near if gists_are_local else 0)
                gist_from.append(0 if gists_see_gists else own)
            token = end
        return cls(
            torch.tensor(source),
            torch.tensor(position),
            torch.tensor(local_from),
            torch.tensor(gist_from),
            prefix=source.index(min(prefix, token) - 1) + 1 if prefix else 0,
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def is_gist(self) -> Tensor:
        """``(S,)`` bool."""
        return self.source < 0

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return int((~self.is_gist).sum())

    @property
    def span(self) -> int:
        """Positions the passage takes."""
        return int(self.position.max()) + 1 if len(self) else 0

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """``(G,)`` starts and exclusive ends of the tokens that each gist stands for: those since
        the gists before it, or since the ``prefix``, evenly among gists side by side. A gist with
        more neighbours than tokens may have none."""
        ends = (~self.is_gist).cumsum(0)[self.is_gist]
        runs, run, counts = ends.unique_consecutive(return_inverse=True, return_counts=True)
        sinks = (~self.is_gist)[: self.prefix].sum()
        starts = torch.cat((sinks[None], runs[:-1])).clamp_min(sinks).minimum(runs)
        place = torch.arange(len(ends)) - (counts.cumsum(0) - counts)[run]
        first, size, count = starts[run], (runs - starts)[run], counts[run]
        return first + size * place // count, first + size * (place + 1) // count

    def beside_tokens(self) -> Layout:
        """The same, with each gist at the position of the last token that it stands for
        (``shares``), and tokens at those that they have without gists."""
        position = self.source.clone()
        position[self.is_gist] = (self.shares[1] - 1).clamp_min(0)
        return replace(self, position=position)

    @property
    def is_causal(self) -> bool:
        """Every slot sees all earlier ones, and they stand in sequence, so no mask is needed.
        (Without one, transformers takes positions that do not rise by 1 for texts of their own.)"""
        in_sequence = torch.equal(self.position, torch.arange(len(self)))
        return in_sequence and not bool(self.local_from.any() or self.gist_from.any())

    def mask(self) -> Tensor:
        """``(S, S)`` bool: row ``q`` may see column ``k``."""
        return Visibility.of([self], len(self)).mask()[0]


@dataclass(frozen=True)
class Visibility:
    """The visibility rule of a batch of layouts, padded right.

    Attributes:
        is_gist: ``(B, S)`` bool.
        local_from, gist_from: ``(B, S)``; ``S`` on padding.
        prefix: ``(B,)``.
        shift: how a kernel skips what is not seen; made once for all layers.
    """

    is_gist: Tensor
    local_from: Tensor
    gist_from: Tensor
    prefix: Tensor
    shift: Shift | None = None

    @classmethod
    def of(cls, layouts: Sequence[Layout], size: int, device: torch.device | str = "cpu") -> Self:
        """Of layouts padded to ``size`` slots."""
        rule = torch.full((3, len(layouts), size), size)
        for row, layout in enumerate(layouts):
            given = layout.is_gist.long(), layout.local_from, layout.gist_from
            rule[:, row, : len(layout)] = torch.stack(given)
        is_gist, local_from, gist_from = rule.to(device)
        prefix = torch.tensor([layout.prefix for layout in layouts], device=device)
        return cls(is_gist == 1, local_from, gist_from, prefix)

    def shifted(self) -> Self:
        """With what a kernel needs."""
        shift = gist_shift(self.is_gist, self.local_from, self.gist_from, self.prefix)
        return replace(self, shift=shift)

    def mask(self) -> Tensor:
        """``(B, S, S)`` bool: row ``q`` may see column ``k``."""
        return visibility(self.is_gist, self.local_from, self.gist_from, self.prefix)


def window_ends(num_tokens: int, ratio: float) -> Tensor:
    """Exclusive ends of ``ceil(T / ratio)`` windows that differ by at most one token."""
    windows = math.ceil(num_tokens / ratio)
    return (torch.arange(1, windows + 1) * num_tokens).div(windows, rounding_mode="floor")


def unit_ends(breaks: Sequence[int], num_tokens: int, count: int, longest: int) -> list[int]:
    """Exclusive ends of ``count`` units that end at breaks of the text as far as possible.

    Units of more than ``longest`` tokens are cut evenly. Then the two neighbours that are shortest
    together are merged, or the longest unit is halved, until there are ``count``.

    Args:
        breaks: exclusive token ends of sentences, lines or paragraphs, rising.
        count: from 1 to ``num_tokens``.
    """
    sizes: list[int] = []
    for start, end in pairwise([0, *(b for b in breaks if 0 < b < num_tokens), num_tokens]):
        sizes += _even(end - start, math.ceil((end - start) / longest))
    while len(sizes) > count:
        i = min(range(len(sizes) - 1), key=lambda i: sizes[i] + sizes[i + 1])
        sizes[i : i + 2] = [sizes[i] + sizes[i + 1]]
    while len(sizes) < count:
        i = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[i : i + 1] = _even(sizes[i], 2)
    return list(accumulate(sizes))


def unit_slots(ends: Sequence[int], slots: int, each: int) -> list[int]:
    """How many of ``slots`` each unit gets: ``each``, but the shortest one what is left over."""
    sizes = [end - start for start, end in pairwise([0, *ends])]
    shortest = sizes.index(min(sizes))
    rest = slots - each * (len(sizes) - 1)
    return [rest if i == shortest else each for i in range(len(sizes))]


def _even(size: int, parts: int) -> list[int]:
    """``size`` in parts that differ by at most one."""
    return [size * (i + 1) // parts - size * i // parts for i in range(parts)]


@dataclass(frozen=True)
class SlotRows:
    """Slots of one layer, of some rows of a batch that have one width (views).

    Attributes:
        rows: which rows.
        keys: ``(b, H, N, D)``.
        values: ``(b, H, N, D)``.
        bias: ``(b, H, N)``.
        order: ``(b, H, N)``.
    """

    rows: slice
    keys: Tensor
    values: Tensor
    bias: Tensor
    order: Tensor

    def visible_bias(self, seen: Tensor | None) -> Tensor:
        """Bias for given queries.

        Args:
            seen: ``(B, Q)`` number of passages that come before each query token of the whole
                batch, or ``None`` when all passages do.

        Returns:
            ``(b, H, 1 or Q, N)``, ``-inf`` where the query comes before the slot's passage.
        """
        if seen is None:
            return self.bias[:, :, None]
        hidden = self.order[:, :, None] >= seen[self.rows, None, :, None]
        return self.bias[:, :, None].masked_fill(hidden, -torch.inf)


@dataclass(frozen=True)
class Slots:
    """Composed gists of a batch of prompts, rotated and ready to be attended to.

    Heads are ragged, so each is padded to the width of its layer and row. All share one flat buffer
    of ``R`` slots in (layer, batch row, KV head, slot) order.

    Attributes:
        keys: ``(R, D)`` after RoPE.
        values: ``(R, D)``.
        bias: ``(R,)`` float32 log-mass, ``-inf`` on padding.
        order: ``(R,)`` int32, which passage of the prompt a slot belongs to (0, 1, ...).
        lengths: ``(L, B, H)`` int32, slots without padding.
        widths: ``(L, B)``, slots per head with padding.
        heads: ``H``.
        bank: ``None`` where slots join attention. Else they are a bank: their keys were not moved,
            a softmax of its own reads them, of this temperature and with logit 0 for "none of
            them", and what it reads is added to attention's output.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    order: Tensor
    lengths: Tensor
    widths: Sequence[Sequence[int]]
    heads: int
    bank: float | None = None

    @cached_property
    def starts(self) -> Tensor:
        """``(L, B, H)`` int64, where each row begins in the buffer."""
        return row_starts(torch.tensor(self.widths), self.heads).to(self.keys.device)

    @cached_property
    def _firsts(self) -> list[list[int]]:
        """``(L, B)``, where each row's first head begins."""
        firsts: list[list[int]] = self.starts[..., 0].tolist()
        return firsts

    def rows(self, index: int) -> list[SlotRows]:
        """One layer, neighbours of one width together."""
        sizes = [len([*same]) for _, same in groupby(self.widths[index])]
        ends = [0, *accumulate(sizes)]
        return [self._rows(index, slice(*bounds)) for bounds in pairwise(ends)]

    def row(self, index: int, row: int) -> SlotRows:
        """One row of one layer."""
        return self._rows(index, slice(row, row + 1))

    def _rows(self, index: int, rows: slice) -> SlotRows:
        count, width = rows.stop - rows.start, self.widths[index][rows.start]
        first = self._firsts[index][rows.start]
        part, shape = slice(first, first + count * self.heads * width), (count, self.heads, width)
        return SlotRows(
            rows,
            self.keys[part].view(*shape, self.keys.shape[1]),
            self.values[part].view(*shape, self.keys.shape[1]),
            self.bias[part].view(shape),
            self.order[part].view(shape),
        )


def row_starts(widths: Tensor, heads: int) -> Tensor:
    """``(L, B, H)``, where the slots of each head begin, one after the other.

    Args:
        widths: ``(L, B)`` slots per head.
    """
    sizes = widths.repeat_interleave(heads)
    return (sizes.cumsum(0) - sizes).view(*widths.shape, heads)
