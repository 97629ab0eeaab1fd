"""``gist_pool``: a gist per window that sees its window only, one layer ahead of where it is read.
Each of the three repairs to gisting is a switch."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors.base import CompressorConfig, TrainedCompressor, TrainedConfig
from gist_rag.layout import Layout, window_ends
from gist_rag.lora import LoRA, LoRAConfig
from gist_rag.types import GistState


class GistPoolConfig(TrainedConfig):
    """Settings of ``gist_pool``. All three switches off and ``start`` learned is plain gisting,
    embedding trained only.

    Attributes:
        shift: layer ``l`` reads what a gist has gathered *after* layer ``l``; without, before it.
        windowed: gists are spread over the passage and see their own window; without, they stand
            at the end and see everything.
        separate: gists are computed with parameters of their own (``lora``); without, with those
            that read them.
    """

    shift: bool = True
    windowed: bool = True
    separate: bool = True
    start: Literal["token", "mean", "learned"] = "mean"


class GistPool(TrainedCompressor):
    """Idea: three faults keep gists from being as good as mean pooling, and each can be repaired.
    A gist then starts as the mean of its window and learns what to pool instead.

        t t g t t g         a gist sees the tokens of its window and itself,
        1 1 1 2 2 2         a token sees tokens only

        k_l, v_l = W_l norm_l(h_{l+1})       h_l: residual stream of a gist before layer l

    The faults (GistPool, arXiv:2504.08934): what a gist gathers in layer l is not in its keys and
    values before layer l + 1, too late for who reads (``shift``); attention cannot learn to pool a
    long text evenly (``windowed``); the same weights must summarise and predict (``separate``).
    The shifted projection is the reader's own, norm included, without the update.

    What differs from the paper: only its abstract and its authors' summary could be read, so that
    this is a reading. Gists start as the mean of their window's token embeddings, plus one learned
    vector; the backbone is frozen and reads as it is, with a LoRA on the rows of gists as the
    separate parameters; distillation (weights ``kl`` 1, ``ce`` 0.2; ``ce`` alone is presumed to be
    the paper's).

    When to choose it: as the first of the trained methods at 2x to 8x. Long passages cost nothing
    in quality, since windows do not compete; what spans two windows is in neither.
    """

    name: ClassVar[str] = "gist_pool"
    paper: ClassVar[str] = "arXiv:2504.08934"
    Config: ClassVar[type[CompressorConfig]] = GistPoolConfig
    config: GistPoolConfig

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__(backbone, config)
        if not self.config.separate:
            self.lora = LoRA(backbone, LoRAConfig(rank=0))

    def layout(self, input_ids: Tensor) -> Layout:
        tokens = len(input_ids)
        if not self.config.windowed:
            return self.placed(Layout.append(tokens, math.ceil(tokens / self.config.ratio)))
        return Layout.interleave(
            window_ends(tokens, self.config.ratio).tolist(),
            raw_sees_gists=False,
            gists_see_gists=False,
            raw_is_local=False,
        )

    def adapted(self, rows: Tensor | None = None) -> AbstractContextManager[None]:
        return nullcontext() if rows is None else super().adapted(rows)

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        first = 1 if self.config.shift else 0
        gists = layout.is_gist
        keys, values = self.backbone.project_kv(
            hidden[first : first + len(hidden) - 1, gists.to(hidden.device)]
        )
        return GistState.uniform(
            keys,
            values,
            layout.position[gists].to(hidden.device),
            span=layout.span,
            num_tokens=layout.num_tokens,
        )
