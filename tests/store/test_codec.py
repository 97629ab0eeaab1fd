from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_rag.errors import BadInput, CorruptEntry, FormatTooNew
from gist_rag.store.codec import CODECS, FORMAT, from_bytes, num_slots, pack, to_bytes, unpack
from gist_rag.types import GistState

EVERY_CODEC = pytest.mark.parametrize("codec", sorted(CODECS))


@st.composite
def ragged_states(draw: st.DrawFn) -> GistState:
    """States of any raggedness, empty rows and empty states included, and of any magnitude."""
    num_layers = draw(st.integers(1, 3))
    num_rows = num_layers * draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 6), min_size=num_rows, max_size=num_rows))
    size = 2 * draw(st.integers(1, 5))
    magnitude = 10.0 ** draw(st.integers(-40, 37))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    slots = sum(lengths)
    return GistState(
        keys=torch.randn(slots, size, generator=generator) * magnitude,
        values=torch.randn(slots, size, generator=generator) * magnitude,
        bias=torch.randn(slots, generator=generator) * 10,
        offsets=torch.randint(
            0, draw(st.sampled_from([9, 2**15, 2**31 - 1])), (slots,), generator=generator
        ).int(),
        rows=torch.tensor([0, *lengths]).cumsum(0).int(),
        num_layers=num_layers,
        span=draw(st.integers(0, 10**6)),
        num_tokens=draw(st.integers(0, 10**6)),
        text=draw(st.none() | st.text()),
    )


@EVERY_CODEC
@given(state=ragged_states())
def test_everything_but_keys_and_values_comes_back_as_it_was(codec: str, state: GistState) -> None:
    again = unpack(from_bytes(to_bytes(pack(state, codec))))

    assert torch.equal(again.offsets, state.offsets)
    assert torch.equal(again.rows, state.rows)
    assert torch.all((again.bias - state.bias).abs() <= 2**-11 * state.bias.abs() + 2**-25)
    assert (again.num_layers, again.span, again.num_tokens, again.text) == (
        state.num_layers,
        state.span,
        state.num_tokens,
        state.text,
    )


@given(state=ragged_states())
def test_bf16_keeps_eight_binary_digits(state: GistState) -> None:
    again = unpack(pack(state, "bf16")).floats(torch.float32)

    assert torch.all((again.keys - state.keys).abs() <= 2**-8 * state.keys.abs() + 1e-38)
    assert torch.all((again.values - state.values).abs() <= 2**-8 * state.values.abs() + 1e-38)


@given(state=ragged_states())
def test_int8_errs_by_less_than_its_bound(state: GistState) -> None:
    again = unpack(pack(state, "int8")).floats(torch.float32)

    for begin, end in zip(state.rows[:-1].tolist(), state.rows[1:].tolist(), strict=True):
        if begin < end:
            keys = state.keys[begin:end]
            bound = keys.abs().amax(0) / 253 + 1e-38
            assert torch.all((again.keys[begin:end] - keys).abs() <= bound)
    bound = state.values.abs().amax(1, keepdim=True) / 253 + 1e-38
    assert torch.all((again.values - state.values).abs() <= bound)


@given(state=ragged_states())
def test_int4_errs_by_less_than_its_bound(state: GistState) -> None:
    again = unpack(pack(state, "int4")).floats(torch.float32)

    for begin, end in zip(state.rows[:-1].tolist(), state.rows[1:].tolist(), strict=True):
        for first in range(begin, end, 32):
            part = slice(first, min(first + 32, end))
            bound = state.keys[part].abs().amax(0) / 13.9 + 1e-37
            assert torch.all((again.keys[part] - state.keys[part]).abs() <= bound)
    half = state.values.shape[1] // 2
    groups = state.values.abs().unflatten(1, (2, half)).amax(2)  # half a head is below 32 here
    bound = groups.repeat_interleave(half, 1) / 13.9 + 1e-37
    assert torch.all((again.values - state.values).abs() <= bound)


@EVERY_CODEC
def test_a_state_without_slots_can_be_stored(codec: str, make_state) -> None:
    packed = pack(make_state(lengths=(0, 0, 0, 0)), codec)

    assert num_slots(from_bytes(to_bytes(packed))) == 0
    assert unpack(packed).kv.head_dim == 8


@EVERY_CODEC
def test_bytes_read_from_a_writable_buffer_are_not_copied(codec: str, make_state) -> None:
    buffer = bytearray(to_bytes(pack(make_state(), codec)))
    begin = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()

    packed = from_bytes(memoryview(buffer))

    places = [tensor.data_ptr() - begin for tensor in packed.tensors.values()]
    assert all(0 < place < len(buffer) and place % 64 == 0 for place in places)


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_a_buffer_at_an_odd_address_is_moved_to_an_even_one(shift: int, make_state) -> None:
    blob = to_bytes(pack(make_state(), "int8"))
    buffer = bytearray(shift) + blob

    packed = from_bytes(memoryview(buffer)[shift:])

    assert to_bytes(packed) == blob
    assert all(tensor.data_ptr() % 8 == 0 for tensor in packed.tensors.values())


def test_writing_into_a_tensor_cannot_change_immutable_bytes(make_state) -> None:
    blob = to_bytes(pack(make_state(), "int8"))
    packed = from_bytes(blob)

    packed.tensors["keys"].fill_(1)

    assert to_bytes(packed) != blob == to_bytes(pack(make_state(), "int8"))


def test_smaller_numbers_take_fewer_bytes(make_state) -> None:
    state = make_state(lengths=(40,) * 4, size=64)

    assert pack(state, "int8").num_bytes < 0.56 * pack(state, "bf16").num_bytes
    assert pack(state, "int4").num_bytes < 0.35 * pack(state, "bf16").num_bytes


def test_keys_and_values_come_as_they_are_stored(make_state) -> None:
    state = unpack(pack(make_state(), "int8"))
    grown = state.floats(torch.bfloat16)

    assert (state.keys.dtype, state.values.dtype) == (torch.int8, torch.int8)
    assert (grown.keys.dtype, grown.values.dtype) == (torch.bfloat16, torch.bfloat16)
    assert state.bias.dtype == grown.bias.dtype == torch.float32


def test_a_state_that_is_being_trained_is_stored_without_its_graph(make_state) -> None:
    state = make_state()
    state = replace(state, keys=state.keys.requires_grad_(), bias=state.bias.requires_grad_())

    assert not any(tensor.requires_grad for tensor in pack(state, "bf16").tensors.values())


@EVERY_CODEC
@pytest.mark.parametrize("name", ["keys", "values", "bias"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_number_that_cannot_be_stored_is_refused(
    codec: str, name: str, number: float, make_state
) -> None:
    state = make_state()
    getattr(state, name)[2] = number

    with pytest.raises(BadInput, match=f"{name} hold NaN"):
        pack(state, codec)


@EVERY_CODEC
@pytest.mark.parametrize("rows", [[0, 3, 3, 8, 8], [1, 3, 3, 8, 9], [0, 5, 3, 8, 9], [0, -1, 3, 8]])
def test_rows_that_do_not_divide_the_slots_are_refused(codec: str, rows, make_state) -> None:
    state = replace(make_state(num_layers=1), rows=torch.tensor(rows).int())

    with pytest.raises(BadInput, match="rows must rise"):
        pack(state, codec)


def test_an_unknown_codec_is_refused_with_the_known_ones(make_state) -> None:
    with pytest.raises(BadInput, match="'int3' is unknown; choose one of bf16, int8"):
        pack(make_state(), "int3")


def test_a_newer_format_is_refused_by_name(make_state) -> None:
    blob = bytearray(to_bytes(pack(make_state(), "bf16")))
    struct.pack_into("<I", blob, 8, FORMAT + 1)

    with pytest.raises(FormatTooNew, match=f"format {FORMAT + 1}"):
        from_bytes(blob)


def with_header(blob: bytes, **fields: object) -> bytes:
    """The bytes of a gist with some fields of its header changed."""
    magic, number, length, _ = struct.unpack_from("<8sIIQ", blob)
    header = json.dumps(json.loads(blob[24 : 24 + length]) | fields).encode()
    payload = blob[-(-(24 + length) // 64) * 64 :]
    start = -(-(24 + len(header)) // 64) * 64
    head = struct.pack("<8sIIQ", magic, number, len(header), start + len(payload)) + header
    return head.ljust(start, b"\0") + payload


KEYS = {"dtype": "bfloat16", "shape": [9, 8], "offset": 64}


@pytest.mark.parametrize(
    "fields",
    [
        {"codec": "int3"},
        {"codec": ["bf16"]},
        {"codec": "int8"},
        {"num_layers": 0},
        {"num_layers": 3},
        {"span": "40"},
        {"text": 7},
        {"tensors": []},
        {"tensors": {}},
        {"tensors": {"keys": KEYS}},
        {"tensors": {"keys": KEYS | {"dtype": "float64"}}},
        {"tensors": {"keys": KEYS | {"shape": [0] + [2**31 - 1] * 40}}},
        {"tensors": {"keys": KEYS | {"shape": [0, 2**80]}}},
        {"tensors": {"keys": KEYS | {"shape": [2**30, 2**30]}}},
        {"tensors": {"keys": KEYS | {"shape": [-1, 8]}}},
        {"tensors": {"keys": KEYS | {"offset": 2**70}}},
        {"tensors": {"keys": KEYS | {"offset": -64}}},
        {"tensors": {"keys": KEYS | {"offset": 2}}},
    ],
    ids=json.dumps,
)
def test_a_header_that_lies_is_found_out(fields: dict[str, object], make_state) -> None:
    blob = to_bytes(pack(make_state(), "bf16"))

    with pytest.raises(CorruptEntry):
        from_bytes(with_header(blob, **fields))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("rows", torch.tensor([0, 3, 3, 8, 8], dtype=torch.int32)),
        ("rows", torch.tensor([0, 5, 3, 8, 9], dtype=torch.int32)),
        ("rows", torch.tensor([-1, 3, 3, 8, 9], dtype=torch.int32)),
        ("rows", torch.tensor([0, 3, 9], dtype=torch.int32)),
        ("rows", torch.empty(0, dtype=torch.int32)),
        ("bias", torch.zeros(8, dtype=torch.float16)),
        ("bias", torch.zeros(9, dtype=torch.bfloat16)),
        ("offsets", torch.zeros(9, 1, dtype=torch.int32)),
        ("value_scales", torch.zeros(10, dtype=torch.bfloat16)),
        ("key_scales", torch.zeros(3, 8, dtype=torch.bfloat16)),
        ("more", torch.zeros(9, dtype=torch.int8)),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_together_are_found_out(
    name: str, tensor: torch.Tensor, make_state
) -> None:
    packed = pack(make_state(), "int8")
    packed = replace(packed, tensors={**packed.tensors, name: tensor})

    with pytest.raises(CorruptEntry, match="do not fit together"):
        from_bytes(to_bytes(packed))


@EVERY_CODEC
def test_coarser_states_lie_in_the_same_bytes(codec: str, make_state) -> None:
    levels = [make_state(seed=n, lengths=(6 - n, 0, 5, 1)) for n in range(3)]
    packed = pack(replace(levels[0], coarser=tuple(levels[1:])), codec)

    blob = to_bytes(packed)
    again = from_bytes(blob)

    assert len(blob) % 64 == 0
    assert again.num_bytes == packed.num_bytes == sum(pack(s, codec).num_bytes for s in levels)
    assert to_bytes(again) == blob
    for level, state in zip([again, *again.coarser], levels, strict=True):
        assert to_bytes(replace(level, coarser=())) == to_bytes(pack(state, codec))
    assert [s.num_slots for s in unpack(again).coarser] == [s.num_slots for s in levels[1:]]


@pytest.mark.parametrize("spans", [7, [7], [[0, 64]], [[64, 2**40]], [[128, 64]], [[64, "128"]]])
def test_coarser_states_elsewhere_are_found_out(spans: object, make_state) -> None:
    blob = to_bytes(pack(replace(make_state(), coarser=(make_state(1),)), "bf16"))

    with pytest.raises(CorruptEntry):
        from_bytes(with_header(blob, coarser=spans))


def test_coarser_states_of_another_passage_or_with_their_own_are_found_out(make_state) -> None:
    finest, coarser = make_state(), make_state(1)
    for wrong in (replace(coarser, num_tokens=9), replace(coarser, coarser=(coarser,))):
        blob = to_bytes(pack(replace(finest, coarser=(wrong,)), "bf16"))
        with pytest.raises(CorruptEntry, match="coarser"):
            from_bytes(blob)


def test_a_header_nested_without_end_is_found_out(make_state) -> None:
    blob = to_bytes(pack(make_state(), "bf16"))
    nested = b"[" * (100_032 - 24)
    prefix = blob[:12] + struct.pack("<IQ", len(nested), len(nested) + 24)

    with pytest.raises(CorruptEntry, match="not JSON"):
        from_bytes(prefix + nested)


def read_or_refuse(blob: bytes) -> None:
    """Read a damaged gist; any error but the two of the contract propagates."""
    try:
        packed = from_bytes(blob)
    except (CorruptEntry, FormatTooNew):
        return
    unpack(packed)


@EVERY_CODEC
def test_every_truncation_is_found_out(codec: str, make_state) -> None:
    blob = to_bytes(pack(make_state(), codec))

    for length in range(len(blob)):
        with pytest.raises(CorruptEntry):
            from_bytes(blob[:length])


@EVERY_CODEC
def test_no_flipped_bit_of_a_header_does_harm(codec: str, make_state) -> None:
    blob = to_bytes(pack(make_state(text="a verbalised gist"), codec))
    (length,) = struct.unpack_from("<I", blob, 12)

    for position in range(24 + length):
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[position] ^= 1 << bit
            read_or_refuse(damaged)


@EVERY_CODEC
@settings(max_examples=200)
@given(data=st.data())
def test_no_random_damage_does_harm(codec: str, make_state, data: st.DataObject) -> None:
    blob = bytearray(to_bytes(pack(make_state(), codec)))
    positions = st.integers(0, len(blob) - 1)
    for position, byte in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)))):
        blob[position] = byte

    read_or_refuse(bytes(blob[: data.draw(positions)]))
    read_or_refuse(bytes(blob))


@given(junk=st.binary(max_size=300))
def test_junk_is_found_out(junk: bytes) -> None:
    with pytest.raises((CorruptEntry, FormatTooNew)):
        from_bytes(junk)
