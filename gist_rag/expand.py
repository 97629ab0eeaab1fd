"""Expand on demand: where gists leave a model in doubt, the passages that matter become text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gist_rag.backbone import Backbone, Opened


@dataclass(frozen=True)
class Expand:
    """When to read text after all, and how much of it.

    Attributes:
        doubt: entropy of an answer's first token, in nats, from which on a prompt is read again.
        passages: how many passages are then read as text: those that the model looked at most.
    """

    doubt: float
    passages: int = 1

    def chosen(
        self, backbone: Backbone, opened: Opened, num_passages: Sequence[int]
    ) -> list[list[int]]:
        """Places of the passages to be read as text, per prompt.

        Args:
            opened: the prompts as gists, watched.
            num_passages: how many of its passages each prompt reads as gists.
        """
        doubtful = (opened.entropy >= self.doubt).tolist()
        if not any(d and n for d, n in zip(doubtful, num_passages, strict=True)):
            return [[] for _ in doubtful]
        shares = backbone.attention_shares(opened)
        return [
            row[:count].topk(min(self.passages, count)).indices.tolist() if doubt else []
            for row, doubt, count in zip(shares, doubtful, num_passages, strict=True)
        ]
