"""``gist_pool``: a gist per window that sees its window only, read up to a layer ahead.

Each of the three repairs to gisting is a switch.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gist_rag.backbone import Backbone
from gist_rag.compressors.base import CompressorConfig, TrainedCompressor, TrainedConfig
from gist_rag.layout import Layout, window_ends
from gist_rag.lora import LoRA, LoRAConfig
from gist_rag.types import GistState

FIRST_SHARE = 0.25
"""Of the way to the next layer, before anything is learnt; it costs untrained gists nothing."""


class GistPoolConfig(TrainedConfig):
    """Settings of ``gist_pool``. All three switches off and ``start`` learned is plain gisting,
    embedding trained only.

    Attributes:
        shift: layer ``l`` reads what a gist has gathered *after* layer ``l``, as in the paper;
            without, before it; ``learned``: somewhere between, for each layer.
        windowed: gists are spread over the passage and see their own window; without, they stand
            at the end and see everything.
        separate: gists are computed with parameters of their own (``lora``); without, with those
            that read them.
        sink: windowed gists see the passage's first token besides.
    """

    shift: bool | Literal["learned"] = "learned"
    windowed: bool = True
    separate: bool = True
    sink: bool = True


class GistPool(TrainedCompressor):
    """Idea: three faults keep gists from being as good as mean pooling, and each can be repaired.

              t t g t t g
        t     x                a token sees tokens only,
        t     x x
        g     x x x            a gist the tokens of its window, itself
        t     x x   x          and the first token
        t     x x   x x
        g     x     x x x

        k_l, v_l = W_l norm_l(h_l + s_l (h_{l+1} - h_l))
                                             h_l: residual stream of a gist before layer l

    The faults (GistPool, arXiv:2504.08934): what a gist gathers in layer l is not in its keys and
    values before layer l + 1, too late for who reads (``shift``); attention cannot learn to pool a
    long text evenly (``windowed``); the same weights must summarise and predict (``separate``).
    The shifted projection is the reader's own, norm included, without the update.

    What differs from the paper: only its abstract and its authors' summary could be read, so that
    this is a reading. The paper shifts by a whole layer (``s_l = 1``, ``shift: true``), which no
    frozen model reads well before long training: here each layer learns how far (``learned``).
    Windowed gists also see the first token, since models put the attention there that they need
    nowhere (``sink``). A gist starts from its window's last token, at its position, as those of all
    methods here; ``start: mean`` is nearer to pooling. The backbone is frozen and reads as it is,
    with a LoRA on the rows of gists as the separate parameters; distillation (weights ``kl`` 1,
    ``ce`` 0.2; ``ce`` alone is presumed to be the paper's).

    When to choose it: where passages are long. Windows do not compete, so length costs nothing in
    quality; what spans two windows is in neither.
    """

    name: ClassVar[str] = "gist_pool"
    paper: ClassVar[str] = "arXiv:2504.08934"
    Config: ClassVar[type[CompressorConfig]] = GistPoolConfig
    config: GistPoolConfig

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__(backbone, config)
        if not self.config.separate:
            self.lora = LoRA(backbone, LoRAConfig(rank=0))
        if self.config.shift == "learned":
            self.ahead = nn.Parameter(torch.full((backbone.num_layers,), FIRST_SHARE))

    def layout(self, input_ids: Tensor) -> Layout:
        tokens = len(input_ids)
        if not self.config.windowed:
            return self.placed(Layout.append(tokens, math.ceil(tokens / self.config.ratio)))
        return Layout.interleave(
            window_ends(tokens, self.config.ratio).tolist(),
            raw_sees_gists=False,
            gists_see_gists=False,
            raw_is_local=False,
            prefix=int(self.config.sink),
        )

    def adapted(self, rows: Tensor | None = None) -> AbstractContextManager[None]:
        return nullcontext() if rows is None else super().adapted(rows)

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        gists = layout.is_gist
        stream = hidden[:, gists.to(hidden.device)]
        if self.config.shift == "learned":
            ahead = self.ahead.to(stream.dtype)[:, None, None]
            stream = stream[:-1].lerp(stream[1:], ahead)
        else:
            stream = stream[1:] if self.config.shift else stream[:-1]
        keys, values = self.backbone.project_kv(stream)
        return GistState.uniform(
            keys,
            values,
            layout.position[gists].to(hidden.device),
            span=layout.span,
            num_tokens=layout.num_tokens,
        )
