"""``gist_coco``: gists that are taught by imitation alone, and that can be put into words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from gist_rag.compressors.base import Answers, CompressorConfig, TrainedCompressor, TrainedConfig
from gist_rag.layout import Layout
from gist_rag.types import GistState


class GistCocoConfig(TrainedConfig):
    """Settings of ``gist_coco``.

    Attributes:
        kinds: different gist embeddings, taken in turn.
        verbalise: tokens of the text that each gist is put into when passages are compressed; 0
            for no text.
    """

    kinds: int = Field(default=10, ge=1)
    verbalise: int = Field(default=0, ge=0)


class GistCoco(TrainedCompressor):
    """Idea: a plug-in that learns to write for a reader who never changes: the frozen model reading
    the gists must say what it says reading the text. What such gists hold, the same frozen model
    can also write down, for other models to read.

        t t t t a b         a and b have embeddings of their own and see all that is before them
        -------|---> q      a question sees a and b only

        loss = sum_y p(y | text, q) log( p(y | text, q) / p(y | gists, q) )

    (Gist-COCO, arXiv:2402.16058, section 3.2; its code's ``KL_loss_parament``.) No other term: with
    cross-entropy instead, the paper finds gists hardly better than no passage. Gists are packed, so
    that a passage takes as many positions as it has gists; passages side by side all start at the
    same one, and their order does not matter.

    What differs from the paper: an encoder-decoder there, whose gists stand before the text and see
    the question as well; here a decoder, gists after the text, and no question, since gists are
    kept for questions yet to come. ``ceil(T / ratio)`` gists instead of ten, starting from tokens
    (``start``) and written at their positions (``positions``); a LoRA on the rows of gists instead
    of a second encoder; keys and values instead of last hidden states.

    When to choose it: when the reader must not be touched, or when a model that takes only text is
    to profit too (``verbalise``). At 8x and more, methods with a gist per window lose less.
    """

    name: ClassVar[str] = "gist_coco"
    paper: ClassVar[str] = "arXiv:2402.16058"
    Config: ClassVar[type[CompressorConfig]] = GistCocoConfig
    config: GistCocoConfig
    loss_weights: ClassVar[Mapping[str, float]] = {"kl": 1.0}

    @property
    def num_embeddings(self) -> int:
        return self.config.kinds

    def layout(self, input_ids: Tensor) -> Layout:
        gists = math.ceil(len(input_ids) / self.config.ratio)
        return self.placed(Layout.append(len(input_ids), gists, self.config.kinds))

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        return super().extract(hidden, layout).side_by_side()

    def finish(self, states: list[GistState], passages: Sequence[Tensor]) -> list[GistState]:
        if not self.config.verbalise or any(s.keys.requires_grad for s in states):
            return states
        texts = self.verbalise(states, self.config.verbalise)
        return [replace(s, text=text) for s, text in zip(states, texts, strict=True)]

    def answer_losses(self, answers: Answers) -> dict[str, Tensor]:
        return {"kl": super().answer_losses(answers)["kl"]}
