"""Two passes (compress, then read) equal one masked pass over passage and question.

The oracle knows nothing of states, composing and slots: it is the backbone with a dense mask, and
the method's update on the passage's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context
from gist_rag.compose import arrange, compose
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.base import TrainedCompressor

METHODS = {
    "gisting": {},
    "sentence_anchored": {"gists": 3},
    "unigist": {"window": 8, "sinks": 2},
    "light_thinker": {"cache_tokens": 2, "sinks": 2},
}


def in_two(compressor: Compressor, before: Tensor, passage: Tensor, question: Tensor) -> Tensor:
    backbone = compressor.backbone
    prefix = backbone.prefix(before)
    [state] = compressor.compress([passage])
    placed, text = arrange([state, question], len(prefix), "sequence")
    return backbone.read(Context([prefix], compose([placed], backbone)), [text])[0]


def in_one(compressor: Compressor, before: Tensor, passage: Tensor, question: Tensor) -> Tensor:
    """``before`` sees itself, the passage itself under its layout, the question all but text."""
    assert isinstance(compressor, TrainedCompressor)
    backbone, layout = compressor.backbone, compressor.layout(passage)
    first, size = len(before), len(layout)
    last, total = first + size, first + size + len(question)
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[first:last] = False
    mask[first:last, first:last] = layout.mask()
    mask[last:, first:last] = layout.is_gist
    tokens = backbone.embed(passage)[layout.source.clamp_min(0)]
    slots = tokens.float()
    slots[layout.is_gist] = compressor.gist_inputs(backbone.embed(passage), layout)
    embedded = torch.cat((backbone.embed(before), slots, backbone.embed(question)))
    positions = torch.cat(
        (
            torch.arange(first),
            first + layout.position,
            first + layout.span + torch.arange(len(question)),
        )
    )
    rows = torch.zeros(1, total)
    rows[0, first:last] = layout.is_gist if compressor.config.adapt == "gists" else 1.0
    with compressor.lora.active(rows) if rows.any() else nullcontext():
        logits: Tensor = backbone.model(
            inputs_embeds=embedded[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            use_cache=False,
        ).logits
    return logits[0, last:]


@torch.no_grad()
@pytest.mark.parametrize("adapt", ["gists", "all"])
@pytest.mark.parametrize("positions", ["paper", "tokens"])
@pytest.mark.parametrize("start", ["learned", "token"])
@pytest.mark.parametrize("name", METHODS)
def test_two_passes_equal_one(
    backbone: Backbone,
    ids: Tensor,
    taught: Callable[[Compressor], Compressor],
    name: str,
    start: str,
    positions: str,
    adapt: str,
) -> None:
    own = {"adapt": adapt, "start": start, "positions": positions, **METHODS[name]}
    compressor = taught(make_compressor(name, backbone, {"ratio": 4.0, **own}))
    given = (backbone.tokenize("Read this: "), ids, backbone.tokenize(" What is read first?"))
    ours, oracle = in_two(compressor, *given), in_one(compressor, *given)
    assert torch.allclose(ours, oracle, atol=1e-3)
    plain = in_two(make_compressor("full", backbone), *given)
    assert not torch.allclose(ours, plain, atol=1e-1)
