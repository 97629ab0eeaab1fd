"""``attention_matching``: the training-free default. Keep the keys that matter, fit the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gist_rag.compressors.base import Compressor, CompressorConfig, NestedConfig, best_slots, nested
from gist_rag.compressors.repeat import Repeat, Repeater, Target
from gist_rag.losses import distill
from gist_rag.types import GistState
from gist_rag_kernels import fit_slots, kept_groups, rotate

REFINE_STEPS = {"fast": 0, "balanced": 0, "thorough": 30, "best": 10}
REFINE_LR = {"heads": 0.06, "model": 0.01}
STREAM_WEIGHT = 5.0
"""Of the residual streams' relative error beside the KL of the logits: about equal shares."""
REFINE_QUERIES = 256
"""Refinement looks at so many queries of each head, evenly spread; the others say little more."""
MIN_MASS, MAX_MASS = 1e-4, 1e3


class AttentionMatchingConfig(NestedConfig):
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
    step. Refinement lifts likelihoods from 8x on; answers of a trained reader did not gain by it.
    """

    name: ClassVar[str] = "attention_matching"
    paper: ClassVar[str] = "arXiv:2602.16284"
    Config: ClassVar[type[CompressorConfig]] = AttentionMatchingConfig
    config: AttentionMatchingConfig

    def finish(self, states: list[GistState], passages: Sequence[Tensor]) -> list[GistState]:
        with torch.no_grad():
            repeat = self._repeater(states, passages)
            matched = [self._match(repeat, row, state) for row, state in enumerate(states)]
        levels = [[*level] for level in zip(*matched, strict=True)]
        if self.config.refine == "model" and self.config.steps:
            levels = [self._imitate(level, repeat) for level in levels]
        return [nested(one) for one in zip(*levels, strict=True)]

    @cached_property
    def _repeater(self) -> Repeater:
        return Repeater(self.backbone)

    @property
    def max_tokens(self) -> int:
        framing = len(self._repeater.prefix) + len(self._repeater.question)
        return (self.backbone.max_positions - framing) // 2

    def _match(self, repeat: Repeat, row: int, full: GistState) -> list[GistState]:
        """Select and fit the slots of one passage, at each ratio."""
        scores, share = self._repeater.scores(repeat, row, self.config.score)
        pools = {"global": 1, "layer": self.backbone.num_layers, "head": len(scores)}
        pool = pools[self.config.budget]
        kept = [best_slots(scores, ratio, pool) for ratio in self.config.ratios]
        return [self._fit(repeat, row, full, keep, share) for keep in kept]

    def _fit(
        self, repeat: Repeat, row: int, full: GistState, keep: Tensor, share: Tensor
    ) -> GistState:
        """A passage's slots ``keep`` ``(L * H, T)``, that stand for all."""
        scaling = self.backbone.scaling
        queries, (keys, values) = repeat.asked(row), repeat.kv(row)
        plain = full.keys.float().view_as(keys)  # before RoPE
        kept = Kept(plain[keep], values[keep], full.bias.new_zeros(int(keep.sum())))
        offsets = keep.nonzero()[:, 1]
        if self.config.preset != "fast":
            mass, fitted = fit_slots(
                queries, keys, values, keep, share, scaling, masses=(MIN_MASS, MAX_MASS)
            )
            kept = Kept(kept.keys, fitted, mass.log())
        if self.config.refine == "heads" and self.config.steps:
            target = self._repeater.target(repeat, row, REFINE_QUERIES)
            rotary = self.backbone.rotary(offsets + len(self._repeater.prefix))
            kept = refine(kept, keep, target, rotary, self.config.steps, self.config.lr)
        return replace(
            full.select(keep.flatten()),
            keys=kept.keys.to(full.keys.dtype),
            values=kept.values,
            bias=kept.bias,
        )

    def _imitate(self, states: list[GistState], repeat: Repeat) -> list[GistState]:
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
                context = self._repeater.context(_with(states, free, sizes))
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
class Kept:
    """The kept slots of all heads in (row, token) order: keys before RoPE and values ``(m, D)``,
    log-masses ``(m,)``."""

    keys: Tensor
    values: Tensor
    bias: Tensor


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
    for rows, index, real in kept_groups(keep, lambda size: target.queries.shape[1] * size):
        at = place[rows].gather(1, index).clamp_min(0)  # (r, n)
        some = target.rows(rows)
        cos, sin = (x[at] for x in rotary)
        padding = torch.where(real, 0.0, -torch.inf)
        free = [x[at].requires_grad_() for x in (kept.keys, kept.values, kept.bias)]
        keys, values, bias = free
        adam = torch.optim.Adam(free, lr=lr, betas=(0.9, 0.99))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        with torch.enable_grad():
            for _ in range(steps):
                error = some.error(rotate(keys, cos, sin), values, bias + padding).sum()
                adam.zero_grad()
                error.backward()
                adam.step()
                cosine.step()
        for whole, part in zip((out.keys, out.values, out.bias), free, strict=True):
            whole[at[real]] = part.detach()[real]
    return Kept(out.keys, out.values, out.bias.clamp(math.log(MIN_MASS), math.log(MAX_MASS)))


def _with(
    states: Sequence[GistState], free: Sequence[Tensor], sizes: Sequence[int]
) -> list[GistState]:
    """States with other keys, values and biases, given joined over all states."""
    parts = zip(states, *(x.split(list(sizes)) for x in free), strict=True)
    return [replace(s, keys=k, values=v, bias=b) for s, k, v, b in parts]
