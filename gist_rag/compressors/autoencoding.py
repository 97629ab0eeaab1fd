"""``autoencoding``: fine-grained gists that must also spell out the tokens they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from gist_rag.backbone import Backbone
from gist_rag.compressors.base import (
    Answers,
    CompressorConfig,
    Lesson,
    TrainedCompressor,
    TrainedConfig,
)
from gist_rag.layout import Layout, window_ends
from gist_rag.losses import cross_entropy, token_importance
from gist_rag.types import GistState

MAX_AE_TOKENS = 1024
"""Tokens of a step that are spelt out again; of more, a sample of the gists is taken."""
MAX_WINDOW = 64
"""Places that the decoder can tell apart; tokens of longer windows share the last one."""


class AutoencodingConfig(TrainedConfig):
    """Settings.

    Attributes:
        decoder_width: of the reconstruction decoder, which is trained along and never served.
        gamma: upper bound of a token's log importance.
    """

    adapt: Literal["gists", "all"] = "all"
    decoder_width: int = Field(default=256, ge=8)
    gamma: float = Field(default=2.0, ge=0)


class Autoencoding(TrainedCompressor):
    """Idea: of all ways to lay out gists, fine-grained KV gists do best, and they fail by losing
    tokens silently. So each gist is also asked to spell out its tokens to a weak decoder, and
    tokens that could not be guessed without the context count more.

              a a g b b g
        a     x
        a     x x
        g     x x x               causal throughout: tokens stay visible inside the passage;
        b     x x x x             the gists are read-heads beside them
        b     x x x x x
        g     x x x x x x

    Losses: ``ae = mean over gists i of CE(Dec(K_i, V_i, x_1 .. x_j-1), x_j)``
    with a one-layer decoder over the gist's keys and values of all layers, its head the frozen
    embedding table; and ``ce`` weighted by token importance,
    ``w_t ~ exp(min(log P(y_t | text) - log P(y_t), gamma))``. Together ``kl + 0.2 ce + 0.5 ae``.

    What differs from the paper: it continues the training of a whole model on 2,048-token segments,
    where gists of earlier segments are all that is left; a passage is one segment, so what reads
    gists is the question alone. Its importance weights compare the full context with the segment
    for running text; ours compare the passages with the bare question for the answer's tokens, and
    are normalised per step. The decoder sees a gist as ``L`` slots (one a layer) with learned
    per-layer scales; the paper does not say which it is given. Gists start from tokens (``start``)
    and stand at their positions (``positions``), which the paper does not state either, when they
    are written; they are packed, one after the other, when they are read, which saves room.

    When to choose it: where exact strings matter (names, numbers, codes).

    Source: arXiv:2412.17483.
    """

    name: ClassVar[str] = "autoencoding"
    paper: ClassVar[str] = "arXiv:2412.17483"
    Config: ClassVar[type[CompressorConfig]] = AutoencodingConfig
    config: AutoencodingConfig
    loss_weights: ClassVar[Mapping[str, float]] = {"kl": 1.0, "ce": 0.2, "ae": 0.5}
    reads_closed: ClassVar[bool] = True

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.decoder = Decoder(backbone, self.config.decoder_width).to(backbone.device)

    def layout(self, input_ids: Tensor) -> Layout:
        ends = self._ends(input_ids).tolist()
        return self.placed(
            Layout.interleave(ends, place="own", raw_is_local=False, gists_are_local=False)
        )

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        return super().extract(hidden, layout).side_by_side()

    def answer_losses(self, answers: Answers) -> dict[str, Tensor]:
        assert answers.closed is not None
        targets = answers.targets
        importance = answers.weights * token_importance(
            answers.teacher, answers.closed, targets, self.config.gamma
        )
        importance = importance / importance.sum()
        return {
            "kl": super().answer_losses(answers)["kl"],
            "ce": (cross_entropy(answers.student, targets) * importance).sum(),
        }

    def passage_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        return {"ae": self.reconstruction(lesson.states, lesson.passages)}

    def reconstruction(self, states: Sequence[GistState], passages: Sequence[Tensor]) -> Tensor:
        """Mean NLL of tokens, spelt out from the one gist that stands for them."""
        keys, values = [], []
        windows: list[Tensor] = []
        for state, ids in zip(states, passages, strict=True):
            key, value, _ = state.dense()  # (L, H, N, D)
            keys.append(key.movedim(2, 0))
            values.append(value.movedim(2, 0))
            windows += ids.tensor_split(self._ends(ids)[:-1])
        longest = max(map(len, windows))
        ids = torch.stack([pad(w, (0, longest - len(w)), value=-100) for w in windows])
        chosen = torch.randperm(len(ids))[: max(1, MAX_AE_TOKENS // longest)]
        device = self.gists.device
        ids, chosen = ids[chosen].to(device), chosen.to(device)
        logits = self.decoder(torch.cat(keys)[chosen], torch.cat(values)[chosen], ids.clamp_min(0))
        there = ids >= 0
        return cross_entropy(logits[there], ids[there]).mean()

    def _ends(self, input_ids: Tensor) -> Tensor:
        return window_ends(len(input_ids), self.config.ratio)


class Decoder(nn.Module):
    """One transformer layer that reads a gist and spells out its tokens from left to right.

    It is weak on purpose: what it cannot know has to be in the gist.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # its embedding table is borrowed
        layers, heads, size = backbone.num_layers, backbone.num_heads, backbone.head_dim
        hidden, queries = backbone.model.config.hidden_size, backbone.num_query_heads
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.places = nn.Parameter(torch.randn(MAX_WINDOW, width) * 0.02)
        self.key_scale = nn.Parameter(torch.ones(layers, heads, size))
        self.key_shift = nn.Parameter(torch.randn(layers, heads, size))  # which layer it is
        self.value_scale = nn.Parameter(torch.ones(layers, heads, size))
        self.enter = nn.Linear(hidden, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.query = nn.Linear(width, queries * size, bias=False)
        self.key_value = nn.Linear(width, 2 * heads * size, bias=False)
        self.out = nn.Linear(queries * size, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.leave = nn.Linear(width, hidden, bias=False)

    backbone: Backbone

    def forward(self, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        """Logits ``(N, W, V)`` of the tokens of ``N`` windows.

        Args:
            keys, values: ``(N, L, H, D)`` of one gist each, before RoPE.
            ids: ``(N, W)`` the tokens, each told from those before it.
        """
        table: Tensor = self.backbone.model.get_input_embeddings().weight
        count, size = ids.shape
        known = self.enter(table[ids[:, :-1]].to(self.start.dtype))
        x = torch.cat((self.start.expand(count, 1, -1), known), dim=1)
        x = x + self.places[torch.arange(size, device=x.device).clamp_max(MAX_WINDOW - 1)]

        normed = self.norms[0](x)
        query = self.query(normed).unflatten(-1, (-1, keys.shape[-1]))  # (N, W, Hq, D)
        key, value = self.key_value(normed).unflatten(-1, (2, *keys.shape[2:])).unbind(2)
        key = torch.cat((self._scaled(keys) * self.key_scale + self.key_shift, key), dim=1)
        value = torch.cat((self._scaled(values) * self.value_scale, value), dim=1)
        visible = torch.ones(size, key.shape[1], dtype=torch.bool, device=x.device)
        read = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=visible.tril(keys.shape[1]),
            enable_gqa=True,
        )
        x = x + self.out(read.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        told: Tensor = self.leave(self.norms[2](x))
        return told.to(table.dtype) @ table.T

    def _scaled(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.start.dtype), x.shape[-1:])
