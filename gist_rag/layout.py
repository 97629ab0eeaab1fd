"""Where tokens and gists stand while a passage is encoded, and who sees whom.

One visibility rule serves every gist-token method. A slot is a raw token or a gist; slot ``q`` sees
slot ``k`` when ``k`` is not later and one of these holds:

- ``k`` is a raw token and ``k >= local_from[q]``,
- ``k`` is a gist and ``k >= gist_from[q]``,
- ``k < prefix`` (sinks, seen by everyone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = 1 << 30
"""A ``gist_from`` or ``local_from`` that hides all slots of the kind."""


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
        raw_sees_gists: bool = True,
        gists_see_gists: bool = True,
        raw_is_local: bool = True,
    ) -> Layout:
        """One gist after each window (``t t g t t g``), at the position of its window's last token.

        Args:
            ends: exclusive token ends of the windows, rising; the last one is ``T``.
            raw_sees_gists: raw tokens see the gists of earlier windows.
            gists_see_gists: a gist sees earlier gists.
            raw_is_local: raw tokens see raw tokens of their own window only.
        """
        source, position, local_from, gist_from = [], [], [], []
        window = token = 0
        for end in ends:
            for t in range(token, end):
                source.append(t)
                position.append(t)
                local_from.append(window if raw_is_local else 0)
                gist_from.append(0 if raw_sees_gists else NEVER)
            gist_from.append(0 if gists_see_gists else len(source))
            source.append(-1)
            position.append(end - 1)
            local_from.append(window)
            window, token = len(source), end
        return cls(
            torch.tensor(source),
            torch.tensor(position),
            torch.tensor(local_from),
            torch.tensor(gist_from),
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
    def is_causal(self) -> bool:
        """Every slot sees all earlier ones, so no mask is needed."""
        return not bool(self.local_from.any() or self.gist_from.any())

    def mask(self) -> Tensor:
        """``(S, S)`` bool: row ``q`` may see column ``k``."""
        slot = torch.arange(len(self))
        q, k = slot[:, None], slot[None, :]
        first = torch.where(
            self.is_gist[None, :], self.gist_from[:, None], self.local_from[:, None]
        )
        return (k <= q) & ((k >= first) | (k < self.prefix))


@dataclass(frozen=True)
class Slots:
    """Composed gists of a batch of prompts, rotated and ready to be attended to.

    Heads are ragged, so each layer is padded to its own longest head; all layers share one flat
    buffer of ``R`` slots in (layer, batch row, KV head, slot) order.

    Attributes:
        keys: ``(R, D)`` after RoPE.
        values: ``(R, D)``.
        bias: ``(R,)`` float32 log-mass, ``-inf`` on padding.
        order: ``(R,)`` int32, which passage of the prompt a slot belongs to (0, 1, ...).
        widths: slots per head of each layer, padding included; length ``L``.
        batch: ``B``.
        heads: ``H``.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    order: Tensor
    widths: tuple[int, ...]
    batch: int
    heads: int

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values ``(B, H, N, D)``, bias and order ``(B, H, N)`` of one layer (views)."""
        rows, width = self.batch * self.heads, self.widths[index]
        start = rows * sum(self.widths[:index])
        shape = (self.batch, self.heads, width)
        part = slice(start, start + rows * width)
        size = self.keys.shape[1]
        return (
            self.keys[part].view(*shape, size),
            self.values[part].view(*shape, size),
            self.bias[part].view(shape),
            self.order[part].view(shape),
        )

    def visible_bias(self, index: int, seen: Tensor | None) -> Tensor:
        """Bias of one layer for given queries.

        Args:
            seen: ``(B, Q)`` number of passages that come before each query token, or ``None`` when
                all passages do.

        Returns:
            ``(B, H, 1 or Q, N)``, ``-inf`` where the query comes before the slot's passage.
        """
        _, _, bias, order = self.layer(index)
        if seen is None:
            return bias[:, :, None]
        hidden = order[:, :, None] >= seen[:, None, :, None]
        return bias[:, :, None].masked_fill(hidden, -torch.inf)
