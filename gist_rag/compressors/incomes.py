"""``incomes``: gists that no one attends to: an unordered bank, read by a second softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gist_rag.backbone import Backbone
from gist_rag.compressors.base import Answers, CompressorConfig, TrainedCompressor, TrainedConfig
from gist_rag.layout import Layout, window_ends
from gist_rag.losses import cross_entropy
from gist_rag.types import GistState

GAIN = 0.5
"""Weight of a token per nat by which the passage makes it likelier."""


class InComeSConfig(TrainedConfig):
    """Settings of ``incomes``.

    Attributes:
        per: a gist for each window, as many as ``ratio`` allows, or one for the whole passage,
            which then has whatever ratio that is.
        temperature: of the bank's softmax at inference, with ten entries or more; 1 in training.
        reluctance: head start of the zero gist's logit, so that little is read at first.
    """

    per: Literal["window", "passage"] = "window"
    temperature: float = Field(default=0.45, gt=0)
    reluctance: float = 4.0


class InComeS(TrainedCompressor):
    """Idea: facts are looked up, not read. Each is closed by a gist whose keys and values, in the
    upper half of the layers, join a bank without order. Every query looks the bank up in a softmax
    of its own, where a learned zero gist can say that nothing in it matters.

        t t g t t g         a gist sees the tokens of its window and itself,
        1 1 1 2 2 2         a token sees all earlier tokens, but no gist

        out = SDPA(q, K, V) + softmax(q [z, k_1 .. k_n] / (tau sqrt(D))) [0, v_1 .. v_n]

    q is rotated, k_i and z are not; tau is ``temperature`` (InComeS, arXiv:2505.22156, as its code
    has it: ``edit_attention_llama.py``). Training pulls on what the passage makes likelier:

        ce = sum_y w_y CE_y / |w > 0|,    w_y = 0.5 relu(log p(y | text, q) - log p(y | q))

    beside the KL to the model that reads the text. A softmax does not mind what is taken off all
    its logits, so states hold k_i - z, and the zero gist is a logit 0 for whoever reads.

    What differs from the paper: passages, cut into windows, instead of single edits; only half of
    the layers hold gists, so at equal ratio there are twice as many; frozen backbone and a LoRA on
    the rows of gists instead of full fine-tuning; gists start from tokens (``start``); z starts at
    0 with a head start, the paper's at random without.

    When to choose it: many short facts, order irrelevant, positions scarce: a bank takes none. A
    frozen reader has never seen a bank; this needs more training than the others.
    """

    name: ClassVar[str] = "incomes"
    paper: ClassVar[str] = "arXiv:2505.22156"
    Config: ClassVar[type[CompressorConfig]] = InComeSConfig
    config: InComeSConfig
    loss_weights: ClassVar[Mapping[str, float]] = {"kl": 1.0, "ce": 1.0}
    reads_closed: ClassVar[bool] = True

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__(backbone, config)
        self.first_layer = backbone.num_layers // 2
        shape = (backbone.num_layers - self.first_layer, backbone.num_heads, backbone.head_dim)
        self.zero = nn.Parameter(torch.zeros(shape, device=backbone.device))

    def layout(self, input_ids: Tensor) -> Layout:
        tokens, layers = len(input_ids), self.backbone.num_layers
        window = max(1.0, self.config.ratio * (layers - self.first_layer) / layers)
        ends = window_ends(tokens, window if self.config.per == "window" else tokens)
        return Layout.interleave(
            ends.tolist(), raw_sees_gists=False, gists_see_gists=False, raw_is_local=False
        )

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        gists = layout.is_gist
        keys, values = self.backbone.project_kv(hidden[:-1, gists.to(hidden.device)])
        zero = self.zero[:, :, None].to(keys.dtype)
        keys, values = keys[self.first_layer :] - zero, values[self.first_layer :]  # (., H, N, D)
        _, heads, slots, size = keys.shape
        counts = torch.full((self.backbone.num_layers, heads), slots)
        counts[: self.first_layer] = 0
        rows = nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
        return GistState(
            keys=keys.reshape(-1, size),
            values=values.reshape(-1, size),
            bias=torch.full((int(rows[-1]),), -self.config.reluctance, device=keys.device),
            offsets=layout.position[gists].int().repeat(int(rows[-1]) // slots).to(keys.device),
            rows=rows.int().to(keys.device),
            num_layers=self.backbone.num_layers,
            span=0,
            num_tokens=layout.num_tokens,
            bank=1.0 if keys.requires_grad else self.config.temperature,
        )

    def answer_losses(self, answers: Answers) -> dict[str, Tensor]:
        assert answers.closed is not None
        told, guess = (cross_entropy(x, answers.targets) for x in (answers.teacher, answers.closed))
        gain = GAIN * (guess - told).relu()
        missed = (gain * cross_entropy(answers.student, answers.targets)).sum()
        ce = missed / gain.count_nonzero().clamp_min(1)
        return {"kl": super().answer_losses(answers)["kl"], "ce": ce}
