"""Several readings of one question, one answer.

Each token's probability is the mean over the readings, weighed by how likely each has made what was
said so far::

    p(y_t | y_<t) = sum_i w_i p_i(y_<t) p_i(y_t | y_<t) / sum_i w_i p_i(y_<t)

So answers are distributed as a mixture of the readings' answers (RAG-Sequence: Lewis et al. 2020,
arXiv 2005.11401, there with the retriever's weights and decoded by beams), one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class Mixture:
    """Which rows of a batch answer together.

    Args:
        owner: the answer that each row belongs to, ascending from 0.
        log_weights: of each row, ``(R,)``; those of an answer need not sum to one.
    """

    def __init__(self, owner: Sequence[int], log_weights: Tensor) -> None:
        self.owner = torch.tensor(owner, device=log_weights.device)
        self.log_weights = log_weights.float()
        self.sizes: list[int] = self.owner.bincount().tolist()

    @classmethod
    def of_one_each(cls, count: int, device: torch.device) -> Self:
        """As many answers as rows."""
        return cls(range(count), torch.zeros(count, device=device))

    @property
    def one_each(self) -> bool:
        return len(self.sizes) == len(self.owner)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits ``(B, V)`` of each answer's next token, from logits ``(R, V)``."""
        if self.one_each:
            return logits
        logs = logits.float().log_softmax(-1)
        rows = zip(logs.split(self.sizes), self.log_weights.split(self.sizes), strict=True)
        return torch.stack(
            [(log + weight.log_softmax(0)[:, None]).logsumexp(0) for log, weight in rows]
        )

    def tell(self, logits: Tensor, tokens: Tensor) -> None:
        """What was said: tokens ``(B, n)``, chosen from logits ``(R, n, V)``."""
        if self.one_each:
            return
        said = tokens[self.owner][..., None]
        logs = logits.float().log_softmax(-1).gather(-1, said).squeeze(-1)
        self.log_weights = self.log_weights + logs.sum(-1)
