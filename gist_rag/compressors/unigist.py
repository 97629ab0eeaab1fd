"""``unigist``: one gist after every ``ratio`` tokens, a sliding window, and a few sinks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gist_rag.compressors.base import CompressorConfig, TrainedCompressor, TrainedConfig
from gist_rag.layout import Layout, window_ends


class UniGistConfig(TrainedConfig):
    """Settings.

    Attributes:
        window: tokens before its own unit that a slot sees, rounded to units of ``ratio``.
        sinks: first tokens of the passage that every slot sees.
    """

    adapt: Literal["gists", "all"] = "all"
    window: int = Field(default=32, ge=0)
    sinks: int = Field(default=4, ge=0)


class UniGist(TrainedCompressor):
    """Idea: the same gist everywhere, one after each unit of ``ratio`` tokens. Every slot, token or
    gist, sees the sinks, all gists before it, and the tokens of a short window: what lies further
    back is known by its gists alone, in one pass without segments.

              S a g b b g c c g       S a sink; units of two tokens; a window of one unit
        S     x
        a     x x
        g     x x x
        b     x x x x
        b     x x x x x
        g     x x x x x x
        c     x   x x x x x           a has left the window
        c     x   x x x x x x
        g     x   x x x x x x x

        position: a gist shares that of a token, so tokens keep their distances:
              0 1 2 2 3 4 4 5 6       the paper's gists have that of the next token,
              0 1 1 2 3 3 4 5 5       ours by default that of their last one (``positions``)

    Loss: ``kl + 0.2 ce`` of the answer and ``0.2 lm`` over the passage's tokens; the paper has
    ``lm`` alone, and gists are no targets in both.

    What differs from the paper: a window of 32 tokens instead of 128 and 4 sinks instead of 128, as
    passages have a few hundred tokens and not 32,000; sinks are the passage's first tokens; neither
    sinks nor the last window are kept for the reader, only gists; units differ by at most one token
    instead of padding the text; the gist's embedding is added to that of its unit's last token
    (``start``); a LoRA on all rows of a frozen backbone instead of all weights.

    When to choose it: first, of the methods that are trained: gists near everything they stand for
    learn fastest, and the language-modelling term gives every one of them something to learn at
    every step.

    Source: arXiv:2509.15763.
    """

    name: ClassVar[str] = "unigist"
    paper: ClassVar[str] = "arXiv:2509.15763"
    Config: ClassVar[type[CompressorConfig]] = UniGistConfig
    config: UniGistConfig
    loss_weights: ClassVar[dict[str, float]] = {"kl": 1.0, "ce": 0.2, "lm": 0.2}

    def layout(self, input_ids: Tensor) -> Layout:
        config, size = self.config, len(input_ids)
        layout = Layout.interleave(
            window_ends(size, config.ratio).tolist(),
            place="next",
            reach=round(config.window / config.ratio),
            prefix=config.sinks,
        )
        return self.placed(layout)
