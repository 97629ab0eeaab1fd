"""``gisting``: gists after the passage that see all of it; whoever reads sees the gists alone."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from gist_rag.compressors.base import TrainedCompressor
from gist_rag.layout import Layout


class Gisting(TrainedCompressor):
    """Idea: append gists to the passage; a causal pass lets each of them see every token. What they
    hold afterwards, layer by layer, is all that a reader gets.

        t t t t g g         every slot sees all earlier ones
        -------|---> q      a question sees g only

    The original (Gisting, arXiv:2304.08467, section 3) compresses instructions into one to ten
    gists by plain instruction tuning under that mask.

    What differs from the paper: passages instead of instructions; ``ceil(T / ratio)`` gists, one
    learned embedding for all, added to that of a token (``start``), at whose position it stands
    (``positions``; the paper's follow the text); the backbone is frozen, with a LoRA on the rows of
    gists; distillation from the model that reads the text, which the paper does not have (weights
    ``kl`` 1, ``ce`` 0.2; ``ce`` alone is the paper's own loss).

    When to choose it: as the honest baseline. Ends of long passages crowd out their beginnings, and
    methods that give every window a gist of its own learn faster (GistPool, arXiv:2504.08934).
    """

    name: ClassVar[str] = "gisting"
    paper: ClassVar[str] = "arXiv:2304.08467"

    def layout(self, input_ids: Tensor) -> Layout:
        gists = math.ceil(len(input_ids) / self.config.ratio)
        return self.placed(Layout.append(len(input_ids), gists))
