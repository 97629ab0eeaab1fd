"""``quantise`` and ``dequantise``: the kernels equal the reference, which keeps its promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist_rag.store.codec import pack
from gist_rag.types import GistState
from gist_rag_kernels import PackedKV, dequantise, quantise
from gist_rag_kernels.kv_quant import reference
from gist_rag_kernels.kv_quant.packed import LARGEST, group_edges

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def a_state(
    counts: list[int], size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with loud channels, values with loud slots, some of both all zero; and rows."""
    total = sum(counts)
    rows = torch.tensor([0, *counts]).cumsum(0)
    keys = torch.randn(total, size) * torch.randn(size).exp()
    values = torch.randn(total, size) * torch.randn(total, 1).exp()
    keys[:, 1], values[total // 2] = 0, 0
    return keys.to(device, dtype), values.to(device, dtype), rows.to(device)


def assert_equal(ours: PackedKV, truth: PackedKV) -> None:
    for name in ("keys", "values", "key_scales", "value_scales"):
        mine, true = getattr(ours, name), getattr(truth, name)
        assert mine.dtype == true.dtype, name
        assert torch.equal(mine, true), name


def spread(scales: Tensor, lengths: Tensor) -> Tensor:
    return scales.repeat_interleave(lengths, 0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("size", "key_group", "value_group", "scale_dtype"),
    [
        (64, 0, 0, torch.bfloat16),
        (80, 4, 8, torch.float16),
        (96, 32, 48, torch.float32),
        (128, 2, 32, torch.bfloat16),
    ],
)
def test_integers_and_scales_equal_the_reference_bit_by_bit(
    bits: int,
    dtype: torch.dtype,
    size: int,
    key_group: int,
    value_group: int,
    scale_dtype: torch.dtype,
    device: torch.device,
) -> None:
    keys, values, rows = a_state([0, 5, 0, 1, 7], size, dtype, device)
    ours = quantise(
        keys,
        values,
        rows,
        bits,
        key_group=key_group,
        value_group=value_group,
        scale_dtype=scale_dtype,
    )
    truth = reference.quantise(
        keys, values, rows, bits, key_group, value_group or size, scale_dtype
    )
    assert_equal(ours, truth)
    for mine, true in zip(
        dequantise(ours), reference.dequantise(truth, torch.float32), strict=True
    ):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_come_back_in_the_asked_dtype(dtype: torch.dtype, device: torch.device) -> None:
    packed = quantise(*a_state([3, 4], 80, torch.float32, device), 4)
    for mine, true in zip(dequantise(packed, dtype), dequantise(packed), strict=True):
        assert mine.dtype == dtype
        # Triton's interpreter cuts to bfloat16 where a GPU rounds.
        assert torch.allclose(mine.float(), true, rtol=2 * ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale_dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("loud", [1.0, 1e4, 1e-6], ids=lambda x: f"x{x:g}")
def test_error_stays_within_the_stated_bound(
    implementation: str,
    bits: int,
    scale_dtype: torch.dtype,
    loud: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GIST_RAG_KERNELS", implementation)
    keys, values, rows = a_state([9, 0, 6], 64, torch.float32, device)
    keys, values = keys * loud, values * loud
    packed = quantise(
        keys, values, rows, bits, key_group=4, value_group=16, scale_dtype=scale_dtype
    )
    lengths = group_edges(rows, 4).diff()
    group = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    peaks = torch.stack([keys[group == g].abs().amax(0) for g in range(len(lengths))])[group]
    value_peaks = values.unflatten(1, (-1, 16)).abs().amax(2).repeat_interleave(16, 1)
    largest, tiny = LARGEST[bits], 6e-8 if scale_dtype == torch.float16 else 1e-38
    got_keys, got_values = dequantise(packed)
    for got, true, peak in ((got_keys, keys, peaks), (got_values, values, value_peaks)):
        bound = peak / largest * (1 + ROUNDING[scale_dtype]) / 2 + largest * tiny
        assert bool(((got - true).abs() <= bound * (1 + 1e-6)).all())


def test_eight_bits_are_those_of_the_codec(device: torch.device) -> None:
    keys, values, rows = a_state([4, 0, 9, 2], 16, torch.float32, device)
    state = GistState(
        keys.cpu(), values.cpu(), torch.zeros(15), torch.arange(15), rows.int().cpu(), 2, 15, 15
    )
    stored = pack(state, "int8").tensors
    ours = quantise(keys, values, rows)
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(getattr(ours, name).cpu(), stored[name]), name


def test_packing_of_four_bits_loses_nothing(device: torch.device) -> None:
    """All 15 integers, at both places in a byte, come back as they went in."""
    integers = torch.arange(-7, 8).repeat(2)[torch.randperm(30)].view(15, 2).repeat(1, 32)
    integers = integers[:, torch.randperm(64)].float().to(device)
    integers[0] = 7  # a peak in every channel, and below in every slot: all steps are one
    integers[:, 5] = 7
    packed = quantise(integers, integers, torch.tensor([0, 15], device=device), 4)
    assert packed.keys.shape == (15, 32)
    for got in dequantise(packed):
        assert torch.equal(got, integers)


def test_packing_is_stable(device: torch.device) -> None:
    """What was stored once is stored the same again."""
    packed = quantise(*a_state([5, 3], 64, torch.float32, device), 8)
    again = quantise(*dequantise(packed), packed.rows, 8)
    assert_equal(again, packed)


@pytest.mark.slow
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    half=st.integers(1, 70),
    bits=st.sampled_from([8, 4]),
    key_group=st.integers(0, 5),
    whole=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_any_shape_equals_the_reference(
    counts: list[int], half: int, bits: int, key_group: int, whole: bool
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = torch.tensor([0, *counts], device=device).cumsum(0)
    keys, values = torch.randn(2, sum(counts), 2 * half, device=device)
    group = 2 * half if whole else half
    ours = quantise(keys, values, rows, bits, key_group=key_group, value_group=group)
    truth = reference.quantise(keys, values, rows, bits, key_group, group, torch.bfloat16)
    assert_equal(ours, truth)
    ours.check()
    for mine, true in zip(
        dequantise(ours), reference.dequantise(truth, torch.float32), strict=True
    ):
        assert torch.equal(mine, true)


def test_views_are_read_as_they_look(device: torch.device) -> None:
    keys, values, rows = a_state([3, 2], 64, torch.float32, device)
    wide = torch.stack((keys, values), 2)
    assert_equal(quantise(wide[..., 0], wide[..., 1], rows), quantise(keys, values, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 64)}, "must both be"),
        ({"keys": torch.zeros(5, 63), "values": torch.zeros(5, 63)}, "D even"),
        ({"keys": torch.zeros(5, 64, dtype=torch.int8)}, "must be floats"),
        ({"rows": torch.zeros(0, dtype=torch.long)}, "rows"),
        ({"bits": 2}, "choose one of 8, 4"),
        ({"scale_dtype": torch.float64}, "scale_dtype"),
        ({"key_group": -1}, "key_group"),
        ({"value_group": 33}, "divide 32"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "keys": torch.zeros(5, 64),
        "values": torch.zeros(5, 64),
        "rows": torch.tensor([0, 5]),
    }
    with pytest.raises(ValueError, match=message):
        quantise(**{**given, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(5, 64)}, "one dtype"),
        ({"key_scales": None}, "need key_scales"),
        ({"key_scales": torch.zeros(3, 64)}, "3 key scales for 2 rows"),
        ({"key_scales": torch.zeros(2, 32)}, "key_scales"),
        ({"value_scales": torch.zeros(4)}, "value_scales"),
        ({"value_scales": torch.zeros(5, 3)}, "do not divide"),
        ({"value_scales": torch.zeros(5, 64, dtype=torch.float64)}, "value_scales"),
        ({"rows": torch.zeros(2, 2)}, "rows"),
        ({"keys": torch.zeros(5, 64), "values": torch.zeros(5, 64)}, "no scales"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    packed = quantise(*a_state([3, 2], 64, torch.float32, torch.device("cpu")))
    with pytest.raises(ValueError, match=message):
        dequantise(replace(packed, **change))
