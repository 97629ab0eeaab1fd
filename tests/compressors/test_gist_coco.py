"""``gist_coco``: KL alone, packed and order-free, and gists in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context
from gist_rag.compose import arrange, compose
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.base import Answers
from gist_rag.engine import GistEngine
from gist_rag.layout import Layout
from gist_rag.losses import distill
from gist_rag.types import GistKey, GistState, Passage


@pytest.fixture
def method(backbone: Backbone, taught: Callable[[Compressor], Compressor]) -> Compressor:
    settings = {"ratio": 4.0, "kinds": 3, "start": "learned"}
    return taught(make_compressor("gist_coco", backbone, settings))


@torch.no_grad()
def compress(method: Compressor, *ids: Tensor) -> list[GistState]:
    return method.compress(ids)


def test_mask(backbone: Backbone, drawn: Callable[[Layout], str]) -> None:
    """The mask of the docstring: t t t t a b."""
    layout = make_compressor("gist_coco", backbone, {"ratio": 2.0}).layout(torch.arange(4))
    assert drawn(layout) == "\n".join("x" * n for n in range(1, 7))
    assert layout.source.tolist() == [0, 1, 2, 3, -1, -2]


def test_gists_take_several_embeddings_in_turn(method: Compressor, ids: Tensor) -> None:
    assert method.layout(ids).source[48:].tolist() == [-1, -2, -3] * 4


def test_gists_are_packed(method: Compressor, ids: Tensor) -> None:
    [state] = compress(method, ids)
    assert state.span == 12
    assert state.offsets[:12].tolist() == list(range(12))


def test_tokens_cannot_see_gists(method: Compressor, ids: Tensor) -> None:
    with torch.no_grad():
        raw = method.encode([ids])[:, 0, :48]
        assert torch.allclose(raw, method.backbone.encode(ids[None])[:, 0], atol=1e-4)


def test_imitation_is_all_that_is_taught(method: Compressor) -> None:
    teacher, student = torch.randn(2, 5, 600)
    weights = torch.full((5,), 0.2)
    targets = torch.zeros(5, dtype=torch.long)
    answers = Answers(student, teacher, targets, weights)
    losses = method.answer_losses(answers)
    assert losses.keys() == method.loss_weights.keys() == {"kl"}
    assert torch.isclose(losses["kl"], distill(teacher, student).mean())
    same = method.answer_losses(replace(answers, student=teacher))
    assert float(same["kl"]) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_order_of_passages_does_not_matter(method: Compressor, ids: Tensor) -> None:
    backbone = method.backbone
    states = compress(method, ids, ids.flip(0), ids.roll(5))
    question = backbone.tokenize(" Which page?")

    def read(order: list[int]) -> Tensor:
        placed, text = arrange([*(states[i] for i in order), question], 0, "parallel")
        context = Context([backbone.prefix(ids[:0])], compose([placed], backbone))
        return backbone.read(context, [text])

    assert torch.allclose(read([0, 1, 2]), read([2, 0, 1]), atol=1e-3)


def test_a_state_is_put_into_words(method: Compressor, ids: Tensor) -> None:
    one, other = compress(method, ids, ids[:9])
    together = method.verbalise([one, other], max_tokens=6)
    assert together == [method.verbalise([s], max_tokens=6)[0] for s in (one, other)]
    assert all(1 <= len(method.backbone.tokenize(text)) <= 8 for text in together)


@torch.no_grad()
def test_words_come_from_the_gists_alone(method: Compressor, ids: Tensor) -> None:
    [state] = compress(method, ids)
    hidden = replace(state, bias=torch.full_like(state.bias, -1e4))
    assert method.verbalise([state], 8) != method.verbalise([hidden], 8)


def test_precompute_stores_the_words(
    make_engine: Callable[..., GistEngine], passages: list[Passage]
) -> None:
    engine = make_engine("gist_coco", settings={"verbalise": 5})
    engine.precompute(passages[:2])
    keys = [GistKey(engine.space, p.content) for p in passages[:2]]
    texts = [entry.text for entry in engine.store.fetch(keys) if entry is not None]
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


def test_no_words_unless_asked_for(method: Compressor, ids: Tensor) -> None:
    assert compress(method, ids)[0].text is None
