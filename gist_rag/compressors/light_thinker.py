"""``light_thinker``: cache tokens and a continue token after each unit; thoughts, too, while
decoding."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache

from gist_rag.backbone import forget
from gist_rag.compressors.base import (
    CompressorConfig,
    Thoughts,
    TrainedCompressor,
    TrainedConfig,
)
from gist_rag.errors import ContextOverflow
from gist_rag.layout import Layout, unit_ends, unit_slots

BREAKS = {"line": r"\n", "paragraph": r"\n\s*\n"}
THOUGHT_END = "\n\n"
CONTINUE = 0
"""Which gist embedding is ``[o]``; the cache tokens come after it."""


class LightThinkerConfig(TrainedConfig):
    """Settings.

    Attributes:
        cache_tokens: after each unit, each with an embedding of its own; ``[o]`` comes on top.
        units: where units of a passage end, as far as the ratio lets them.
        longest: lines and paragraphs of more tokens are cut.
        sinks: first tokens of a passage that every unit sees, as thoughts see their prompt.
        start: by default nothing, as ``[o]`` is to know no text.
    """

    adapt: Literal["gists", "all"] = "all"
    cache_tokens: int = Field(default=7, ge=1)
    units: Literal["fixed", "line", "paragraph"] = "fixed"
    longest: int = Field(default=128, ge=1)
    sinks: int = Field(default=1, ge=0)
    start: Literal["token", "mean", "learned"] = "learned"


class LightThinker(TrainedCompressor):
    """Idea: a model that reasons writes a thought, squeezes it into cache tokens, forgets it, and
    goes on from a continue token ``[o]``. A passage is read in the same way, unit by unit.

              S a c c o b b c c o       S a sink (of a thought: the prompt)
        S     x
        a     x x
        c     x x x                     c: its own unit, and all c and o before it
        c     x x x x
        o     x   x x x                 o: no text, only what has been kept
        b     x   x x x x               later units: c and o of earlier ones, not their text
        b     x   x x x x x
        c     x   x x x x x x
        c     x   x x x x x x x
        o     x   x x x     x x x

    Loss: ``kl + 0.2 ce`` of the answer and ``0.1 lm`` inside the passage; for thoughts ``lm`` on
    their tokens, which is the paper's only loss. Neither prompt nor c nor o are targets.

    What differs from the paper: it has no passages; units of one take the place of thoughts, as
    many as make ``T / ratio`` kept slots, ``[o]`` included. A LoRA on all rows of a frozen backbone
    instead of all weights. A thought ends at a blank line, which the model writes anyway, instead
    of at a splitter of its own. Positions of thoughts are as there, so forgetting leaves a gap; the
    gists of a passage stand beside its tokens (``positions``).

    When to choose it: for long reasoning (``decode``), whose KV cache then grows by ``cache_tokens
    + 1`` per thought; for passages as ``sentence_anchored`` with units of any kind.

    Source: arXiv:2502.15589; its mask is that of LightThinker/utils.py in zjunlp/LightThinker.
    """

    name: ClassVar[str] = "light_thinker"
    paper: ClassVar[str] = "arXiv:2502.15589"
    Config: ClassVar[type[CompressorConfig]] = LightThinkerConfig
    config: LightThinkerConfig
    loss_weights: ClassVar[Mapping[str, float]] = {"kl": 1.0, "ce": 0.2, "lm": 0.1}

    @property
    def num_embeddings(self) -> int:
        return 1 + self.config.cache_tokens

    def layout(self, input_ids: Tensor) -> Layout:
        config, size = self.config, len(input_ids)
        slots, each = max(1, round(size / config.ratio)), self.num_embeddings
        breaks, longest = [], size
        if config.units != "fixed":
            breaks = self.backbone.breaks(input_ids, BREAKS[config.units])
            longest = config.longest
        ends = unit_ends(breaks, size, math.ceil(slots / each), longest)
        return self.placed(self._layout(ends, unit_slots(ends, slots, each), config.sinks))

    def thought_layout(self, thoughts: Thoughts) -> Layout:
        """The last thought stays text: nothing follows that would need its cache tokens."""
        squeezed = len(thoughts.ends) - 2
        slots = [0, *[self.num_embeddings] * squeezed, 0]
        return self._layout(thoughts.ends, slots, thoughts.num_given)

    def thought_losses(self, thoughts: Sequence[Thoughts]) -> dict[str, Tensor]:
        """The mask of one pass is what decoding does step by step, so every token of a thought is
        learnt as it will be told: from the prompt, what is kept of earlier thoughts, its own."""
        ids, layouts = [t.ids for t in thoughts], [*map(self.thought_layout, thoughts)]
        hidden, given = self.encode(ids, layouts)[-1], [t.num_given for t in thoughts]
        return {"lm": self.language_loss(hidden, ids, layouts, given)}

    def _layout(self, ends: Sequence[int], slots: Sequence[int], prefix: int) -> Layout:
        """Units with ``slots`` gists each: cache tokens, then ``[o]``, which sees no text."""
        gists = [[*range(1, n), CONTINUE] if n > 1 else [1] * n for n in slots]
        layout = Layout.interleave(ends, gists=gists, place="own", prefix=prefix)
        itself = torch.arange(len(layout))
        blind = layout.source == -1 - CONTINUE
        return replace(layout, local_from=torch.where(blind, itself, layout.local_from))

    @torch.no_grad()
    def decode(
        self, prompt: Tensor, *, max_tokens: int = 512, cache: DynamicCache | None = None
    ) -> Generator[int]:
        """Decode greedily after a prompt ``(P,)``, forgetting each thought once it is squeezed.

        The end token is the last one. Cache tokens take positions, too: where those run out,
        thoughts stay, and then decoding ends.

        Args:
            cache: an empty one, for callers who want to see it; it holds the prompt, cache tokens
                and ``[o]`` of all finished thoughts, and the thought that is being written.

        Raises:
            ContextOverflow: prompt and answer may need more positions than the model has.
        """
        backbone = self.backbone
        if len(prompt) + max_tokens > backbone.max_positions:
            raise ContextOverflow(
                f"a prompt of {len(prompt)} tokens and {max_tokens} new ones do not fit "
                f"{backbone.name}, which has {backbone.max_positions} positions"
            )
        cache = DynamicCache(config=backbone.model.config) if cache is None else cache
        logits = self._run(cache, torch.arange(len(prompt)), prompt)
        position = start = len(prompt)  # next position; where in the cache the thought begins
        thought: list[int] = []
        for _ in range(max_tokens):
            thought.append(int(logits.argmax()))
            yield thought[-1]
            if thought[-1] in backbone.stop_ids or position >= backbone.max_positions:
                return
            logits = self._run(cache, torch.tensor([position]), torch.tensor(thought[-1:]))
            position += 1
            room = position + self.num_embeddings < backbone.max_positions
            if room and backbone.tokenizer.decode(thought).endswith(THOUGHT_END):
                logits = self._squeeze(cache, start, position, torch.tensor(thought))
                position += self.num_embeddings
                start, thought = cache.get_seq_length(), []

    def _squeeze(self, cache: DynamicCache, start: int, position: int, thought: Tensor) -> Tensor:
        """Run the cache tokens and ``[o]``, then drop the thought; logits of what comes next."""
        layout = self._layout([len(thought)], [self.num_embeddings], 0)
        gists = self.gist_inputs(self.backbone.embed(thought), layout)
        end, count = cache.get_seq_length(), self.num_embeddings
        mask = torch.ones(count, end + count, dtype=torch.bool).tril(end)
        mask[-1, start:end] = False
        positions = position + torch.arange(count)
        logits = self._run(cache, positions, embeddings=gists, mask=mask)
        forget(cache, start, end)
        return logits

    def _run(
        self,
        cache: DynamicCache,
        positions: Tensor,
        ids: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        backbone = self.backbone
        rows = torch.full((1, len(positions)), float(ids is None), device=backbone.device)
        if embeddings is not None:
            embeddings = embeddings.to(backbone.dtype)
        with self.adapted(rows):
            return backbone.extend(
                cache, positions, input_ids=ids, embeddings=embeddings, mask=mask
            )
