"""Attention Matching: the fits are what their equations say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, compose
from gist_rag.compressors import make_compressor
from gist_rag.compressors.attention_matching import (
    MAX_MASS,
    MIN_MASS,
    REPEAT,
    Kept,
    Target,
    match,
    nonnegative_least_squares,
    refine,
    score,
)
from gist_rag.losses import distill
from gist_rag.types import GistState, Passage
from gist_rag_kernels import rotate


def attention_rows(rows: int, queries: int, keys: int) -> Tensor:
    """Softmax matrices ``(R, Q, T)`` as peaked as real ones."""
    return (3 * torch.randn(rows, queries, keys)).softmax(-1)


def test_masses_are_as_good_as_scipy_nnls() -> None:
    kept = attention_rows(12, 90, 60)[..., :20]
    ours = nonnegative_least_squares(kept.transpose(1, 2) @ kept, kept.sum(1))
    for a, w in zip(kept.double().numpy(), ours.double().numpy(), strict=True):
        _, best = nnls(a, np.ones(len(a)))
        assert (w >= 0).all()
        assert np.linalg.norm(a @ w - 1) <= best * 1.01 + 1e-3


def test_keeping_everything_changes_nothing() -> None:
    queries, keys, values = torch.randn(4, 50, 16), torch.randn(4, 12, 16), torch.randn(4, 12, 16)
    mass, fitted = match(
        queries, keys, values, torch.ones(4, 12, dtype=torch.bool), torch.ones(4, 50), 0.25
    )
    assert torch.allclose(mass, torch.ones(48), atol=1e-2)
    assert torch.allclose(fitted, values.flatten(0, 1), atol=1e-2)


def test_fitted_slots_stand_for_all_slots_better_than_plain_ones() -> None:
    """Over the queries, the fit brings output and attention mass closer to those of all slots."""
    queries, keys, values = torch.randn(6, 80, 16), torch.randn(6, 40, 16), torch.randn(6, 40, 16)
    attention = (queries @ keys.transpose(1, 2) * 0.25).softmax(-1)
    keep = torch.zeros(6, 40, dtype=torch.bool)
    keep.scatter_(1, attention.square().mean(1).topk(10).indices, True)
    mass, fitted = match(queries, keys, values, keep, torch.ones(6, 80), 0.25)

    target, part = attention @ values, attention[keep[:, None].expand(-1, 80, -1)]
    part = part.view(6, 80, 10)
    plain = part / part.sum(-1, keepdim=True) @ values[keep].view(6, 10, 16)
    weighted = part * mass.view(6, 1, 10)
    ours = weighted / weighted.sum(-1, keepdim=True) @ fitted.view(6, 10, 16)
    assert (ours - target).square().sum() < 0.7 * (plain - target).square().sum()
    assert (weighted.sum(-1) - 1).square().mean() < 0.2 * (part.sum(-1) - 1).square().mean()


def test_rows_that_keep_nothing_are_skipped() -> None:
    queries, keys, values = torch.randn(3, 20, 8), torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    keep = torch.zeros(3, 9, dtype=torch.bool)
    keep[1, 2:5] = True
    mass, fitted = match(queries, keys, values, keep, torch.ones(3, 20), 0.3)
    assert mass.shape == (3,)
    assert fitted.shape == (3, 8)


def test_chunking_does_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, values = torch.randn(7, 30, 8), torch.randn(7, 20, 8), torch.randn(7, 20, 8)
    keep = torch.rand(7, 20) > 0.6
    share = torch.rand(7, 30)
    whole = match(queries, keys, values, keep, share, 0.3)
    monkeypatch.setattr("gist_rag.compressors.attention_matching.CHUNK", 1)
    parts = match(queries, keys, values, keep, share, 0.3)
    assert torch.allclose(whole[0], parts[0], atol=1e-4)
    assert torch.allclose(whole[1], parts[1], atol=1e-4)


def test_scores_count_what_the_prefix_takes_away() -> None:
    queries, keys = torch.randn(2, 10, 8), torch.randn(2, 6, 8)
    alone, whole = score(queries, torch.zeros(2, 0, 8), keys, 0.3, "rms")
    beside, share = score(queries, queries[:, :1] * 10, keys, 0.3, "rms")
    assert torch.allclose(whole, torch.ones(2, 10))
    assert (beside <= alone + 1e-6).all()
    assert (share < 1).all()


def compress(backbone: Backbone, passage: Passage, **settings: object) -> GistState:
    with torch.no_grad():
        compressor = make_compressor("attention_matching", backbone, {"ratio": 4, **settings})
        return compressor.compress([backbone.tokenize(passage.text)])[0]


def test_one_budget_makes_heads_ragged(backbone: Backbone, passages: list[Passage]) -> None:
    lengths = compress(backbone, passages[0]).lengths
    assert len(lengths.unique()) > 1


@pytest.mark.parametrize(("budget", "groups"), [("layer", 3), ("head", 6)])
def test_a_budget_is_shared_by_its_group(
    backbone: Backbone, passages: list[Passage], budget: str, groups: int
) -> None:
    totals = compress(backbone, passages[0], budget=budget).lengths.view(groups, -1).sum(1)
    assert len(totals.unique()) == 1


def test_masses_stay_in_bounds(backbone: Backbone, passages: list[Passage]) -> None:
    bias = compress(backbone, passages[0]).bias
    assert float(bias.exp().min()) >= MIN_MASS * 0.999
    assert float(bias.exp().max()) <= MAX_MASS * 1.001


def test_fast_keeps_keys_and_values_as_they_are(
    backbone: Backbone, passages: list[Passage]
) -> None:
    state = compress(backbone, passages[0], preset="fast")
    with torch.no_grad():
        [full] = make_compressor("full", backbone).compress([backbone.tokenize(passages[0].text)])
    picked = state.row_of_slot() * full.num_tokens + state.offsets
    assert torch.equal(state.values, full.values[picked])
    assert torch.equal(state.keys, full.keys[picked])
    assert not state.bias.any()


def test_refined_slots_read_more_like_all_slots(backbone: Backbone) -> None:
    """Moved keys bring what unseen queries read closer to what all slots give."""
    rows, size = 4, backbone.head_dim
    shared = torch.randn(rows, 1, size)
    queries = (torch.randn(rows, 240, size) + shared) * size**-0.5  # they look to one side
    prefix = torch.randn(rows, 3, size), torch.randn(rows, 3, size)
    plain, values = torch.randn(rows, 24, size) + shared, torch.randn(rows, 24, size)
    cos, sin = backbone.rotary(torch.arange(24) + 3)
    keys = rotate(plain, cos, sin)
    seen, unseen = queries[:, :200], queries[:, 200:]
    keep = torch.zeros(rows, 24, dtype=torch.bool)
    keep[0, ::4], keep[1, ::3], keep[2, 5:7] = True, True, True  # ragged; the last row keeps none
    mass, fitted = match(seen, keys, values, keep, torch.ones(rows, 200), 1.0)
    before = Kept(plain[keep], fitted, mass.log())
    at = keep.nonzero()[:, 1]
    target = Target.of(seen, prefix, (keys, values))
    after = refine(before, keep, target, (cos[at], sin[at]), steps=60, lr=0.03)

    def error(kept: Kept) -> float:
        wanted = Target.of(unseen, prefix, (keys, values))
        total, first = 0.0, 0
        for row, count in enumerate(keep.sum(1).tolist()):
            part = slice(first, first + count)
            first += count
            if count:
                moved = rotate(kept.keys[part], cos[at[part]], sin[at[part]])
                logits = unseen[row] @ moved.T + kept.bias[part]
                read = torch.cat((wanted.prefix_mass[row], logits), -1).softmax(-1)[:, 1:]
                total += float(
                    (read @ kept.values[part] - wanted.output[row, :, :-1]).square().sum()
                )
        return total

    assert error(after) < 0.85 * error(before)


def test_refining_costs_no_step_when_none_is_asked_for(
    backbone: Backbone, passages: list[Passage]
) -> None:
    fitted = compress(backbone, passages[0], preset="balanced")
    same = compress(backbone, passages[0], preset="thorough", refine_steps=0)
    moved = compress(backbone, passages[0], preset="thorough", refine_steps=3)
    assert torch.equal(fitted.keys, same.keys)
    assert torch.equal(fitted.offsets, moved.offsets)
    assert not torch.allclose(fitted.keys, moved.keys, atol=1e-3)


def test_refining_through_the_model_brings_the_repeat_closer(
    backbone: Backbone, passages: list[Passage]
) -> None:
    """KL between repeating from everything and from the slots falls with refinement steps."""
    ids = backbone.tokenize(passages[0].text)
    request = backbone.tokenize(REPEAT + "<|im_end|>\n<|im_start|>assistant\n")
    before = backbone.tokenize("<|im_start|>user\n")

    @torch.no_grad()
    def logits(state: GistState) -> Tensor:
        slots = compose([[Placed(state, len(before))]], backbone)
        text = Local.after(torch.cat((request, ids)), len(before) + state.span, 1)
        return backbone.read(Context([backbone.prefix(before)], slots), [text])[:, len(request) :]

    with torch.no_grad():
        target = logits(make_compressor("full", backbone).compress([ids])[0])
    loss = lambda **s: float(distill(target, logits(compress(backbone, passages[0], **s))).mean())
    assert loss(preset="best", refine_steps=20, refine_lr=0.03) < 0.6 * loss()


def test_queries_that_look_elsewhere_do_not_count(backbone: Backbone) -> None:
    """A query without attention on the passage has no say in the fit."""
    queries, keys, values = torch.randn(2, 40, 8), torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[:, ::3] = True
    share = torch.ones(2, 40)
    share[:, 20:] = 0
    weighted = match(queries, keys, values, keep, share, 0.3)
    alone = match(queries[:, :20], keys, values, keep, torch.ones(2, 20), 0.3)
    assert torch.allclose(weighted[0], alone[0], atol=1e-2)
    assert torch.allclose(weighted[1], alone[1], atol=0.05)
