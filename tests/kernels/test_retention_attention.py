"""``retention_attention``: the kernels equal a dense bias, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from gist_rag_kernels import retention_attention
from gist_rag_kernels.retention_attention import kernel, reference

# Triton's interpreter cuts to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that tiny inputs have several."""
    if not torch.cuda.is_available():
        small = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(kernel, "_tile", lambda *_: dict(small))


def tensors(
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 1,
    group: int = 2,
    size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query and gradient as a model has them (views of ``(B, Q, Hq, D)``), between them key, value
    and log beta: some keys fade at once, some hardly ever."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, grad = torch.randn(2, batch, queries, heads * group, size).to(device, dtype)
    key, value = torch.randn(2, batch, keys, heads, size).to(device, dtype).transpose(2, 3)
    log_beta = logsigmoid(3 + 3 * torch.randn(batch, heads, keys, device=device))
    return [query.transpose(1, 2), key, value, log_beta, grad.transpose(1, 2)]


def results(attention: object, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients; ``log_beta`` stays in float32."""
    *inputs, grad = given
    leaves = [t.detach().to(dtype) for t in inputs[:3]] + [inputs[3].detach()]
    leaves = [t.requires_grad_() for t in leaves]
    out = attention(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def agree(given: list[Tensor]) -> None:
    dtype, scaling = given[0].dtype, given[0].shape[3] ** -0.5
    truth = results(lambda *t: reference.retention_attention(*t, scaling), given, torch.float32)
    for mine, true in zip(results(retention_attention, given, dtype), truth, strict=True):
        assert mine.shape == true.shape
        largest = float(true.abs().max().clamp(min=1.0))
        assert float((mine.float() - true).abs().max()) <= TOLERANCE[dtype] * largest


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 64),
        (torch.float16, 80),
        (torch.bfloat16, 96),
        (torch.bfloat16, 128),
    ],
    ids=str,
)
def test_kernels_equal_a_dense_bias(dtype: torch.dtype, size: int) -> None:
    agree(tensors(24, 24, group=1, size=size, dtype=dtype))


@pytest.mark.parametrize(("heads", "group"), [(3, 1), (2, 2), (1, 8)])
def test_query_heads_of_a_group_share_keys_and_decay(heads: int, group: int) -> None:
    agree(tensors(12, 20, batch=2, heads=heads, group=group, size=16))


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 40), (16, 16), (17, 33), (33, 33), (3, 80)], ids=str
)
def test_queries_are_the_last_of_the_keys(queries: int, keys: int) -> None:
    agree(tensors(queries, keys, group=1, size=16))


@settings(max_examples=5, deadline=None)
@given(
    queries=st.integers(1, 36),
    before=st.integers(0, 36),
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_shape(queries: int, before: int, batch: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    agree(tensors(queries, queries + before, batch=batch, group=group, size=16))


def test_without_decay_it_is_causal_attention() -> None:
    query, key, value, log_beta, _ = tensors(20, 20, group=1)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    ours = retention_attention(query, key, value, torch.zeros_like(log_beta))
    assert torch.allclose(ours, plain, atol=1e-5)


def test_a_key_weighs_beta_to_the_power_of_its_age() -> None:
    """Two equal logits, ages 1 and 0: the older key weighs beta against 1."""
    query, key, value, _, _ = tensors(2, 2, group=1, size=16)
    log_beta = torch.tensor([[[0.25, 0.5]]], device=query.device).log()
    out = retention_attention(query, torch.zeros_like(key), value, log_beta)
    assert torch.allclose(out[0, 0, 0], value[0, 0, 0], atol=1e-6)
    assert torch.allclose(out[0, 0, 1], (0.25 * value[0, 0, 0] + value[0, 0, 1]) / 1.25, atol=1e-6)


def test_far_offsets_keep_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are taken before they are multiplied: ``t log beta`` alone has lost the small digits."""
    wide = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernel, "_tile", lambda *_: dict(wide))
    query, key, value, log_beta, _ = tensors(2, 4000, group=1, size=16)
    log_beta = -1 - torch.rand_like(log_beta)
    ours = retention_attention(query, key, value, log_beta)
    recent = [t[:, :, -99:].double() for t in (key, value, log_beta)]
    age = torch.arange(97, 99, device=key.device)[:, None] - torch.arange(99, device=key.device)
    logits = query.double() @ recent[0].mT / 4 + age * recent[2][:, :, None]
    truth = logits.masked_fill(age < 0, -torch.inf).softmax(-1) @ recent[1]
    assert float((ours - truth).abs().max()) < 5e-6


def test_later_keys_are_not_seen() -> None:
    query, key, value, log_beta, _ = tensors(20, 20, group=1, size=16)
    before = retention_attention(query, key, value, log_beta)
    key[:, :, 15:], value[:, :, 15:], log_beta[:, :, 15:] = 7.0, 7.0, -0.1
    after = retention_attention(query, key, value, log_beta)
    assert torch.equal(before[:, :, :15], after[:, :, :15])
    assert not torch.allclose(before[:, :, 15:], after[:, :, 15:])


def test_nothing_asked_is_nothing_returned() -> None:
    out, *gradients = results(retention_attention, tensors(0, 5), torch.float32)
    assert out.shape == (1, 2, 0, 32)
    assert all(not bool(g.any()) for g in gradients)


def test_results_repeat_bit_by_bit() -> None:
    given = tensors(20, 40, size=16)
    once, again = (results(retention_attention, given, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_misshapen_inputs_are_refused() -> None:
    query, key, value, log_beta, _ = tensors(9, 9, heads=2)
    with pytest.raises(ValueError, match="does not fit"):
        retention_attention(query, key[:, :, 1:], value[:, :, 1:], log_beta[:, :, 1:])
    with pytest.raises(ValueError, match="no multiple"):
        retention_attention(query[:, :3], key, value, log_beta)
    with pytest.raises(ValueError, match="must be"):
        retention_attention(query, key, value[:, :1], log_beta)
    with pytest.raises(ValueError, match="float16"):
        retention_attention(query.half(), key, value, log_beta)
    with pytest.raises(ValueError, match="log_beta"):
        retention_attention(query, key, value, log_beta[:, :1])
