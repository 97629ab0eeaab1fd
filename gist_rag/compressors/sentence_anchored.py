"""``sentence_anchored``: gists after every sentence; once it ends, only they are left of it."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gist_rag.compressors.base import CompressorConfig, TrainedCompressor, TrainedConfig
from gist_rag.layout import Layout, unit_ends, unit_slots

SENTENCE_END = r"[.!?]+[\"')\]]*(?=\s)|\n"


class SentenceAnchoredConfig(TrainedConfig):
    """Settings.

    Attributes:
        gists: after each sentence, each with an embedding of its own.
        longest: sentences of more tokens are cut.
        sinks: first tokens of the passage that every sentence sees.
    """

    adapt: Literal["gists", "all"] = "all"
    gists: int = Field(default=8, ge=1)
    longest: int = Field(default=64, ge=1)
    sinks: int = Field(default=1, ge=0)


class SentenceAnchored(TrainedCompressor):
    """Idea: a sentence is a thought, so anchor the gists there. After each sentence come its gists;
    whatever follows sees them and no longer the sentence.

              a a g g b b g g
        a     x
        a     x x
        g     x x x              g of a: its own sentence, and gists before it
        g     x x x x
        b         x x x          b: its own sentence, and the gists of a
        b         x x x x
        g         x x x x x
        g         x x x x x x

    Loss: ``kl + 0.2 ce`` of the answer and ``0.1 lm`` inside the passage, where
    ``lm = mean_t -log p(x_t | tokens of its own sentence, gists of earlier ones)`` is the paper's
    only loss.

    What differs from the paper: it trains all weights of a model for plain text with 1 to 8 gists
    per sentence, so that the text decides the ratio. Here the ratio is asked for: sentences are
    merged, or halved, until ``T / ratio`` gists are ``gists`` for each (the shortest unit takes
    what is left over), and sentences of more than ``longest`` tokens are cut. A line break ends a
    sentence too (a title has no full stop), the passage's first token is a sink, gists are no
    targets of ``lm`` and start from tokens (``start``), at whose positions they stand
    (``positions``; the paper does not state its own, and ``paper`` runs on over tokens and gists).
    The frozen backbone has a LoRA on all rows.

    When to choose it: prose, at ratios (4x to 16x) where a unit is about a sentence or two. Lists
    and tables without full stops fall apart at arbitrary places.

    Source: arXiv:2511.08128.
    """

    name: ClassVar[str] = "sentence_anchored"
    paper: ClassVar[str] = "arXiv:2511.08128"
    Config: ClassVar[type[CompressorConfig]] = SentenceAnchoredConfig
    config: SentenceAnchoredConfig
    loss_weights: ClassVar[dict[str, float]] = {"kl": 1.0, "ce": 0.2, "lm": 0.1}

    @property
    def num_embeddings(self) -> int:
        return self.config.gists

    def layout(self, input_ids: Tensor) -> Layout:
        config, size = self.config, len(input_ids)
        slots = max(1, round(size / config.ratio))
        sentences = self.backbone.breaks(input_ids, SENTENCE_END)
        units = math.ceil(slots / config.gists)
        ends = unit_ends(sentences, size, units, config.longest)
        gists = [range(n) for n in unit_slots(ends, slots, config.gists)]
        layout = Layout.interleave(ends, gists=gists, place="own", prefix=config.sinks)
        return self.placed(layout)
