"""``compose_kv`` and ``compose_packed``: the kernels equal the reference, backwards too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compose import Placed, compose
from gist_rag.types import GistState
from gist_rag_kernels import Composed, PackedKV, compose_kv, compose_packed, dequantise
from gist_rag_kernels.compose_kv import reference
from gist_rag_kernels.kv_quant import reference as kv_quant

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [64, 80, 96, 128]
# Triton's interpreter cuts to bfloat16 where a GPU rounds, hence one whole unit of that.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(ours: Tensor | None, truth: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    if ours is None or truth is None:
        return ours is truth
    tolerance = TOLERANCE[dtype]
    return ours.dtype == truth.dtype and torch.allclose(
        ours.float(), truth.float(), atol=tolerance, rtol=tolerance, equal_nan=True
    )


def tables(
    positions: int, size: int, device: torch.device, *, alike: bool = False
) -> tuple[Tensor, Tensor]:
    """Cos and sin ``(positions, size)``; the halves of a head differ unless they are ``alike``."""
    angles = torch.arange(positions)[:, None] * torch.rand(size)
    if alike:
        angles = torch.cat((angles[:, : size // 2],) * 2, 1)
    return angles.cos().to(device), angles.sin().to(device)


def floats(
    slots: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, and cos and sin whose halves differ."""
    keys, values = torch.randn(2, slots, size).to(device, dtype)
    cos, sin = torch.randn(2, slots, size).to(device)
    return keys, values, cos, sin


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spare", [0, 5], ids=["full", "with gaps"])
def test_slots_and_gradients_equal_the_reference(
    dtype: torch.dtype, size: int, spare: int, device: torch.device
) -> None:
    slots = 19
    inputs = floats(slots, size, dtype, device)
    destination = torch.randperm(slots + spare)[:slots].to(device)
    results = []
    for function in (compose_kv, reference.compose_kv):
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        out = function(*leaves, *inputs[2:], destination, slots + spare)
        weights = torch.randn(2, slots + spare, size, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(
            sum((o * w.to(o)).sum() for o, w in zip(out, weights, strict=True)), leaves
        )
        results.append([*out, *grads])
    for mine, true in zip(*results, strict=True):
        assert close(mine, true, dtype)


def test_a_gradient_of_keys_alone_is_that_of_the_reference(device: torch.device) -> None:
    keys, values, cos, sin = floats(3, 64, torch.float32, device)
    grads = []
    for function in (compose_kv, reference.compose_kv):
        leaf = keys.clone().requires_grad_()
        out, _ = function(leaf, values, cos, sin, torch.tensor([4, 0, 2], device=device), 5)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert close(*grads)


def test_inverse_rotation_undoes_the_rotation(device: torch.device) -> None:
    """For a true rotation, the gradient of a slot's keys with respect to itself is the key."""
    keys, values, *_ = floats(4, 64, torch.float32, device)
    cos, sin = tables(4, 64, device, alike=True)
    leaf = keys.clone().requires_grad_()
    out, _ = compose_kv(leaf, values, cos, sin, torch.arange(4, device=device), 4)
    assert close(torch.autograd.grad(out, leaf, out.detach())[0], keys)


@pytest.mark.parametrize("slots", [0, 1, 16, 17])
def test_any_number_of_slots(slots: int, device: torch.device) -> None:
    inputs = floats(slots, 64, torch.float32, device)
    destination = torch.randperm(20)[:slots].to(device)
    ours = compose_kv(*inputs, destination, 20)
    for mine, true in zip(ours, reference.compose_kv(*inputs, destination, 20), strict=True):
        assert close(mine, true)


def test_views_are_read_as_they_look(device: torch.device) -> None:
    keys, values, cos, sin = floats(6, 64, torch.float32, device)
    destination = torch.randperm(6).to(device)
    wide = torch.stack((keys, values), 2)
    ours = compose_kv(wide[..., 0], wide[..., 1], cos[:1].expand(6, -1), sin, destination, 6)
    truth = reference.compose_kv(keys, values, cos[:1].expand(6, -1), sin, destination, 6)
    assert all(close(mine, true) for mine, true in zip(ours, truth, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 64)}, r"must be \(M, D\)"),
        ({"destination": torch.arange(4)}, r"must be \(M, D\)"),
        ({"cos": torch.zeros(5, 32)}, "cos"),
        ({"values": torch.zeros(5, 64, dtype=torch.half)}, "one float dtype"),
        ({"num_slots": 4}, "do not fit"),
        ({n: torch.zeros(5, 3) for n in ("keys", "values", "cos", "sin")}, "even"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    zeros = {n: torch.zeros(5, 64) for n in ("keys", "values", "cos", "sin")}
    given: dict[str, Any] = {**zeros, "destination": torch.arange(5), "num_slots": 5}
    with pytest.raises(ValueError, match=message):
        compose_kv(**{**given, **change})


# --- packed gists -----------------------------------------------------------------------------


class Prompt:
    """Passages with their packed gists, one cache row per (layer, head), one after the other."""

    def __init__(
        self,
        lengths: list[list[int]],
        size: int,
        bits: int,
        device: torch.device,
        *,
        key_group: int = 0,
        value_group: int = 0,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        counts = torch.tensor(lengths)  # (P, rows of one passage)
        self.lengths, self.size, self.device = counts, size, device
        total = int(counts.sum())
        rows = torch.cat((torch.zeros(1, dtype=torch.long), counts.flatten().cumsum(0)))
        keys, values = torch.randn(2, total, size, device=device)
        rows = rows.to(device, torch.int32)
        self.packed = (
            PackedKV(keys.bfloat16(), values.bfloat16(), rows)
            if bits == 16
            else kv_quant.quantise(
                keys, values, rows, bits, key_group, value_group or size, scale_dtype
            )
        )
        self.offsets = torch.randint(0, 20, (total,), dtype=torch.int16, device=device)
        self.base = torch.randint(0, 30, (len(counts),), device=device)
        self.bias = torch.randn(total, device=device).half()
        self.order = torch.arange(len(counts), device=device) + 3
        self.cos, self.sin = tables(50, size, device)

        before = counts.cumsum(0) - counts
        self.width = int(counts.sum(0).max()) + 2
        starts = torch.arange(counts.shape[1]) * self.width
        self.destination = (starts + before).flatten().to(device)
        self.num_slots = counts.shape[1] * self.width
        room = counts.clone()
        room[-1] = self.width - before[-1]
        self.room = room.flatten().to(device)

    def arguments(self, **change: Any) -> dict[str, Any]:
        names = ("packed", "offsets", "base", "cos", "sin", "destination", "num_slots")
        given = {n: getattr(self, n) for n in (*names, "bias", "order")}
        return {"dtype": torch.float32, **given, **change}


def by_reference(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Composed:
    with monkeypatch.context() as patch:
        patch.setenv("GIST_RAG_KERNELS", "reference")
        return compose_packed(**arguments)


def assert_same(ours: Composed, truth: Composed, dtype: torch.dtype = torch.float32) -> None:
    for name, mine, true in zip(Composed._fields, ours, truth, strict=True):
        assert close(mine, true, dtype if name in ("keys", "values") else torch.float32), name


RAGGED = [[3, 0, 17], [0, 0, 0], [1, 2, 0], [0, 5, 1]]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("size", "key_group", "value_group", "scale_dtype"),
    [
        (64, 0, 0, torch.bfloat16),
        (80, 2, 8, torch.float16),
        (96, 0, 48, torch.float32),
        (128, 4, 32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("filled", [False, True], ids=["cleared", "by room"])
def test_packed_gists_equal_the_reference(
    bits: int,
    size: int,
    key_group: int,
    value_group: int,
    scale_dtype: torch.dtype,
    filled: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = {"key_group": key_group, "value_group": value_group, "scale_dtype": scale_dtype}
    prompt = Prompt(RAGGED, size, bits, device, **groups)
    given = prompt.arguments(room=prompt.room if filled else None)
    ours = compose_packed(**given)
    assert_same(ours, by_reference(given, monkeypatch))
    assert not bool(ours.keys.isnan().any())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packed_gists_are_the_same_as_unpacked_ones(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Second route: dequantise, look angles up, destinations slot by slot, ``compose_kv``."""
    prompt = Prompt(RAGGED, 64, 8, device)
    keys, values = dequantise(prompt.packed)
    lengths = prompt.lengths.flatten()
    passage = torch.arange(4).repeat_interleave(prompt.lengths.sum(1)).to(device)
    position = prompt.base[passage] + prompt.offsets
    slots = [
        int(start) + i
        for start, count in zip(prompt.destination, lengths, strict=True)
        for i in range(int(count))
    ]
    destination = torch.tensor(slots, device=device)
    angles = prompt.cos[position], prompt.sin[position]
    truth = reference.compose_kv(keys, values, *angles, destination, prompt.num_slots)
    ours = compose_packed(**prompt.arguments(dtype=dtype))
    assert close(ours.keys, truth[0].to(dtype), dtype)
    assert close(ours.values, truth[1].to(dtype), dtype)
    assert ours.bias is not None
    assert ours.order is not None
    assert torch.equal(ours.bias[destination], prompt.bias.float())
    assert int(ours.bias.isfinite().sum()) == len(slots)
    assert torch.equal(ours.order[destination], prompt.order[passage])


@pytest.mark.parametrize("bits", [8, 4])
def test_half_tables_serve_as_well(bits: int, device: torch.device) -> None:
    prompt = Prompt([[2, 3]], 64, bits, device)
    prompt.cos, prompt.sin = tables(50, 64, device, alike=True)
    cos, sin = prompt.cos[:, :32].clone(), prompt.sin[:, :32].clone()
    half = compose_packed(**prompt.arguments(cos=cos, sin=sin))
    assert_same(half, compose_packed(**prompt.arguments()))


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=str)
def test_a_paged_cache_holds_the_same_slots(
    bits: int, table_dtype: torch.dtype, device: torch.device
) -> None:
    """Pages anywhere in a larger buffer; what the block table does not name stays untouched."""
    prompt = Prompt(RAGGED, 64, bits, device)
    page, pages = 4, 40
    per_row = -(-prompt.width // page)
    rows = prompt.lengths.shape[1]
    table = torch.randperm(pages)[: rows * per_row].view(rows, per_row).to(device, table_dtype)
    row = torch.arange(rows, device=device).repeat(len(RAGGED))
    local = prompt.destination - row * prompt.width
    buffer = Composed(
        keys=torch.full((pages * page, 64), torch.nan, device=device),
        values=torch.full((pages * page, 64), torch.nan, device=device),
        bias=torch.full((pages * page,), torch.nan, device=device),
        order=torch.full((pages * page,), -1, dtype=torch.int32, device=device),
    )
    flat = compose_packed(**prompt.arguments())
    paged = compose_packed(
        **prompt.arguments(
            destination=row * per_row * page + local,
            block_table=table,
            page_size=page,
            num_slots=None,
            out=buffer,
        )
    )
    assert paged is buffer
    filled = torch.zeros(pages * page, dtype=torch.bool, device=device)
    for r in range(rows):
        used = int(prompt.lengths[:, r].sum())
        slot = torch.arange(used, device=device)
        place = table[r, slot // page].long() * page + slot % page
        filled[place] = True
        for name in Composed._fields:
            theirs = getattr(flat, name)[r * prompt.width : r * prompt.width + used]
            assert torch.equal(getattr(paged, name)[place], theirs.to(getattr(paged, name))), name
    assert bool(paged.keys[~filled].isnan().all())
    assert bool((paged.order[~filled] == -1).all())


@pytest.mark.parametrize(
    "lengths", [[[1]], [[0, 0]], [[0, 0], [0, 3]], [[40]]], ids=["one", "none", "empty", "long"]
)
def test_extreme_lengths(
    lengths: list[list[int]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt(lengths, 64, 8, device)
    for room in (None, prompt.room):
        given = prompt.arguments(room=room)
        assert_same(compose_packed(**given), by_reference(given, monkeypatch))


def test_a_position_beyond_the_tables_shows_as_nan(device: torch.device) -> None:
    prompt = Prompt([[2, 2]], 64, 8, device)
    prompt.offsets[1], prompt.base[0] = 49, 1
    ours = compose_packed(**prompt.arguments())
    bad = ours.keys.isnan().any(1)
    assert bad.tolist() == [False, True, *[False] * (prompt.num_slots - 2)]


def test_long_offsets_and_far_positions(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions beyond 16 bits, given in any integer dtype."""
    prompt = Prompt([[3, 1]], 64, 8, device)
    prompt.cos, prompt.sin = tables(70_000, 64, device)
    prompt.base[0] = 20_000
    given = prompt.arguments(
        offsets=torch.tensor([0, 49_999, 40_000, 7], dtype=torch.int32, device=device)
    )
    assert_same(compose_packed(**given), by_reference(given, monkeypatch))


def test_slots_beyond_32_bits(device: torch.device) -> None:
    """The last slots of a buffer of more than 2**31 numbers; the system gives no page untouched."""
    slots, size = 2**24 + 8, 128
    if device.type == "cuda":
        keys, values = torch.zeros(2, slots, size, dtype=torch.half, device=device)
    else:
        keys, values = (torch.from_numpy(np.zeros((slots, size), np.float16)) for _ in range(2))
    prompt = Prompt([[2]], size, 4, device)
    near = compose_packed(**prompt.arguments(bias=None, order=None, dtype=torch.half))
    compose_packed(
        **prompt.arguments(
            destination=prompt.destination + slots - 2,
            num_slots=None,
            out=Composed(keys, values, None, None),
            bias=None,
            order=None,
        )
    )
    assert torch.equal(keys[-2:], near.keys[:2])
    assert torch.equal(values[-2:], near.values[:2])
    assert not bool(keys[:8].any())


@pytest.mark.slow
@given(
    lengths=st.integers(1, 3).flatmap(
        lambda rows: st.lists(
            st.lists(st.integers(0, 9), min_size=rows, max_size=rows), min_size=1, max_size=3
        )
    ),
    half=st.integers(1, 40),
    bits=st.sampled_from([16, 8, 4]),
    filled=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_equals_the_reference(
    lengths: list[list[int]], half: int, bits: int, filled: bool
) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompt = Prompt(lengths, 2 * half, bits, device)
    given = prompt.arguments(room=prompt.room if filled else None)
    with pytest.MonkeyPatch.context() as patch:
        truth = by_reference(given, patch)
    assert_same(compose_packed(**given), truth)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_large_prompt_equals_the_reference(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten passages at the shape of an 8B Llama, too many programs for the interpreter."""
    lengths = torch.randint(0, 64, (10, 256)).tolist()
    prompt = Prompt(lengths, 128, bits, torch.device("cuda"))
    for room in (None, prompt.room):
        given = prompt.arguments(room=room, dtype=torch.bfloat16)
        assert_same(compose_packed(**given), by_reference(given, monkeypatch), torch.bfloat16)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"offsets": torch.zeros(3, dtype=torch.int16)}, "offsets"),
    ({"base": torch.zeros(4, dtype=torch.long)}, "divide 6 rows"),
    ({"destination": torch.zeros(5, dtype=torch.long)}, "destination"),
    ({"room": torch.zeros(5, dtype=torch.long)}, "room"),
    ({"cos": torch.zeros(50, 16)}, "cos"),
    ({"cos": torch.zeros(50, 64).double()}, "float32"),
    ({"bias": torch.zeros(3)}, "bias"),
    ({"order": torch.zeros(3)}, "order"),
    ({"page_size": 4}, "go together"),
    ({"block_table": torch.zeros(4, dtype=torch.int32)}, "go together"),
    ({"num_slots": None}, "either num_slots or out"),
    ({"out": Composed(torch.zeros(9, 64), torch.zeros(9, 64), None, None)}, "either num_slots"),
    (
        {"out": Composed(torch.zeros(9, 64), torch.zeros(8, 64), None, None), "num_slots": None},
        "out.values",
    ),
    (
        {"out": Composed(torch.zeros(9, 64), torch.zeros(9, 64), None, None), "num_slots": None},
        "out.bias",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[",".join(c) for c, _ in WRONG])
def test_wrong_packed_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    prompt = Prompt([[1, 0, 2], [2, 1, 0]], 64, 8, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        compose_packed(**prompt.arguments(**change))


def test_scales_that_do_not_fit_are_refused() -> None:
    prompt = Prompt([[1, 2]], 64, 8, torch.device("cpu"))
    packed = replace(prompt.packed, key_scales=torch.zeros(3, 64))
    with pytest.raises(ValueError, match="3 key scales for 2 rows"):
        compose_packed(**prompt.arguments(packed=packed))


def test_a_prompt_is_composed_alike_by_both(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own ``compose``, ragged states and an empty prompt in the batch."""
    states = []
    for lengths in ([3, 0, 1, 4, 2, 0], [0, 5, 2, 1, 0, 3]):
        total = sum(lengths)
        states.append(
            GistState(
                keys=torch.randn(total, backbone.head_dim),
                values=torch.randn(total, backbone.head_dim),
                bias=torch.randn(total),
                offsets=torch.randint(0, 9, (total,), dtype=torch.int32),
                rows=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
                num_layers=backbone.num_layers,
                span=9,
                num_tokens=9,
            )
        )
    batch = [[Placed(states[0], 4), Placed(states[1], 13)], [], [Placed(states[1], 0)]]
    results = []
    for choice in ("triton", "reference"):
        monkeypatch.setenv("GIST_RAG_KERNELS", choice)
        slots = compose(batch, backbone)
        assert slots is not None
        results.append((slots.keys, slots.values, slots.bias))
    for mine, true in zip(*results, strict=True):
        assert close(mine, true)
