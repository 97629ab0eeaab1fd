"""``ragged_slot_attention``: the kernel equals the reference, and the reference equals softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist_rag_kernels import RaggedSlots, plan, plan_layers, ragged_slot_attention
from gist_rag_kernels.slot_attention import kernel, reference

# Triton's interpreter cuts to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
LENGTHS = [[7, 0], [34, 1]]


def make(
    lengths: list[list[int]],
    size: int = 64,
    dtype: torch.dtype = torch.float32,
    *,
    bits: int = 32,
    gap: int = 3,
    offset: int = 0,
) -> RaggedSlots:
    """Slots whose rows lie apart in the buffer, with NaN between them that nobody may read."""
    counts = torch.tensor(lengths)
    flat = counts.flatten() + gap
    starts = (flat.cumsum(0) - flat + offset).view_as(counts)
    total = offset + int(flat.sum())
    inside = torch.zeros(total, dtype=torch.bool)
    for start, count in zip(starts.flatten().tolist(), counts.flatten().tolist(), strict=True):
        inside[start : start + count] = True
    rows = torch.randint(0, 3, (total,), dtype=torch.int32)
    bias = torch.randn(total).masked_fill(~inside, torch.nan)
    common = dict(bias=bias, order=rows, starts=starts, lengths=counts.int())
    if bits >= 16:
        hidden = ~inside[:, None]
        keys, values = torch.randn(2, total, size).masked_fill(hidden, torch.nan).to(dtype)
        return RaggedSlots(keys=keys, values=values, **common)
    if bits == 8:
        keys, values = torch.randint(-127, 128, (2, total, size), dtype=torch.int8)
    else:
        keys, values = torch.randint(0, 256, (2, total, size // 2), dtype=torch.uint8)
    largest = 127 if bits == 8 else 7
    angles = torch.arange(50)[:, None] * torch.rand(size // 2)
    angles = torch.cat((angles, angles), 1)
    return RaggedSlots(
        keys=keys,
        values=values,
        **common,
        key_scales=(torch.rand(4, size) + 0.5) / largest,
        scale_rows=torch.randint(0, 4, (total,), dtype=torch.int32),
        value_scales=(torch.rand(total) + 0.5) / largest,
        positions=torch.randint(0, 50, (total,), dtype=torch.int32),
        cos=angles.cos(),
        sin=angles.sin(),
    )


def local(
    slots: RaggedSlots, group: int, rows: int, keys: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads = slots.lengths.shape
    query = torch.randn(batch, rows, heads * group, size, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, heads, keys, size, dtype=dtype)
    return query, key, value


def agree(
    slots: RaggedSlots,
    inputs: tuple[Tensor, Tensor, Tensor],
    device: torch.device,
    *,
    visible: Tensor | None = None,
    seen: Tensor | None = None,
    chunk: int = 16,
) -> None:
    moved = {k: None if v is None else v.to(device) for k, v in vars(slots).items()}
    slots = RaggedSlots(**moved)
    query, key, value = (t.to(device) for t in inputs)
    visible, seen = (None if t is None else t.to(device) for t in (visible, seen))
    scaling = query.shape[-1] ** -0.5
    ours = ragged_slot_attention(
        query,
        key,
        value,
        slots,
        scaling,
        visible=visible,
        seen=seen,
        plan=plan(slots.starts, slots.lengths, chunk),
    )
    truth = reference.ragged_slot_attention(query, key, value, slots, scaling, visible, seen)
    tolerance = TOLERANCE[query.dtype]
    assert ours.dtype == query.dtype
    assert torch.allclose(ours.float(), truth.float(), atol=tolerance, rtol=tolerance)


@contextmanager
def whole_rows() -> Iterator[None]:
    """One program per row, however few there are."""
    enough, kernel.ENOUGH_PROGRAMS = kernel.ENOUGH_PROGRAMS, 0
    try:
        yield
    finally:
        kernel.ENOUGH_PROGRAMS = enough


@pytest.fixture(params=["split", "whole"])
def _route(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "split":
        yield
    else:
        with whole_rows():
            yield


both_routes = pytest.mark.usefixtures("_route")


@both_routes
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 64),
        (torch.bfloat16, 80),
        (torch.float16, 96),
        (torch.bfloat16, 128),
    ],
    ids=str,
)
def test_kernel_equals_reference(dtype: torch.dtype, size: int, device: torch.device) -> None:
    slots = make(LENGTHS, size, dtype)
    agree(slots, local(slots, 2, 3, 5, size, dtype), device)


@both_routes
@pytest.mark.parametrize("group", [1, 3, 8])
def test_query_heads_of_a_group_share_slots(group: int, device: torch.device) -> None:
    slots = make(LENGTHS)
    agree(slots, local(slots, group, 1, 4, 64, torch.float32), device)


@both_routes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float32), (80, torch.bfloat16)], ids=str)
def test_quantised_slots_are_unpacked_scaled_and_rotated(
    bits: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    slots = make(LENGTHS, size, bits=bits)
    agree(slots, local(slots, 2, 2, 3, size, dtype), device)


@both_routes
@pytest.mark.parametrize(
    "lengths", [[[0]], [[1]], [[0, 0], [0, 0]], [[0, 33]]], ids=["none", "one", "nowhere", "a head"]
)
def test_rows_without_slots(lengths: list[list[int]], device: torch.device) -> None:
    slots = make(lengths)
    agree(slots, local(slots, 2, 2, 3, 64, torch.float32), device)


@both_routes
def test_only_slots_and_no_local_key(device: torch.device) -> None:
    slots = make([[5, 18]])
    agree(slots, local(slots, 2, 1, 0, 64, torch.float32), device)


@both_routes
def test_queries_see_only_passages_before_them(device: torch.device) -> None:
    slots = make(LENGTHS)
    seen = torch.tensor([[0, 1, 3], [0, 0, 2]])
    agree(slots, local(slots, 2, 3, 5, 64, torch.float32), device, seen=seen)


@both_routes
def test_left_padding_hides_keys_and_blind_rows_are_zero(device: torch.device) -> None:
    slots = make([[3, 2], [20, 5]])
    query, key, value = local(slots, 2, 3, 4, 64, torch.float32)
    key[0, :, :3] = value[0, :, :3] = 1e4  # padding that would show
    visible = torch.tensor([[False, False, False, True], [True] * 4])
    seen = torch.tensor([[0, 0, 3], [3, 3, 3]])
    agree(slots, (query, key, value), device, visible=visible, seen=seen)
    inputs = (t.to(device) for t in (query, key, value))
    moved = {k: None if v is None else v.to(device) for k, v in vars(slots).items()}
    out = ragged_slot_attention(
        *inputs,
        RaggedSlots(**moved),
        0.125,
        visible=visible.to(device),
        seen=seen.to(device),
    )
    assert bool((out[0, :, :2] == 0).all())
    assert bool((out[0, :, 2] != 0).all())


@both_routes
@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_per_query_is_the_whole_rule(rows: int, device: torch.device) -> None:
    slots = make(LENGTHS)
    visible = torch.rand(2, 1, rows, 6) < 0.6  # not causal, some rows empty
    agree(slots, local(slots, 2, rows, 6, 64, torch.float32), device, visible=visible)


@both_routes
def test_hidden_slots_do_not_count(device: torch.device) -> None:
    slots = make([[9, 4]])
    slots.bias[slots.starts[0, 0] : slots.starts[0, 0] + 9] = -torch.inf
    agree(slots, local(slots, 1, 2, 2, 64, torch.float32), device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 4 GiB of GPU memory")
@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Slots behind element 2**31 of the buffer."""
    near = make([[40, 3]], 128, torch.bfloat16)
    far = 1 << 24
    buffer = torch.empty(far + len(near.keys), 128, dtype=torch.bfloat16, device=device)
    buffer[far:] = near.keys.to(device)
    moved = {k: None if v is None else v.to(device) for k, v in vars(near).items()}
    slots = RaggedSlots(**moved)
    pad = torch.nn.functional.pad
    shifted = replace(
        slots,
        keys=buffer,
        values=buffer,
        bias=pad(slots.bias, (far, 0)),
        order=pad(slots.order, (far, 0)),
        starts=slots.starts + far,
    )
    inputs = tuple(t.to(device) for t in local(near, 2, 1, 3, 128, torch.bfloat16))
    ours = ragged_slot_attention(*inputs, shifted, 0.1)
    truth = ragged_slot_attention(*inputs, replace(slots, values=slots.keys), 0.1)
    assert torch.equal(ours, truth)


@both_routes
def test_a_row_far_inside_a_shared_buffer(device: torch.device) -> None:
    slots = make(LENGTHS, offset=5000)
    agree(slots, local(slots, 2, 1, 2, 64, torch.float32), device)


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=2),
    group=st.integers(1, 8),
    rows=st.integers(1, 4),
    before=st.integers(0, 6),
    chunk=st.integers(1, 70),
    whole=st.booleans(),
    bits=st.sampled_from([4, 8, 32]),
)
def test_any_shape(
    lengths: list[list[int]],
    group: int,
    rows: int,
    before: int,
    chunk: int,
    whole: bool,
    bits: int,
) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slots = make(lengths, 32, bits=bits)
    inputs = local(slots, group, rows, before + rows, 32, torch.float32)
    seen = torch.randint(0, 4, (len(lengths), rows))
    chunk = max(chunk, 8)  # the interpreter is slow
    if whole:
        with whole_rows():
            agree(slots, inputs, device, seen=seen)
    else:
        agree(slots, inputs, device, seen=seen, chunk=chunk)


def test_reference_is_one_softmax_over_slots_and_local_keys() -> None:
    """Against sums written out, one query head at a time."""
    slots = make([[5, 0, 2]], 8)
    query, key, value = local(slots, 2, 2, 3, 8, torch.float32)
    out = reference.ragged_slot_attention(query, key, value, slots, 0.3, None, None)
    for head in range(6):
        start, count = int(slots.starts[0, head // 2]), int(slots.lengths[0, head // 2])
        mine = slice(start, start + count)
        for q in range(2):
            keys = torch.cat((slots.keys[mine], key[0, head // 2, : q + 2]))
            values = torch.cat((slots.values[mine], value[0, head // 2, : q + 2]))
            logits = keys @ query[0, head, q] * 0.3
            logits[:count] += slots.bias[mine]
            assert torch.allclose(out[0, head, q], logits.softmax(0) @ values, atol=1e-5)


def test_gradients_go_through_the_reference(device: torch.device) -> None:
    slots = make(LENGTHS)
    query, key, value = local(slots, 2, 2, 3, 64, torch.float32)
    leaves = {
        "keys": slots.keys.nan_to_num(),
        "values": slots.values.nan_to_num(),
        "bias": slots.bias.nan_to_num(),
    }
    moved = {k: None if v is None else v.to(device) for k, v in vars(slots).items()}
    leaves = {name: leaf.to(device).requires_grad_() for name, leaf in leaves.items()}
    given = replace(RaggedSlots(**moved), **leaves)
    inputs = (t.to(device) for t in (query, key, value))
    ragged_slot_attention(*inputs, given, 0.125).square().sum().backward()
    inside = ~slots.bias.isnan()
    for leaf in leaves.values():
        assert leaf.grad is not None
        used = leaf.grad.flatten(1).abs().sum(1) if leaf.dim() > 1 else leaf.grad.abs()
        assert bool((used[inside] > 0).all())
        assert bool((used[~inside] == 0).all())


def test_plan_covers_every_slot_once_in_equal_pieces() -> None:
    lengths = torch.tensor([[[0, 5], [64, 3]], [[0, 0], [0, 0]], [[1, 200], [0, 16]]])
    starts = torch.randint(0, 1 << 40, lengths.shape)
    for layer, made in enumerate(plan_layers(starts, lengths, 16)):
        counts, begins = lengths[layer].flatten(), starts[layer].flatten()
        covered = [
            (row, slot)
            for row, start, length in zip(
                made.row.tolist(), made.start.tolist(), made.length.tolist(), strict=True
            )
            for slot in range(start, start + length)
        ]
        assert covered == [
            (row, int(begins[row]) + i) for row in range(4) for i in range(int(counts[row]))
        ]
        assert made.first.diff().tolist() == [-(-int(c) // 16) for c in counts]
        assert bool((made.length <= 16).all())


@pytest.mark.parametrize("total", [0, 1, 16384, 65536, 10**7])
def test_default_pieces_fill_the_gpu(total: int) -> None:
    made = plan(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[total]]))
    assert 64 <= made.chunk <= 1024
    assert len(made.row) == math.ceil(total / made.chunk)
    assert made.chunk in (64, 1024) or 256 <= len(made.row) <= 512


def test_misshapen_inputs_are_refused(device: torch.device) -> None:
    slots = make(LENGTHS)
    query, key, value = local(slots, 2, 2, 3, 64, torch.float32)

    def refused(match: str, slots: RaggedSlots = slots, **changed: Tensor) -> None:
        inputs = {"query": query, "key": key, "value": value, **changed}
        with pytest.raises(ValueError, match=match):
            ragged_slot_attention(**inputs, slots=slots, scaling=1.0)

    refused("does not fit", query=query[:, :3])
    refused("does not fit", query=query[..., :32])
    refused("must be", value=value[:, :, :2])
    refused("visible", visible=torch.ones(2, 4, dtype=torch.bool))
    refused("visible", visible=torch.ones(2, 3))
    refused("seen", seen=torch.zeros(2, 3))
    refused("bias", replace(slots, bias=slots.bias[1:]))
    refused("starts", replace(slots, starts=slots.starts[:1]))
    refused("contiguous", replace(slots, order=torch.zeros(2 * len(slots.keys)).int()[::2]))
    refused("values torch.float16", replace(slots, values=slots.values.half()))
    refused("key_scales", replace(make(LENGTHS, bits=8), key_scales=None))
    refused(
        "int8 or uint8",
        replace(make(LENGTHS, bits=8), keys=slots.keys.long(), values=slots.values.long()),
    )
    with pytest.raises(ValueError, match="chunk"):
        plan(slots.starts, slots.lengths, 0)
    with pytest.raises(ValueError, match="alike"):
        plan(slots.starts, slots.lengths[:1])
