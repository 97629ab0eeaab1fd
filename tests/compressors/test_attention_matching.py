"""Attention Matching: what is kept, and what refining it brings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, compose
from gist_rag.compressors import make_compressor
from gist_rag.compressors.attention_matching import (
    MAX_MASS,
    MIN_MASS,
    Kept,
    refine,
)
from gist_rag.compressors.repeat import REPEAT, Target
from gist_rag.losses import distill
from gist_rag.types import GistState, Passage
from gist_rag_kernels import fit_slots, rotate


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
    mass, fitted = fit_slots(
        seen, keys, values, keep, torch.ones(rows, 200), 1.0, masses=(MIN_MASS, MAX_MASS)
    )
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
