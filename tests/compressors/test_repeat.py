"""What a passage is asked for when the model repeats it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.repeat import Repeater
from gist_rag.errors import BadInput


@pytest.fixture
def error(backbone: Backbone, ids: Tensor) -> Callable[..., Tensor]:
    """How far a method's gists of a passage are from the passage."""
    repeater = Repeater(backbone)
    with torch.no_grad():
        full = make_compressor("full", backbone).compress([ids])
        target = repeater.target(repeater(full, [ids]), 0, num_queries=40)
    assert target.queries.shape[1] <= 40

    def measure(method: Compressor) -> Tensor:
        return repeater.error(target, method.compress([ids])[0])

    return measure


def test_a_whole_passage_is_no_error(backbone: Backbone, error: Callable[..., Tensor]) -> None:
    assert float(error(make_compressor("full", backbone))) < 1e-8


@torch.no_grad()
def test_a_passage_is_repeated_from_its_gists(backbone: Backbone, ids: Tensor) -> None:
    """From the whole passages as from their text, whatever their lengths."""
    repeater, passages = Repeater(backbone), [ids, ids[:20]]
    logits = repeater.read(make_compressor("full", backbone).compress(passages), passages)
    for told, passage in zip(logits, passages, strict=True):
        before, between = len(repeater.prefix), len(repeater.question)
        head = backbone.tokenize(repeater._framing[0])
        whole = torch.cat((head, passage, repeater.question, passage))
        mask = torch.ones(len(whole), len(whole), dtype=torch.bool).tril()
        mask[before : before + len(passage), :before] = False  # encoded alone
        plain = backbone.model(whole[None], attention_mask=mask[None, None]).logits[0]
        first = before + len(passage) + between - 1
        assert torch.allclose(told, plain[first:-1], atol=1e-4)


def test_what_is_fitted_is_closer_than_what_is_cut(
    backbone: Backbone, error: Callable[..., Tensor]
) -> None:
    far = {
        ratio: [
            float(error(make_compressor(name, backbone, {"ratio": ratio})))
            for name in ("attention_matching", "strided")
        ]
        for ratio in (4.0, 8.0)
    }
    assert all(0 < fitted < cut < 2 for fitted, cut in far.values())
    assert far[4.0][0] < far[8.0][0]


def test_where_a_passage_begins_is_no_error(
    backbone: Backbone, error: Callable[..., Tensor], ids: Tensor
) -> None:
    """Packed gists end where the whole passage would."""
    packed = make_compressor("gist_coco", backbone, {"ratio": 4.0})
    assert packed.compress([ids])[0].span < len(ids)
    assert torch.isfinite(error(packed))


def test_it_is_learnt(
    backbone: Backbone, error: Callable[..., Tensor], lowers: Callable[..., bool]
) -> None:
    method = make_compressor("gist_pool", backbone, {"ratio": 4.0})
    assert lowers(method, lambda: error(method))


def test_a_bank_is_refused(backbone: Backbone, error: Callable[..., Tensor]) -> None:
    with pytest.raises(BadInput, match="nothing to match"):
        error(make_compressor("incomes", backbone, {"ratio": 4.0}))
