"""``trim_kv``: no gists; gates foretell, head by head, how long each token will matter."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from gist_rag.backbone import Backbone
from gist_rag.compressors.base import (
    MAX_LM_TOKENS,
    Compressor,
    CompressorConfig,
    Lesson,
    NestedConfig,
    Thoughts,
    best_slots,
    nested,
)
from gist_rag.errors import BadInput, ContextOverflow
from gist_rag.layout import Layout
from gist_rag.losses import capacity, cross_entropy, distill
from gist_rag.types import GistState

HORIZON = 64
"""How many tokens ahead a cache that is trimmed while decoding looks: at once (0), what has just
been written always stays, whatever its gates say."""


class TrimKVConfig(NestedConfig):
    """Settings of ``trim_kv``.

    Attributes:
        horizon: tokens between the end of a passage and the question, while gates learn.
        budget: every ``head`` keeps the same number of tokens, or all heads and layers of a passage
            compete (``global``).
        width: hidden units of a gate.
        start: a gate's output before its sigmoid, untrained; the higher, the longer all is kept.
        fade: gates also learn while a passage is read, for ``decode``: one more pass per step.
    """

    ratio: float = Field(default=4.0, ge=1.0)
    horizon: int = Field(default=256, ge=1)
    budget: Literal["head", "global"] = "head"
    width: int = Field(default=128, ge=1)
    start: float = 8.0
    fade: bool = False


class TrimKV(Compressor):
    """Idea: keep tokens, not gists. When a token is read, a gate foretells per KV head how fast it
    will lose its worth; whoever has lost most by the time of the question goes.

        T t t T t           head 1 keeps two tokens of five,
        t T T t t           head 2 two others; all see all earlier ones while they are read

        log beta_i = logsigmoid(W2 act(W1 x_i + b1) + b2)     x: normed input of a layer's attention
        training    logit of token i, read at t:  q k_i / sqrt(D) + (t - i) log beta_i
        inference   the M best by log beta_i, read as they are

    with t = T + ``horizon`` and M = T / ratio (TRIM-KV, arXiv:2512.03324). Loss: ``kl + ce + cap``,
    where ``cap`` is how far ``sum_i beta_i^(t - i)`` lies above M. Only gates learn. With ``fade``,
    ``KL(plain || faded)`` of a passage's own next tokens is added, t being each token in turn. For
    thoughts (``train --task thoughts``) t is each of their tokens in all three terms.

    What differs from the paper: it trims one growing context, so its t runs over all queries, as
    for thoughts here; but a passage is trimmed once, for a question at the horizon, and the
    capacity loss looks at that t only. To whoever asks much later all tokens are equally old, so
    gates are compared as they are; by (t - i) log beta_i, as there, long passages lost their
    beginnings. ``decode`` trims by it, t being ``HORIZON`` tokens ahead. The released eager code
    multiplies logits by beta^(t - i); the sum of the paper is used, which equals soft eviction.
    Gates are ``width`` wide (512 there). ``budget="global"`` lets heads differ, in the capacity
    loss too (the paper's code has it for inference). ``trim_kv-4x``, which ships, was not taught by
    answers but by the loss term ``score``: (t - i) log beta_i is to be the log of the attention
    that token i gets while the model repeats the passage, as KVzap (arXiv:2601.07891) foretells the
    scores of KVzip. ``attention_matching`` keeps what gets most of it, at the price of the
    repetition.

    When to choose it: where compressing must be cheap, at 2x to 8x; for exact strings, which gists
    garble and kept tokens do not. It costs one prefill and two small matrices, and the reader stays
    as it is.
    """

    name: ClassVar[str] = "trim_kv"
    paper: ClassVar[str] = "arXiv:2512.03324"
    Config: ClassVar[type[CompressorConfig]] = TrimKVConfig
    config: TrimKVConfig
    trained: ClassVar[bool] = True
    loss_weights: ClassVar[Mapping[str, float]] = {"kl": 1.0, "ce": 1.0, "cap": 1.0, "fade": 1.0}

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.gates = Gates(backbone, self.config.width, self.config.start)

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        """All tokens with their decay as bias where gradients flow, else the best ones."""
        full = super().extract(hidden, layout)
        log_beta = self.gates(self.backbone.normed(hidden[:-1])).flatten(0, 1)  # (L * H, T)
        if log_beta.requires_grad:
            index = torch.arange(full.num_tokens, device=hidden.device)
            age = full.num_tokens + self.config.horizon - index  # (T,) at the time of the question
            return replace(full, bias=(log_beta * age).flatten())
        pools = len(log_beta) if self.config.budget == "head" else 1
        kept = [best_slots(log_beta, ratio, pools).flatten() for ratio in self.config.ratios]
        return nested([full.select(keep) for keep in kept])

    def passage_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        over = []
        for state in lesson.states:
            filled = state.bias.new_zeros(len(state.lengths))
            filled = filled.index_add(0, state.row_of_slot(), state.bias.exp())
            if self.config.budget == "global":
                filled = filled.mean(0, keepdim=True)
            budget = state.num_tokens / self.config.ratio
            over.append(capacity(filled, budget, state.num_tokens))
        fade = torch.zeros_like(over[0])
        if self.config.fade:
            first, plain = [1] * len(lesson.passages), lesson.hidden.detach()
            log_beta = self._log_beta(plain)
            teacher, student, _ = self._fading(lesson.passages, first, plain, log_beta)
            fade = distill(teacher, student).sum() / max(1, len(teacher))
        return {"cap": torch.stack(over).mean(), "fade": fade}

    def thought_losses(self, thoughts: Sequence[Thoughts]) -> dict[str, Tensor]:
        """Each token of a thought is read with the decay of all before it (the prompt's too), and
        ``cap`` looks at each of them, as in the paper."""
        ids = [t.ids for t in thoughts]
        plain = self.encode(ids)
        log_beta, given = self._log_beta(plain), [t.num_given for t in thoughts]
        teacher, student, targets = self._fading(ids, given, plain, log_beta)
        rows = zip(log_beta.unbind(1), ids, strict=True)
        return {
            "kl": distill(teacher, student).mean(),
            "ce": cross_entropy(student, targets).mean(),
            "cap": torch.stack([self._over(row[..., : len(text)]) for row, text in rows]).mean(),
        }

    def _fading(
        self, texts: Sequence[Tensor], given: Sequence[int], plain: Tensor, log_beta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(N, V)`` of the plain and of the fading stream for the texts' tokens ``(N,)``
        behind those given; of more than ``MAX_LM_TOKENS`` tokens a sample."""
        ids = nn.utils.rnn.pad_sequence([*texts], batch_first=True)
        faded = self.backbone.encode(ids, log_beta=log_beta)
        slot = torch.arange(ids.shape[1])
        first, last = torch.tensor(given) - 1, torch.tensor([len(text) - 2 for text in texts])
        told = (slot >= first[:, None]) & (slot <= last[:, None])
        rows, slots = told.nonzero(as_tuple=True)
        chosen = torch.randperm(len(rows))[:MAX_LM_TOKENS]
        rows, slots = rows[chosen], slots[chosen]
        teacher, student = (self.backbone.logits(s[-1][rows, slots]) for s in (plain, faded))
        return teacher, student, ids[rows, slots + 1].to(student.device)

    def _log_beta(self, hidden: Tensor) -> Tensor:
        """``(L, B, H, S)`` from residual streams ``(L + 1, B, S, E)``."""
        gates = self.gates(self.backbone.normed(hidden[:-1]).flatten(1, 2))  # (L, H, B * S)
        log_beta: Tensor = gates.unflatten(2, hidden.shape[1:3]).transpose(1, 2)
        return log_beta

    def _over(self, log_beta: Tensor) -> Tensor:
        """How far a text ``(L, H, T)`` stands above its budget, on average over its tokens."""
        time = torch.arange(log_beta.shape[2], device=log_beta.device)
        age = (time[:, None] - time).clamp_min(0)
        left = (log_beta[..., None, :] * age).exp().tril().sum(-1).flatten(0, 1)  # (L * H, T)
        if self.config.budget == "global":
            left = left.mean(0, keepdim=True)
        return capacity(left, len(time) / self.config.ratio, time + 1)

    @torch.no_grad()
    def decode(
        self,
        prompt: Tensor,
        *,
        budget: int,
        slack: int = 32,
        horizon: int = HORIZON,
        max_tokens: int = 256,
    ) -> Generator[int]:
        """Decode greedily after a prompt ``(P,)`` with a small cache; the end token is the last.

        Args:
            budget: entries that each KV head keeps whenever it is trimmed.
            slack: entries above the budget at which that happens.
            horizon: tokens ahead at which entries are compared; 0 in the paper.

        Raises:
            BadInput: no prompt, no budget, or a horizon that lies behind.
            ContextOverflow: prompt and answer may need more positions than the model has.
        """
        if not len(prompt) or budget < 1 or slack < 1 or horizon < 0:
            raise BadInput(
                "decoding needs a prompt, a budget and slack of 1 or more, no horizon below 0"
            )
        if (needed := len(prompt) + max_tokens) > self.backbone.max_positions:
            raise ContextOverflow(
                f"prompt and answer take {needed} positions, {self.backbone.name} has "
                f"{self.backbone.max_positions}"
            )
        trimmed = TrimmedCache(self, budget, slack, horizon)
        token = int(trimmed.read(prompt).argmax())
        for left in range(max_tokens - 1, -1, -1):
            yield token
            if not left or token in self.backbone.stop_ids:
                return
            token = int(trimmed.read(torch.tensor([token])).argmax())


class TrimmedCache:
    """KV cache of one text, of whose entries every head keeps those that its gates value.

    Attributes:
        cache: what the model reads.
        log_beta: ``(L, H, K)`` of the entries that are kept.
        positions: ``(L, H, K)`` of those in the text.
    """

    def __init__(self, method: TrimKV, budget: int, slack: int, horizon: int = HORIZON) -> None:
        self.backbone, self.gates = method.backbone, method.gates
        self.budget, self.slack, self.horizon = budget, slack, horizon
        self.cache = DynamicCache(config=self.backbone.model.config)
        shape = (self.backbone.num_layers, self.backbone.num_heads, 0)
        self.log_beta = torch.zeros(shape, device=self.backbone.device)
        self.positions = torch.zeros(shape, dtype=torch.long, device=self.backbone.device)
        self.length = 0

    def read(self, ids: Tensor) -> Tensor:
        """Logits ``(V,)`` after some more tokens ``(Q,)``; then trims, if it is time."""
        positions = self.length + torch.arange(len(ids), device=self.backbone.device)
        with self.backbone.recording() as stream:
            logits = self.backbone.extend(self.cache, positions, input_ids=ids)
        self.length += len(ids)
        new = self.gates(self.backbone.normed(torch.stack(stream[:-1])[:, 0]))
        self.log_beta = torch.cat((self.log_beta, new), dim=2)
        self.positions = torch.cat((self.positions, positions.expand_as(new)), dim=2)
        if self.log_beta.shape[2] >= self.budget + self.slack:
            self._trim()
        return logits

    def _trim(self) -> None:
        scores = self.log_beta * (self.length + self.horizon - self.positions)
        keep = scores.topk(self.budget, dim=2).indices.sort(dim=2).values
        self.log_beta, self.positions = (
            self.log_beta.gather(2, keep),
            self.positions.gather(2, keep),
        )
        for layer, index in zip(self.cache.layers, keep[:, None, :, :, None], strict=True):
            index = index.expand(-1, -1, -1, layer.keys.shape[3])  # (1, H, budget, D)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


class Gates(nn.Module):
    """Retention gates of all layers."""

    def __init__(self, backbone: Backbone, width: int, start: float) -> None:
        super().__init__()
        layers, heads = backbone.num_layers, backbone.num_heads
        size, spread = backbone.model.config.hidden_size, 0.02
        self.down = nn.Parameter(spread * torch.randn(layers, size, width))
        self.down_bias = nn.Parameter(torch.zeros(layers, 1, width))
        self.up = nn.Parameter(spread * torch.randn(layers, width, heads))
        self.up_bias = nn.Parameter(torch.full((layers, 1, heads), start))
        self.to(backbone.device)

    def forward(self, x: Tensor) -> Tensor:
        """log beta ``(L, H, S)`` of the normed inputs ``(L, S, E)`` of all layers."""
        inner = nn.functional.silu(x.float() @ self.down + self.down_bias)
        return nn.functional.logsigmoid(inner @ self.up + self.up_bias).transpose(1, 2)
