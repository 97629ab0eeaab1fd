"""Logits > token: greedy, temperature, top-k and top-p, within what a constraint allows."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from gist_rag.constrain import Follower
from gist_rag.types import Sampling


class Chooser:
    """Picks one row's next token by its ``Sampling``.

    Args:
        follower: of the constraint, if there is one; it follows the tokens that are picked.
    """

    def __init__(
        self, sampling: Sampling, device: torch.device, follower: Follower | None = None
    ) -> None:
        self.sampling = sampling
        self.follower = follower
        self._forced = deque(follower.forced() if follower else ())
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    @property
    def knows_next(self) -> bool:
        """Whether the next token is settled, whatever the logits are."""
        return bool(self._forced)

    def __call__(self, logits: Tensor) -> int:
        """The next token, from logits ``(V,)``."""
        if self._forced:
            return self._forced.popleft()
        if self.follower is None:
            return self._choose(logits)
        allowed = torch.from_numpy(self.follower.allowed(len(logits))).to(logits.device)
        token = self._choose(logits.masked_fill(~allowed, -torch.inf))
        self.follower.take(token)
        self._forced.extend(self.follower.forced())
        return token

    def _choose(self, logits: Tensor) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits.float() / sampling.temperature
        if 0 < sampling.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
        probs, order = logits.softmax(-1).sort(descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0)
        return int(order[torch.multinomial(probs, 1, generator=self.generator)])
