"""``attention_matching``: the training-free default. Keep the keys that matter, fit the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gist_rag.backbone import Context, Local, Prefix
from gist_rag.compose import Placed, compose
from gist_rag.compressors.base import Compressor, CompressorConfig, best_slots
from gist_rag.losses import distill
from gist_rag.prompt import framing
from gist_rag.types import GistState
from gist_rag_kernels import rotate

REPEAT = "\n\nRepeat the text above."
REFINE_STEPS = {"fast": 0, "balanced": 0, "thorough": 30, "best": 10}
REFINE_LR = {"heads": 0.06, "model": 0.01}
STREAM_WEIGHT = 5.0
"""Of the residual streams' relative error beside the KL of the logits: about equal shares."""
REFINE_QUERIES = 256
"""Refinement looks at so many queries of each head, evenly spread; the others say little more."""
MIN_MASS, MAX_MASS = 1e-4, 1e3
RIDGE = 1e-4
CHUNK = 1 << 22
"""Elements of the attention matrices that are held at a time."""


class AttentionMatchingConfig(CompressorConfig):
    """Settings of ``attention_matching``.

    Attributes:
        preset: ``fast`` keeps the best keys as they are; ``balanced`` also fits log-masses and
            values; ``thorough`` moves the keys too, each head by itself; ``best`` refines the fit
            through the model.
        budget: whose slots compete for the same budget: all layers and heads of a passage
            (``global``), the heads of one layer (``layer``), or nobody's (``head``: every head
            keeps the same number, for engines that cannot take ragged heads).
        score: how a key's attention is summed up over the queries of the repeat pass.
        refine_steps: Adam steps of refinement; ``None`` is the preset's own number. ``fast`` and
            ``balanced`` refine each head by itself when they are given some.
        refine_lr: peak learning rate of those steps, on keys, values and log-masses alike;
            ``None`` is 0.06 for heads and 0.01 through the model.
    """

    preset: Literal["fast", "balanced", "thorough", "best"] = "balanced"
    budget: Literal["global", "layer", "head"] = "global"
    score: Literal["rms", "max"] = "rms"
    refine_steps: int | None = Field(default=None, ge=0)
    refine_lr: float | None = Field(default=None, gt=0)

    @property
    def refine(self) -> Literal["heads", "model"]:
        return "model" if self.preset == "best" else "heads"

    @property
    def steps(self) -> int:
        return REFINE_STEPS[self.preset] if self.refine_steps is None else self.refine_steps

    @property
    def lr(self) -> float:
        return REFINE_LR[self.refine] if self.refine_lr is None else self.refine_lr


class AttentionMatching(Compressor):
    """Idea: let the model repeat the passage from its own KV and see which keys it needs; keep
    those, and fit a mass and a value to each so that they stand for the ones that go.

        score    s_j = RMS over queries i of softmax_j(q_i k_j), over prefix and passage
        select   the M best of all layers and heads together: heads keep what they need
        mass     min over w >= 0 of  sum_i p_i^2 (sum_j a_ij w_j - 1)^2    (log w is the slot bias)
        value    min over V' of      sum_i p_i^2 |sum_j x_ij v'_j - o_i|^2
        heads    min over k', v', log w' of  sum_i |p_i o_i - p'_i o'_i|^2 + c^2 (p_i - p'_i)^2
        model    min over k', v', log w' of  KL(repeat from all || repeat from kept)
                                             + mean over layers of |h - h'|^2 / |h|^2

    a is attention over the passage alone, x that over the kept slots with their masses, o the
    output of all slots, p_i how much query i looks at the passage rather than at the prefix, h the
    residual streams of the repeat. The last two are alternatives, a few steps of Adam each: all
    heads at once, each by itself (``thorough``; c is how far the outputs of prefix and passage lie
    apart, so that a wrong share costs what it does to the output), or through the model (``best``).

    Matching mass *and* output makes a compressed block a drop-in for the whole one beside any
    other block (Attention Matching, arXiv:2602.16284, sections 3-4). The repeat pass as the source
    of queries, and selection under one budget, follow KVzip (arXiv:2505.23416).

    What differs from the papers: one budget over layers and heads *and* the fit; fits weighted by
    p; non-negative masses by accelerated projected gradient, batched, instead of one NNLS per head;
    values are regularised towards the originals; the refinements, which let keys move, are ours
    (through the model: a Cartridge per passage, arXiv:2506.06266, started from the fit).

    When to choose it: whenever nothing has been trained. ``fast`` and ``balanced`` cost two to
    three prefills of the passage, ``thorough`` about twice as much, ``best`` three to four more per
    step. Refinement pays from 8x on; at 16x only ``best`` is left.
    """

    name: ClassVar[str] = "attention_matching"
    paper: ClassVar[str] = "arXiv:2602.16284"
    Config: ClassVar[type[CompressorConfig]] = AttentionMatchingConfig
    config: AttentionMatchingConfig

    def finish(self, states: list[GistState], passages: Sequence[Tensor]) -> list[GistState]:
        with torch.no_grad():
            repeat = self._repeat(states, passages)
            matched = [self._match(repeat, row, state) for row, state in enumerate(states)]
        if self.config.refine == "model" and self.config.steps:
            return self._imitate(matched, repeat)
        return matched

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
            hidden=hidden,
        )

    @cached_property
    def _prefix(self) -> Prefix:
        before, _ = framing(REPEAT, self.backbone.render)
        return self.backbone.prefix(self.backbone.tokenize(before))

    @cached_property
    def _question(self) -> Tensor:
        _, after = framing(REPEAT, self.backbone.render)
        return self.backbone.tokenize(after)

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
        prefix_keys, prefix_values = (
            x.flatten(0, 1).float() for x in (self._prefix.keys, self._prefix.values)
        )
        scores, share = score(queries, prefix_keys, keys, scaling, self.config.score)
        pools = {"global": 1, "layer": self.backbone.num_layers, "head": len(scores)}
        keep = best_slots(scores, self.config.ratio, pools[self.config.budget])
        plain = full.keys.float().view_as(keys)  # before RoPE
        values = full.values.float().view_as(keys)
        kept = Kept(plain[keep], values[keep], full.bias.new_zeros(int(keep.sum())))
        offsets = keep.nonzero()[:, 1]
        if self.config.preset != "fast":
            mass, fitted = match(queries, keys, values, keep, share, scaling)
            kept = Kept(kept.keys, fitted, mass.log())
        if self.config.refine == "heads" and self.config.steps:
            target = Target.of(
                queries[:, :: -(-queries.shape[1] // REFINE_QUERIES)] * scaling,
                (prefix_keys, prefix_values),
                (keys, values),
            )
            rotary = self.backbone.rotary(offsets + len(self._prefix))
            kept = refine(kept, keep, target, rotary, self.config.steps, self.config.lr)
        return replace(
            full.select(keep.flatten()),
            keys=kept.keys.to(full.keys.dtype),
            values=kept.values,
            bias=kept.bias,
        )

    def _imitate(self, states: list[GistState], repeat: _Repeat) -> list[GistState]:
        """Refine through the model: repeat the passage from the slots as from the whole KV."""
        backbone, rows = self.backbone, max(repeat.num_tokens) + 1
        weight = torch.zeros(len(states), rows - 1, device=backbone.device)
        for row, tokens in enumerate(repeat.num_tokens):
            weight[row, -tokens:] = 1 / tokens
        wanted = repeat.hidden[1:, :, -rows:-1].float()
        with torch.no_grad():
            teacher = backbone.logits(repeat.hidden[-1][:, -rows:-1])
            size = (wanted.square().sum(-1) * weight).sum(-1, keepdim=True) / weight.sum(-1)[
                :, None
            ]
        sizes = [s.num_slots for s in states]
        kept = (
            torch.cat([getattr(s, name).float() for s in states])
            for name in ("keys", "values", "bias")
        )
        with torch.enable_grad():
            free = [x.requires_grad_() for x in kept]
            adam = torch.optim.Adam(free, lr=self.config.lr)
            for _ in range(self.config.steps):
                context = self._context(_with(states, free, sizes))
                with backbone.recording() as stream:
                    student = backbone.read(context, repeat.texts, num_logits=rows)[:, :-1]
                streams = torch.stack(stream[1:])[:, :, -rows:-1].float()
                apart = ((streams - wanted).square().sum(-1) / size).mean(0)
                loss = ((distill(teacher, student) + STREAM_WEIGHT * apart) * weight).sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
        return _with(states, [x.detach() for x in free], sizes)


@dataclass(frozen=True)
class _Repeat:
    """The repeat pass of a batch.

    Attributes:
        context: prefix and uncompressed passages.
        texts: instruction and passage, ``Q_b`` tokens each.
        num_tokens: passage tokens of each row.
        queries: ``(L, B, H, G * Q, D)``, left-padded.
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
    for rows, index, real in _groups(keep, lambda _: queries.shape[1] * keys.shape[1]):
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


@dataclass(frozen=True)
class Kept:
    """The kept slots of all heads in (row, token) order: keys before RoPE and values ``(m, D)``,
    log-masses ``(m,)``."""

    keys: Tensor
    values: Tensor
    bias: Tensor


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


def refine(
    kept: Kept, keep: Tensor, target: Target, rotary: tuple[Tensor, Tensor], steps: int, lr: float
) -> Kept:
    """Move keys, values and log-masses so that reading the kept slots gives the target.

    Args:
        keep: ``(R, T)`` bool, which slots they are.
        rotary: cos and sin ``(m, D)`` of their positions.
        steps: of Adam, with a cosine from ``lr`` down to 0.
    """
    place = torch.cumsum(keep.flatten(), 0).view_as(keep) - 1  # (R, T): where in ``kept``
    out = Kept(kept.keys.clone(), kept.values.clone(), kept.bias.clone())
    for rows, index, real in _groups(keep, lambda size: target.queries.shape[1] * size):
        at = place[rows].gather(1, index).clamp_min(0)  # (r, n)
        queries, output = target.queries[rows], target.output[rows]
        cos, sin = (x[at] for x in rotary)
        padding = torch.where(real, 0.0, -torch.inf)[:, None]
        distance = target.distance[rows].expand(-1, at.shape[1], 1)
        free = [x[at].requires_grad_() for x in (kept.keys, kept.values, kept.bias)]
        keys, values, bias = free
        adam = torch.optim.Adam(free, lr=lr, betas=(0.9, 0.99))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        with torch.enable_grad():
            for _ in range(steps):
                logits = queries @ rotate(keys, cos, sin).transpose(1, 2) + bias[:, None] + padding
                read = torch.cat((target.prefix_mass[rows], logits), -1).softmax(-1)[..., 1:]
                error = (read @ torch.cat((values, distance), -1) - output).square().sum()
                adam.zero_grad()
                error.backward()
                adam.step()
                cosine.step()
        for whole, part in zip((out.keys, out.values, out.bias), free, strict=True):
            whole[at[real]] = part.detach()[real]
    return Kept(out.keys, out.values, out.bias.clamp(math.log(MIN_MASS), math.log(MAX_MASS)))


def _groups(
    keep: Tensor, elements: Callable[[int], int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows that keep something, those of similar size together.

    Args:
        keep: ``(R, T)`` bool.
        elements: of the largest tensor per row, by the number of slots that the row keeps.

    Returns:
        Rows ``(r,)``, their kept tokens ``(r, n)`` in order and then padding, and which are real.
    """
    counts = keep.sum(1)
    order = counts.argsort(descending=True)[: int((counts > 0).sum())]
    sizes, first = counts[order].tolist(), 0
    while first < len(order):
        size = sizes[first]
        rows = order[first : first + max(1, CHUNK // max(1, elements(size)))]
        index = keep[rows].to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        index = index[:, :size]
        yield rows, index, keep[rows].gather(1, index)
        first += len(rows)


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
