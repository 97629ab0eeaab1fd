"""Logits > token: greedy, temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from gist_rag.types import Sampling


class Chooser:
    """Picks one row's next token by its ``Sampling``."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits.float() / sampling.temperature
        if 0 < sampling.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
        probs, order = logits.softmax(-1).sort(descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0)
        return int(order[torch.multinomial(probs, 1, generator=self.generator)])
