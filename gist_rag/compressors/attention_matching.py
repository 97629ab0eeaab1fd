"""``attention_matching``: the training-free default. Keep the keys that matter, fit the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gist_rag.backbone import Context, Local, Prefix
from gist_rag.compose import Placed, compose
from gist_rag.compressors.base import Compressor, CompressorConfig
from gist_rag.losses import distill
from gist_rag.prompt import MARK
from gist_rag.types import GistState

REPEAT = "\n\nRepeat the text above."
REFINE_STEPS = 6
MIN_MASS, MAX_MASS = 1e-4, 1e3
RIDGE = 1e-4
CHUNK = 1 << 22
"""Elements of the attention matrices that are held at a time."""


class AttentionMatchingConfig(CompressorConfig):
    """Settings of ``attention_matching``.

    Attributes:
        preset: ``fast`` keeps the best keys as they are; ``balanced`` also fits log-masses and
            values; ``best`` refines the fit by self-distillation.
        budget: whose slots compete for the same budget: all layers and heads of a passage
            (``global``), the heads of one layer (``layer``), or nobody's (``head``: every head
            keeps the same number, for engines that cannot take ragged heads).
        score: how a key's attention is summed up over the queries of the repeat pass.
        refine_steps: Adam steps of self-distillation; ``None`` is the preset's own number.
        refine_lr: learning rate of those steps, on keys, values and log-masses alike.
    """

    preset: Literal["fast", "balanced", "best"] = "balanced"
    budget: Literal["global", "layer", "head"] = "global"
    score: Literal["rms", "max"] = "rms"
    refine_steps: int | None = Field(default=None, ge=0)
    refine_lr: float = Field(default=1e-2, gt=0)

    @property
    def steps(self) -> int:
        if self.refine_steps is not None:
            return self.refine_steps
        return REFINE_STEPS if self.preset == "best" else 0


class AttentionMatching(Compressor):
    """Idea: let the model repeat the passage from its own KV and see which keys it needs; keep
    those, and fit a mass and a value to each so that they stand for the ones that go.

        score    s_j = RMS over queries i of softmax_j(q_i k_j), over prefix and passage
        select   the M best of all layers and heads together: heads keep what they need
        mass     min over w >= 0 of  sum_i p_i^2 (sum_j a_ij w_j - 1)^2    (log w is the slot bias)
        value    min over V' of      sum_i p_i^2 |sum_j x_ij v'_j - o_i|^2
        refine   a few steps of KL(repeat from all KV || repeat from the kept slots)

    a is attention over the passage alone, x that over the kept slots with their masses, o the
    output of all slots, p_i how much query i looks at the passage rather than at the prefix.

    Matching mass *and* output makes a compressed block a drop-in for the whole one beside any
    other block (Attention Matching, arXiv:2602.16284, sections 3-4). The repeat pass as the source
    of queries, and selection under one budget, follow KVzip (arXiv:2505.23416).

    What differs from the papers: one budget over layers and heads *and* the fit; fits weighted by
    p; non-negative masses by accelerated projected gradient, batched, instead of one NNLS per head;
    values are regularised towards the originals; the refinement is ours (a Cartridge per passage,
    arXiv:2506.06266, started from the fit).

    When to choose it: whenever nothing has been trained. ``fast`` and ``balanced`` cost two to
    three prefills of the passage, ``best`` three to four more per step.
    """

    name: ClassVar[str] = "attention_matching"
    paper: ClassVar[str] = "arXiv:2602.16284"
    Config: ClassVar[type[CompressorConfig]] = AttentionMatchingConfig
    config: AttentionMatchingConfig

    def finish(self, states: list[GistState], passages: Sequence[Tensor]) -> list[GistState]:
        with torch.no_grad():
            repeat = self._repeat(states, passages)
            out = [self._match(repeat, row, state) for row, state in enumerate(states)]
        return self._refine(out, repeat) if self.config.steps else out

    def _repeat(self, states: Sequence[GistState], passages: Sequence[Tensor]) -> _Repeat:
        """One pass in which the model repeats each passage from its own uncompressed KV."""
        texts = [
            Local.after(torch.cat((self._question, ids)), len(self._prefix) + state.span, 1)
            for ids, state in zip(passages, states, strict=True)
        ]
        context = self._context(states)
        hidden, positions = self.backbone.trace(context, texts)
        return _Repeat(
            context=context,
            texts=texts,
            num_tokens=[len(ids) for ids in passages],
            queries=self.backbone.project_queries(hidden[:-1], positions),
            last=hidden[-1],
        )

    @cached_property
    def _framing(self) -> tuple[str, str]:
        """What the chat template puts before the passage, and the request to repeat it after."""
        prompt = self.backbone.render([{"role": "user", "content": MARK + REPEAT}])
        before, after = prompt.split(MARK)
        return before, after

    @cached_property
    def _prefix(self) -> Prefix:
        return self.backbone.prefix(self.backbone.tokenize(self._framing[0]))

    @cached_property
    def _question(self) -> Tensor:
        return self.backbone.tokenize(self._framing[1])

    def _context(self, states: Sequence[GistState]) -> Context:
        """Each state alone after the prefix."""
        slots = compose([[Placed(s, len(self._prefix))] for s in states], self.backbone)
        return Context([self._prefix] * len(states), slots)

    @property
    def max_tokens(self) -> int:
        framing = len(self._prefix) + len(self._question)
        return (self.backbone.max_positions - framing) // 2

    def _match(self, repeat: _Repeat, row: int, full: GistState) -> GistState:
        """Select and fit the slots of one passage."""
        scaling = self.backbone.scaling
        queries, keys = repeat.asked(row), repeat.keys(row, self.backbone.num_layers)
        prefix = self._prefix.keys.flatten(0, 1).float()
        scores, share = score(queries, prefix, keys, scaling, self.config.score)
        keep = self._select(scores)
        values = full.values.float().view(len(keep), full.num_tokens, -1)
        bias, kept_values = full.bias.new_zeros(int(keep.sum())), values[keep]
        if self.config.preset != "fast":
            mass, kept_values = match(queries, keys, values, keep, share, scaling)
            bias = mass.log()
        counts = keep.sum(1)
        return replace(
            full,
            keys=full.keys.view_as(values)[keep],
            values=kept_values,
            bias=bias,
            offsets=keep.nonzero()[:, 1].to(torch.int32),
            rows=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        )

    def _select(self, scores: Tensor) -> Tensor:
        """Which of the slots ``(L * H, T)`` to keep: the best of those that share a budget."""
        pools = {"global": 1, "layer": self.backbone.num_layers, "head": len(scores)}
        flat = scores.reshape(pools[self.config.budget], -1)
        budget = min(max(1, round(flat.shape[1] / self.config.ratio)), flat.shape[1])
        keep = torch.zeros_like(flat, dtype=torch.bool)
        return keep.scatter_(1, flat.topk(budget).indices, True).view_as(scores)

    def _refine(self, states: list[GistState], repeat: _Repeat) -> list[GistState]:
        """Self-distillation: make the slots repeat the passage as the whole KV does."""
        backbone, rows = self.backbone, max(repeat.num_tokens) + 1
        device = backbone.device
        with torch.no_grad():
            teacher = backbone.logits(repeat.last[:, -rows:-1])
        mask = torch.zeros(teacher.shape[:2], device=device)
        for row, tokens in enumerate(repeat.num_tokens):
            mask[row, -tokens:] = 1 / tokens
        sizes = [s.num_slots for s in states]
        joined = (
            torch.cat([getattr(s, name).float() for s in states])
            for name in ("keys", "values", "bias")
        )
        with torch.enable_grad():
            free = [x.requires_grad_() for x in joined]
            optimiser = torch.optim.Adam(free, lr=self.config.refine_lr)
            for _ in range(self.config.steps):
                slots = _with(states, free, sizes)
                student = backbone.read(self._context(slots), repeat.texts, num_logits=rows)[:, :-1]
                loss = (distill(teacher, student) * mask).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return _with(states, [x.detach() for x in free], sizes)


@dataclass(frozen=True)
class _Repeat:
    """The repeat pass of a batch.

    Attributes:
        context: prefix and uncompressed passages.
        texts: instruction and passage, ``Q_b`` tokens each.
        num_tokens: passage tokens of each row.
        queries: ``(L, B, H, G * Q, D)``, left-padded.
        last: ``(B, Q, E)`` residual stream after the last layer.
    """

    context: Context
    texts: list[Local]
    num_tokens: list[int]
    queries: Tensor
    last: Tensor

    def asked(self, row: int) -> Tensor:
        """Queries ``(L * H, G * Q_b, D)`` of one passage without padding."""
        longest, own = max(len(t.ids) for t in self.texts), len(self.texts[row].ids)
        grouped = self.queries[:, row].unflatten(2, (-1, longest))  # (L, H, G, Q, D)
        queries: Tensor = grouped[:, :, :, longest - own :].flatten(2, 3).flatten(0, 1)
        return queries

    def keys(self, row: int, layers: int) -> Tensor:
        """Keys ``(L * H, T, D)`` of one passage where the repeat pass saw them."""
        assert self.context.slots is not None
        keys = torch.stack([self.context.slots.layer(i)[0][row] for i in range(layers)])
        return keys[:, :, : self.num_tokens[row]].flatten(0, 1).float()


def score(
    queries: Tensor, prefix: Tensor, keys: Tensor, scaling: float, how: str
) -> tuple[Tensor, Tensor]:
    """Attention that each key of a passage gets, beside the prefix that always stands before it.

    Args:
        queries: ``(R, Q, D)`` after RoPE, one row per layer and KV head.
        prefix: ``(R, P, D)`` keys after RoPE.
        keys: ``(R, T, D)`` keys after RoPE.

    Returns:
        Scores ``(R, T)``, RMS or maximum over the queries, and ``(R, Q)`` the share of each query's
        attention that the passage as a whole gets.
    """
    scores, shares = [], []
    for rows in _chunks(len(queries), queries.shape[1] * (prefix.shape[1] + keys.shape[1])):
        every = torch.cat((prefix[rows], keys[rows]), dim=1).transpose(1, 2)
        attention = (queries[rows] @ every * scaling).softmax(-1)[..., prefix.shape[1] :]
        scores.append(attention.amax(1) if how == "max" else attention.square().mean(1).sqrt())
        shares.append(attention.sum(-1))
    return torch.cat(scores), torch.cat(shares)


def match(
    queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor, share: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Masses and values with which the kept slots stand for all slots.

    Args:
        queries: ``(R, Q, D)`` after RoPE, one row per layer and KV head.
        keys: ``(R, T, D)`` after RoPE.
        values: ``(R, T, D)``.
        keep: ``(R, T)`` bool; rows may keep different numbers, also none.
        share: ``(R, Q)`` weight of each query in the fits: how much it looks at the passage at all.

    Returns:
        Masses ``(m,)`` and values ``(m, D)`` of the kept slots, in (row, token) order.
    """
    mass, fitted = torch.ones_like(keep, dtype=torch.float32), values.clone()
    counts = keep.sum(1)
    by_count = counts.argsort(descending=True)[: int((counts > 0).sum())]  # like with like
    for part in _chunks(len(by_count), queries.shape[1] * keys.shape[1]):
        rows = by_count[part]
        width = int(counts[rows].max())
        index = keep[rows].to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        index = index[:, :width]  # (r, n): kept tokens in order, then padding
        real = keep[rows].gather(1, index)
        weight = share[rows] / share[rows].square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
        attention = (queries[rows] @ keys[rows].transpose(1, 2) * scaling).softmax(-1)
        w, v = _fit(attention, values[rows], index, real, weight[..., None])
        mass[rows[:, None], index] = torch.where(real, w, 1.0)
        fitted[rows[:, None], index] = v
    return mass[keep], fitted[keep]


def _fit(
    attention: Tensor, values: Tensor, index: Tensor, real: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Masses ``(R, n)`` and values ``(R, n, D)`` of the slots ``index``, padded where not real.

    ``attention`` is ``(R, Q, T)``, ``weight`` ``(R, Q, 1)``.
    """
    kept = attention.gather(2, index[:, None].expand(-1, attention.shape[1], -1)) * real[:, None]
    part = kept * weight
    target = (part * weight).sum(1)
    mass = nonnegative_least_squares(part.transpose(1, 2) @ part, target)
    mass = mass.clamp(MIN_MASS, MAX_MASS)

    read = kept * mass[:, None]
    read = read / read.sum(-1, keepdim=True).clamp_min(1e-9)
    old = values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
    residual = (attention @ values - read @ old) * weight
    read = read * weight
    ridge = RIDGE * attention.shape[1] / real.sum(1, keepdim=True)
    gram = read.transpose(1, 2) @ read + torch.where(real, ridge, 1.0).diag_embed()
    delta = torch.cholesky_solve(read.transpose(1, 2) @ residual, torch.linalg.cholesky(gram))
    return mass, old + delta


def _chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices of rows whose attention matrices together stay near ``CHUNK`` elements."""
    step = max(1, CHUNK // max(1, elements_per_row))
    return (slice(first, first + step) for first in range(0, rows, step))


def nonnegative_least_squares(gram: Tensor, target: Tensor, steps: int = 100) -> Tensor:
    """``min over w >= 0 of |A w - y|^2`` for a batch of small problems, by FISTA with restarts.

    Args:
        gram: ``(R, n, n)``, ``A^T A``; a zero row and column keeps its ``w`` at the start value.
        target: ``(R, n)``, ``A^T y``.
        steps: iterations.

    Returns:
        ``(R, n)``.
    """
    step = 1 / torch.linalg.matrix_norm(gram, ord=float("inf")).clamp_min(1e-12)[:, None]
    w = torch.ones_like(target)
    ahead, momentum = w, torch.ones(len(w), 1, device=w.device)
    for _ in range(steps):
        gradient = (gram @ ahead[..., None])[..., 0] - target
        new = (ahead - step * gradient).clamp_min(0)
        uphill = ((ahead - new) * (new - w)).sum(1, keepdim=True) > 0
        next_momentum = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = new + torch.where(uphill, 0.0, (momentum - 1) / next_momentum) * (new - w)
        w, momentum = new, next_momentum
    return w


def _with(
    states: Sequence[GistState], free: Sequence[Tensor], sizes: Sequence[int]
) -> list[GistState]:
    """States with other keys, values and biases, given joined over all states."""
    parts = zip(states, *(x.split(list(sizes)) for x in free), strict=True)
    return [replace(s, keys=k, values=v, bias=b) for s, k, v, b in parts]
