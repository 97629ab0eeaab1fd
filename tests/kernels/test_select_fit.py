"""``select_fit``: the kernels equal the softmax that they never hold; the fits are what their
equations say."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from gist_rag_kernels import fit_slots, score_keys
from gist_rag_kernels.select_fit import kernel, reference

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
fit = functools.partial(fit_slots, masses=(1e-4, 1e3))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that tiny inputs have several."""
    if not torch.cuda.is_available():
        small = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(kernel, "_tile", lambda *_: dict(small))


def tensors(
    rows: int, queries: int, prefix: int, keys: int, size: int, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, prefix and keys; attention is as peaked as a model's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        (factor * torch.randn(rows, n, size)).to(device, dtype)
        for n, factor in ((queries, 3.0), (prefix, 1.0), (keys, 1.0))
    ]


def agree(
    rows: int = 2,
    queries: int = 40,
    prefix: int = 5,
    keys: int = 21,
    size: int = 32,
    dtype: torch.dtype = torch.float32,
    how: str = "rms",
) -> None:
    given = tensors(rows, queries, prefix, keys, size, dtype)
    ours = score_keys(*given, size**-0.5, how)  # type: ignore[arg-type]
    truth = reference.score_keys(*(t.float() for t in given), size**-0.5, how)
    for mine, true in zip(ours, truth, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == true.shape
        assert bool(((mine - true).abs() <= TOLERANCE[dtype]).all())


@pytest.mark.parametrize("how", ["rms", "max"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 64),
        (torch.float16, 80),
        (torch.bfloat16, 96),
        (torch.float32, 128),
        (torch.bfloat16, 128),
    ],
    ids=str,
)
def test_kernels_equal_the_whole_softmax(dtype: torch.dtype, size: int, how: str) -> None:
    agree(size=size, dtype=dtype, how=how)


@pytest.mark.parametrize(
    ("queries", "prefix", "keys"),
    [(1, 0, 1), (1, 1, 1), (16, 16, 16), (17, 0, 33), (50, 40, 1), (3, 2, 0)],
    ids=str,
)
def test_single_full_and_empty_blocks(queries: int, prefix: int, keys: int) -> None:
    agree(queries=queries, prefix=prefix, keys=keys)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 3),
    queries=st.integers(1, 40),
    prefix=st.integers(0, 20),
    keys=st.integers(0, 40),
    how=st.sampled_from(["rms", "max"]),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, queries: int, prefix: int, keys: int, how: str, seed: int) -> None:
    torch.manual_seed(seed)
    agree(rows, queries, prefix, keys, size=16, how=how)


def test_logits_far_apart_do_not_overflow() -> None:
    """Logits around 1e4, where a sum of plain exponentials is infinite."""
    queries, prefix, keys = tensors(1, 20, 3, 18, 16, torch.float32)
    ours = score_keys(queries * 1e2, prefix, keys * 1e2, 0.25)
    truth = reference.score_keys(queries * 1e2, prefix, keys * 1e2, 0.25, "rms")
    for mine, true in zip(ours, truth, strict=True):
        assert bool(mine.isfinite().all())
        assert torch.allclose(mine, true, atol=2e-3)


def test_views_are_read_where_they_lie() -> None:
    queries, prefix, keys = tensors(2, 40, 5, 21, 16, torch.float32)
    thinned = score_keys(queries[:, ::2], prefix[:, 1:], keys.mT.contiguous().mT, 0.25)
    packed = score_keys(queries[:, ::2].contiguous(), prefix[:, 1:].contiguous(), keys, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(thinned, packed, strict=True))


def test_with_gradients_the_reference_runs() -> None:
    queries, prefix, keys = tensors(1, 9, 2, 7, 16, torch.float32)
    scores, _ = score_keys(queries, prefix, keys.requires_grad_(), 0.25)
    scores.sum().backward()  # type: ignore[no-untyped-call]
    assert keys.grad is not None
    assert bool(keys.grad.isfinite().all())


def test_misshapen_inputs_are_refused() -> None:
    queries, prefix, keys = tensors(2, 9, 2, 7, 16, torch.float32)
    with pytest.raises(ValueError, match="must be"):
        score_keys(queries, prefix[:1], keys, 0.25)
    with pytest.raises(ValueError, match="float16"):
        score_keys(queries, prefix, keys.half(), 0.25)
    with pytest.raises(ValueError, match="at least one"):
        score_keys(queries[:, :0], prefix, keys, 0.25)
    with pytest.raises(ValueError, match="'mean'"):
        score_keys(queries, prefix, keys, 0.25, "mean")  # type: ignore[arg-type]


def attention_rows(rows: int, queries: int, keys: int) -> Tensor:
    """Softmax matrices ``(R, Q, T)`` as peaked as real ones."""
    return (3 * torch.randn(rows, queries, keys)).softmax(-1)


def test_masses_are_as_good_as_scipy_nnls() -> None:
    kept = attention_rows(12, 90, 60)[..., :20]
    ours = reference.nonnegative_least_squares(kept.transpose(1, 2) @ kept, kept.sum(1))
    for a, w in zip(kept.double().numpy(), ours.double().numpy(), strict=True):
        _, best = nnls(a, np.ones(len(a)))
        assert (w >= 0).all()
        assert np.linalg.norm(a @ w - 1) <= best * 1.01 + 1e-3


def test_keeping_everything_changes_nothing() -> None:
    queries, keys, values = torch.randn(4, 50, 16), torch.randn(4, 12, 16), torch.randn(4, 12, 16)
    mass, fitted = fit(
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
    mass, fitted = fit(queries, keys, values, keep, torch.ones(6, 80), 0.25)

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
    mass, fitted = fit(queries, keys, values, keep, torch.ones(3, 20), 0.3)
    assert mass.shape == (3,)
    assert fitted.shape == (3, 8)


def test_chunking_does_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(7, 30, 8), torch.randn(7, 20, 8), torch.randn(7, 20, 8)
    keep = torch.rand(7, 20) > 0.6
    share = torch.rand(7, 30)
    whole = fit(queries, keys, values, keep, share, 0.3)
    monkeypatch.setattr(reference, "CHUNK", 1)
    parts = fit(queries, keys, values, keep, share, 0.3)
    # how a batch is cut decides how its sums are rounded, and what is hardly determined shows it
    assert torch.allclose(whole[0], parts[0], atol=2e-3)
    assert torch.allclose(whole[1], parts[1], atol=2e-2)


def test_scores_count_what_the_prefix_takes_away() -> None:
    queries, keys = torch.randn(2, 10, 8), torch.randn(2, 6, 8)
    alone, whole = score_keys(queries, torch.zeros(2, 0, 8), keys, 0.3, "rms")
    beside, share = score_keys(queries, queries[:, :1] * 10, keys, 0.3, "rms")
    assert torch.allclose(whole, torch.ones(2, 10))
    assert (beside <= alone + 1e-6).all()
    assert (share < 1).all()


def test_queries_that_look_elsewhere_do_not_count() -> None:
    """A query without attention on the passage has no say in the fit."""
    queries, keys, values = torch.randn(2, 40, 8), torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[:, ::3] = True
    share = torch.ones(2, 40)
    share[:, 20:] = 0
    weighted = fit(queries, keys, values, keep, share, 0.3)
    alone = fit(queries[:, :20], keys, values, keep, torch.ones(2, 20), 0.3)
    assert torch.allclose(weighted[0], alone[0], atol=1e-2)
    assert torch.allclose(weighted[1], alone[1], atol=0.05)
