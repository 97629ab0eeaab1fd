"""Which of several passages a prompt is about, and what follows from that.

A passage is judged by how likely it makes the question: the log-likelihood of what the prompt says
after its passages, once the model has read this one alone as a gist. That takes no training and no
text of a passage, only a pass over the question for each (UPR, unsupervised re-ranking: Sachan et
al. 2022, arXiv 2204.07496; there passages are text and an instruction asks for the question). Or by
how like the question it is (``likeness``), which takes no pass at all.

log_weights  all passages are read together, each with the weight that it deserves
Focus        of all passages, only those that matter are read, together or apart
Expand       where gists leave the model in doubt, those that matter are read as text
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local, Opened, Prefix
from gist_rag.compose import Placed, Positions, compose
from gist_rag.errors import BadInput

TOGETHER = 0.2
"""Share of the weight of all passages together beside those read apart."""
APART: Positions = "parallel"
"""Positions where passages are read apart: in the prompt with all of them none comes first, so that
their order changes nothing."""
TEMPERATURE = 1.5
"""Of judgements, in nats, where they are weights of passages read apart."""
WEIGHT_TEMPERATURE, LEAST_WEIGHT = 3.0, math.exp(-1.5)
"""The same of passages read together, and the least of these weights: what takes two passages is
not to lose the one that looks less like the question."""
ROWS = 32
"""Prompts that are judged in one pass."""


@dataclass(frozen=True)
class Focus:
    """Which of its passages a prompt reads, and how.

    Read apart, each passage stands alone in a prompt of its own, and these answer together
    (``mixture.Mixture``): no passage disturbs another. A prompt with all passages answers with
    them, for what takes two passages at once.

    Attributes:
        passages: at most so many.
        apart: whether each is read alone.
        together: the share of the weight, before anything is said, of the prompt with all passages
            where they are read apart; 0 for no such prompt.
        margin: none that makes the question less likely than the best one by more than this, in
            nats.
        temperature: of the likelihoods, where they are weights of passages read apart.
    """

    passages: int = 1
    apart: bool = False
    margin: float = math.inf
    temperature: float = TEMPERATURE
    together: float = TOGETHER

    def __post_init__(self) -> None:
        if self.passages < 1 or self.margin < 0 or self.temperature <= 0:
            raise BadInput(
                f"{self}: passages must be 1 or more, margin 0 or more, temperature above 0"
            )
        if not 0 <= self.together < 1:
            raise BadInput(f"{self}: together is a share, from 0 to less than 1")

    def chosen(self, likelihoods: Tensor) -> list[int]:
        """Places of the passages to be read, of ``likelihoods`` ``(P,)``, in prompt order."""
        near = likelihoods >= likelihoods.max() - self.margin
        return sorted(place for place in best(likelihoods, self.passages) if near[place])

    def candidates(self, count: int) -> list[list[int]]:
        """Readings of ``count`` passages from which ``readings`` chooses, as their places."""
        alone = [[place] for place in range(count)]
        return [*alone, [*range(count)]] if self.together and count > 1 else alone

    def readings(self, likelihoods: Tensor) -> tuple[list[list[int]], Tensor]:
        """Which passages are read together, for each reading of a prompt, and the log-weights
        ``(R,)`` with which these answer (``mixture.Mixture``)."""
        places = self.chosen(likelihoods)
        if not self.apart:
            return [places], likelihoods.new_zeros(1)
        weights = (likelihoods[places] / self.temperature).log_softmax(0)
        candidates = self.candidates(len(likelihoods))
        common = candidates[len(likelihoods) :]
        if common:
            both = weights.new_tensor([1 - self.together, self.together]).log()
            weights = torch.cat((weights + both[0], both[1:]))
        return [candidates[place] for place in places] + common, weights


def make_focus(focus: Focus | int | None = None, apart: int | None = None) -> Focus | None:
    """From numbers: how many passages are read together, or how many apart.

    Raises:
        BadInput: both are given.
    """
    if focus is not None and apart is not None:
        raise BadInput("focus reads passages together and apart each by itself; give one of them")
    if apart is not None:
        return Focus(apart, apart=True)
    return Focus(focus) if isinstance(focus, int) else focus


def log_weights(judged: Tensor) -> list[float]:
    """Weights of passages that are read together, as logs: 0 for the best one.

    A weight is a factor of the attention that a passage gets (``compose.Placed``), so one that does
    not matter disturbs the others less, and yet is there.

    Args:
        judged: ``(P,)`` in nats.
    """
    weights = (judged - judged.max()) / WEIGHT_TEMPERATURE
    logs: list[float] = weights.clamp_min(math.log(LEAST_WEIGHT)).tolist()
    return logs


@dataclass(frozen=True)
class Expand:
    """When to read text after all, and how much of it.

    Attributes:
        doubt: entropy of an answer's first token, in nats, from which on a prompt is read again.
        passages: how many passages are then read as text.
    """

    doubt: float
    passages: int = 1

    def __post_init__(self) -> None:
        if self.passages < 1 or not self.doubt >= 0:
            raise BadInput(f"{self}: passages must be 1 or more, and doubt 0 or more")

    def doubtful(self, opened: Opened) -> list[bool]:
        """Which of the prompts are to be read again."""
        doubtful: list[bool] = (opened.entropy >= self.doubt).tolist()
        return doubtful

    def chosen(self, likelihoods: Tensor) -> list[int]:
        """Places of the passages to be read as text, of ``likelihoods`` ``(P,)``."""
        return best(likelihoods, self.passages)


def best(likelihoods: Tensor, count: int) -> list[int]:
    """Places of the likeliest, the best first."""
    places: list[int] = likelihoods.topk(min(count, len(likelihoods))).indices.tolist()
    return places


def log_likelihoods(
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    placed: Sequence[Sequence[Placed]],
    texts: Sequence[Local],
    counts: Sequence[int],
) -> Tensor:
    """How likely prompts make their ends, to the plain backbone.

    Args:
        prefixes, placed, texts: of each prompt.
        counts: how many tokens of each text's end are judged, see ``Backbone.open``.

    Returns:
        ``(B,)`` sums of log-probabilities.
    """
    found = []
    for first in range(0, len(texts), ROWS):
        rows = slice(first, first + ROWS)
        context = Context(prefixes[rows], compose(placed[rows], backbone))
        opened = backbone.open(context, texts[rows], counts=counts[rows])
        assert opened.likelihoods is not None
        found.append(opened.likelihoods.cpu())
    return torch.cat(found)
