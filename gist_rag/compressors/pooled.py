"""``strided`` and ``mean_pooled``: controls that every method must beat at its own ratio."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gist_rag.compressors.base import Compressor
from gist_rag.layout import Layout, window_ends
from gist_rag.types import GistState


class Strided(Compressor):
    """Idea: keep the last token of every window of ``ratio`` tokens, drop the rest.

        t t T t t T t t T      ratio 3: capital letters are kept

    When to choose it: never, except to see how much a passage's redundancy alone gives away.
    """

    name: ClassVar[str] = "strided"

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        ends = window_ends(len(layout), self.config.ratio).to(hidden.device)
        keys, values = self.backbone.project_kv(hidden[:-1, ends - 1])
        return GistState.uniform(
            keys, values, ends - 1, span=layout.span, num_tokens=layout.num_tokens
        )


class MeanPooled(Compressor):
    """Idea: average keys (before RoPE) and values over windows of ``ratio`` tokens.

    A window of ``c`` tokens gets log-mass ``log c``, so that it is attended to as ``c`` equal keys
    would be.

    When to choose it: as the zero-parameter control of the methods that learn how to pool
    (GistPool, arXiv:2504.08934, section 4, uses it so).
    """

    name: ClassVar[str] = "mean_pooled"

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        keys, values = self.backbone.project_kv(hidden[:-1])
        ends = window_ends(len(layout), self.config.ratio).to(hidden.device)
        counts = ends.diff(prepend=ends.new_zeros(1))
        window = torch.arange(len(ends), device=ends.device).repeat_interleave(counts)

        def pool(x: Tensor) -> Tensor:
            summed = x.new_zeros(*x.shape[:2], len(ends), x.shape[-1]).index_add(2, window, x)
            return summed / counts[:, None].to(x.dtype)

        bias = counts.float().log().expand(*keys.shape[:2], -1)
        return GistState.uniform(
            pool(keys),
            pool(values),
            ends - 1 - counts // 2,
            span=layout.span,
            num_tokens=layout.num_tokens,
            bias=bias,
        )
