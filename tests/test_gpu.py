"""The same on a CUDA device: run with ``pytest -m gpu`` where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import compose, place
from gist_rag.compressors import make_compressor
from gist_rag.types import Passage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_gists_made_and_read_on_cuda_equal_those_of_the_cpu(
    make_model: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, passages: list[Passage]
) -> None:
    logits = []
    for device in ("cpu", "cuda"):
        backbone = Backbone(make_model("llama").to(device), tokenizer, device)
        compressor = make_compressor("attention_matching", backbone, {"ratio": 4})
        with torch.no_grad():
            states = compressor.compress([backbone.tokenize(p.text) for p in passages[:3]])
            question = backbone.tokenize("What is WAL?")
            placed, end = place(states, 0, "parallel")
            context = Context([backbone.prefix(question[:0])], compose([placed], backbone))
            logits.append(backbone.read(context, [Local.after(question, end, 3)]).cpu())
    assert (logits[0] - logits[1]).abs().max() < 0.05
