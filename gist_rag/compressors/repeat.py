"""The model repeats passages from its own KV, which asks for everything that they hold.

What each head then gets from a passage is what a compressed one must give it, whoever asks later:
the target of ``attention_matching``, and of trained methods while they learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local, Prefix
from gist_rag.compose import Placed, compose
from gist_rag.errors import BadInput
from gist_rag.prompt import framing
from gist_rag.types import GistState
from gist_rag_kernels import rotate, score_keys

REPEAT = "\n\nRepeat the text above."


@dataclass(frozen=True)
class Repeat:
    """The repeat pass of a batch.

    Attributes:
        context: prefix and uncompressed passages.
        texts: instruction and passage, ``Q_b`` tokens each.
        num_tokens: passage tokens of each row.
        queries: ``(L, B, H, G * Q, D)`` after RoPE, left-padded.
        hidden: ``(L + 1, B, Q, E)`` residual streams.
    """

    context: Context
    texts: list[Local]
    num_tokens: list[int]
    queries: Tensor
    hidden: Tensor

    def asked(self, row: int) -> Tensor:
        """Queries ``(L * H, G * Q_b, D)`` of one passage without padding."""
        longest, own = max(len(t.ids) for t in self.texts), len(self.texts[row].ids)
        grouped = self.queries[:, row].unflatten(2, (-1, longest))  # (L, H, G, Q, D)
        queries: Tensor = grouped[:, :, :, longest - own :].flatten(2, 3).flatten(0, 1)
        return queries

    def kv(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values ``(L * H, T, D)`` of one passage as the pass saw them."""
        slots, tokens = self.context.slots, self.num_tokens[row]
        assert slots is not None
        layers = [slots.row(i, row) for i in range(len(self.queries))]
        keys = torch.cat([layer.keys[0, :, :tokens] for layer in layers])
        values = torch.cat([layer.values[0, :, :tokens] for layer in layers])
        return keys.float(), values.float()

    @cached_property
    def prefix_kv(self) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values ``(L * H, P, D)`` of what stands before every passage."""
        prefix = self.context.prefixes[0]
        return prefix.keys.flatten(0, 1).float(), prefix.values.flatten(0, 1).float()


class Repeater:
    """Has a backbone repeat passages."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @cached_property
    def prefix(self) -> Prefix:
        """What stands before the passage."""
        return self.backbone.prefix(self.backbone.tokenize(self._framing[0]))

    @cached_property
    def question(self) -> Tensor:
        """Token ids between the passage and its repetition."""
        return self.backbone.tokenize(self._framing[1])

    @cached_property
    def _framing(self) -> tuple[str, str]:
        return framing(REPEAT, self.backbone.render)

    def context(self, states: Sequence[GistState]) -> Context:
        """Each state alone after the prefix."""
        slots = compose([[Placed(s, len(self.prefix))] for s in states], self.backbone)
        return Context([self.prefix] * len(states), slots)

    def __call__(self, states: Sequence[GistState], passages: Sequence[Tensor]) -> Repeat:
        """Repeat passages ``(T_i,)`` from their states, which are to be uncompressed."""
        texts = self._texts(states, passages)
        context = self.context(states)
        hidden, positions = self.backbone.trace(context, texts)
        return Repeat(
            context=context,
            texts=texts,
            num_tokens=[len(ids) for ids in passages],
            queries=self.backbone.project_queries(hidden[:-1], positions),
            hidden=hidden,
        )

    def read(self, states: Sequence[GistState], passages: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``(T_i, V)`` of passages ``(T_i,)``, repeated from their states, whatever these
        are; differentiable."""
        texts = self._texts(states, passages)
        longest = max(map(len, passages)) + 1
        logits = self.backbone.read(self.context(states), texts, num_logits=longest)
        return [row[-1 - len(ids) : -1] for row, ids in zip(logits, passages, strict=True)]

    def _texts(self, states: Sequence[GistState], passages: Sequence[Tensor]) -> list[Local]:
        """Instruction and passage, behind each state."""
        return [
            Local.after(torch.cat((self.question, ids)), len(self.prefix) + state.span, 1)
            for ids, state in zip(passages, states, strict=True)
        ]

    def scores(
        self, repeat: Repeat, row: int, how: Literal["rms", "max"] = "rms"
    ) -> tuple[Tensor, Tensor]:
        """How much each key of one passage is attended to, ``(L * H, T)``, and how much of each
        query's attention the passage gets, ``(L * H, G * Q_b)``; see ``score_keys``."""
        queries, before, keys = repeat.asked(row), repeat.prefix_kv[0], repeat.kv(row)[0]
        return score_keys(queries, before, keys, self.backbone.scaling, how)

    def target(self, repeat: Repeat, row: int, num_queries: int) -> Target:
        """What heads get from one passage.

        Args:
            num_queries: how many queries of each head are looked at, evenly spread.
        """
        queries = repeat.asked(row) * self.backbone.scaling
        queries = queries[:, :: -(-queries.shape[1] // num_queries)]
        return Target.of(queries, repeat.prefix_kv, repeat.kv(row))

    def error(self, target: Target, state: GistState) -> Tensor:
        """How far reading a compressed passage is from reading it whole, head by head: the squared
        error as a share of the target's own square, a mean over layers and heads; differentiable.

        Args:
            state: what the passage has become.

        Raises:
            BadInput: its slots belong to a bank, so that attention does not read them.
        """
        if state.bank is not None:
            raise BadInput("gists of a bank join no attention, so there is nothing to match")
        # ends where the whole passage does, wherever it begins
        end = len(self.prefix) + state.num_tokens - state.span
        rotated = rotate(state.keys.float(), *self.backbone.rotary(state.offsets.long() + end))
        dense = replace(state, keys=rotated, values=state.values.float()).dense()
        error = target.error(*(x.flatten(0, 1) for x in dense))
        return (error / target.output.square().sum((1, 2))).mean()


@dataclass(frozen=True)
class Target:
    """What reading prefix and whole passage gives, for some queries of every row.

    Attributes:
        queries: ``(R, Q, D)`` after RoPE, scaled.
        prefix_mass: ``(R, Q, 1)`` log of the prefix's summed exponentials.
        output: ``(R, Q, D + 1)`` the passage's part of the output, and its share of the attention
            times ``distance``.
        distance: ``(R, 1, 1)`` between the outputs of prefix and passage, RMS over queries.
    """

    queries: Tensor
    prefix_mass: Tensor
    output: Tensor
    distance: Tensor

    @classmethod
    def of(
        cls, queries: Tensor, prefix: tuple[Tensor, Tensor], passage: tuple[Tensor, Tensor]
    ) -> Target:
        """From keys after RoPE and values ``(R, *, D)`` of prefix and passage."""
        before, logits = queries @ prefix[0].transpose(1, 2), queries @ passage[0].transpose(1, 2)
        attention = torch.cat((before, logits), -1).softmax(-1)
        outside, inside = attention.split((before.shape[-1], logits.shape[-1]), dim=-1)
        share, output = inside.sum(-1, keepdim=True), inside @ passage[1]
        apart = outside @ prefix[1] / (1 - share).clamp_min(1e-6) - output / share.clamp_min(1e-6)
        distance = apart.square().sum(-1).mean(1).sqrt()[:, None, None]
        mass = before.logsumexp(-1, keepdim=True)
        return cls(queries, mass, torch.cat((output, share * distance), -1), distance)

    def rows(self, rows: Tensor) -> Target:
        """Of some rows."""
        return Target(
            self.queries[rows], self.prefix_mass[rows], self.output[rows], self.distance[rows]
        )

    def error(self, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """``(R,)`` squared error of reading slots instead, summed over queries.

        Args:
            keys: ``(R, N, D)`` after RoPE.
            values: ``(R, N, D)``.
            bias: ``(R, N)`` log-masses, ``-inf`` on padding.
        """
        logits = self.queries @ keys.transpose(1, 2) + bias[:, None]
        read = torch.cat((self.prefix_mass, logits), -1).softmax(-1)[..., 1:]
        distance = self.distance.expand(-1, values.shape[1], 1)
        return (read @ torch.cat((values, distance), -1) - self.output).square().sum((1, 2))
