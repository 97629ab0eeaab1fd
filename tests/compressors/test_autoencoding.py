"""``autoencoding``: every gist spells out its own tokens, and what context alone tells counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.compressors.autoencoding import Autoencoding
from gist_rag.compressors.base import Answers, Compressor, Lesson
from gist_rag.layout import Layout
from gist_rag.losses import cross_entropy, token_importance


@pytest.fixture
def method(backbone: Backbone, taught: Callable[[Compressor], Compressor]) -> Autoencoding:
    made = taught(make_compressor("autoencoding", backbone, {"ratio": 4.0, "decoder_width": 32}))
    assert isinstance(made, Autoencoding)
    return made


def test_mask(method: Autoencoding, ids: Tensor, drawn: Callable[[Layout], str]) -> None:
    """Causal throughout: a a a a g b b b b g."""
    layout = method.layout(ids[:8])
    assert drawn(layout) == "\n".join("x" * n for n in range(1, 11))
    assert layout.source.tolist() == [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]
    assert layout.position.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
    paper = make_compressor("autoencoding", method.backbone, {"ratio": 4.0, "positions": "paper"})
    assert paper.layout(ids[:8]).is_causal


def test_later_tokens_reach_no_earlier_gist(
    method: Autoencoding, unchanged: Callable[..., list[int]]
) -> None:
    assert unchanged(method, [20]) == [0, 1, 2, 3, 4]


def test_a_passage_takes_one_position_per_gist(method: Autoencoding, ids: Tensor) -> None:
    [state] = method.compress([ids])
    assert state.span == len(ids) / 4
    assert state.offsets.unique().tolist() == list(range(12))


@torch.no_grad()
def test_the_decoder_reads_one_gist_and_only_earlier_tokens(method: Autoencoding) -> None:
    backbone = method.backbone
    shape = (2, backbone.num_layers, backbone.num_heads, backbone.head_dim)
    keys, values = torch.randn(2, *shape)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    base = method.decoder(keys, values, ids)
    other = ids.clone()
    other[0, 2] = 99
    changed = method.decoder(keys, values, other)
    assert torch.allclose(changed[0, :3], base[0, :3], atol=1e-5)
    assert not torch.allclose(changed[0, 3], base[0, 3], atol=1e-3)
    values = values.clone()
    values[0, 0] += 1.0
    changed = method.decoder(keys, values, ids)
    assert torch.allclose(changed[1], base[1], atol=1e-5)
    assert not torch.allclose(changed[0], base[0], atol=1e-3)


def test_spelling_out_teaches_the_gists(method: Autoencoding, ids: Tensor) -> None:
    method.reconstruction(method.compress([ids, ids[:9]]), [ids, ids[:9]]).backward()  # type: ignore[no-untyped-call]
    assert method.gists.grad is not None
    assert float(method.gists.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in method.backbone.model.parameters())


def test_reconstruction_learns(
    method: Autoencoding, ids: Tensor, lowers: Callable[..., bool]
) -> None:
    assert lowers(method, lambda: method.reconstruction(method.compress([ids]), [ids]))


def test_importance_is_high_where_the_context_tells() -> None:
    full, closed = torch.zeros(3, 4), torch.zeros(3, 4)
    full[0, 1] = 9.0  # known from the context only: cut at gamma
    full[1, 1] = closed[1, 1] = 9.0  # known anyway
    full[2, 0] = closed[2, 1] = 9.0  # the context misleads
    weights = token_importance(full, closed, torch.ones(3, dtype=torch.long), gamma=1.0)
    assert weights[0].log() == pytest.approx(1.0)
    assert weights[1] == pytest.approx(1.0)
    assert weights[2] < 0.01


def test_importance_weighs_the_answer(method: Autoencoding, ids: Tensor) -> None:
    """With a teacher that knows only the first token, only the first token counts."""
    student, closed, teacher = torch.randn(2, 40), torch.zeros(2, 40), torch.zeros(2, 40)
    teacher[0, 7], teacher[1, 3] = 50.0, 50.0
    answers = Answers(
        student=student,
        teacher=teacher,
        targets=torch.tensor([7, 7]),
        weights=torch.tensor([0.5, 0.5]),
        closed=closed,
    )
    losses = method.answer_losses(answers)
    assert float(losses["ce"]) == pytest.approx(
        float(cross_entropy(student[:1], answers.targets[:1])), rel=1e-4
    )
    of_passages = method.passage_losses(Lesson([ids], torch.empty(0), method.compress([ids])))
    assert {*losses, *of_passages} == set(method.loss_weights)
