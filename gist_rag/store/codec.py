"""GistState <> PackedState <> bytes: what a stored gist is made of.

A codec says how keys and values are stored; log-mass, offsets and rows are stored alike by all.

The bytes of one gist describe themselves (numbers are little-endian)::

    0    magic      8 bytes  b"GISTRAG\\n"
    8    format     uint32   a higher number than FORMAT is refused by name
    12   length     uint32   of the header
    16   total      uint64   length of the whole
    24   header     JSON     codec, num_layers, span, num_tokens, text, tensors, bank if it is one,
                             coarser if there are some
    64k  payloads            each begins, and the whole ends, at a multiple of 64 bytes

``tensors`` maps a name to its dtype, shape and offset from the first payload. ``coarser`` lists
where, from there too, the bytes of coarser states begin and end. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gist_rag.errors import BadInput, CorruptEntry, FormatTooNew
from gist_rag.types import GistState, PackedState
from gist_rag_kernels import PackedKV, quantise

FORMAT = 1
MAGIC = b"GISTRAG\n"

_PREFIX = struct.Struct("<8sIIQ")
_ALIGNMENT = 64
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Far above any real key, and far enough below the largest bfloat16 that no rounding reaches inf.
_LARGEST_KEY = 1e38
_LARGEST_BIAS = 65504.0

# A tensor's dtypes, and its shape in letters: M slots, D head size, R rows, E = R + 1 row edges; of
# four bits, C bytes a slot, G groups of slots and V of channels.
_Layout = Mapping[str, tuple[tuple[torch.dtype, ...], str]]
_SHARED: _Layout = {
    "bias": ((torch.float16,), "M"),
    "offsets": ((torch.int16, torch.int32), "M"),
    "rows": ((torch.int32,), "E"),
}


@dataclass(frozen=True)
class Codec:
    """How keys and values are stored.

    Attributes:
        layout: names, dtypes and shapes of the tensors that hold them.
        encode: float32 keys and values ``(M, D)`` and row edges ``(R + 1,)`` > tensors.
        key_group: slots of a row that share a scale, 0 for all.
    """

    layout: _Layout
    encode: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    key_group: int = 0


def pack(state: GistState, codec: str) -> PackedState:
    """Store a state on the CPU, in the number format of ``codec``.

    What ``unpack`` gives back differs from the state by at most:

    ======  ==============================================  ==================================
    codec   keys                                            values
    ======  ==============================================  ==================================
    bf16    ``2**-8 * |x|``                                 ``2**-8 * |x|``
    int8    ``1/253`` of the largest ``|x|`` of the same    ``1/253`` of the largest ``|x|``
            row (layer and KV head) and channel             of the same slot
    int4    ``1/13.9`` of it among 32 slots                 ``1/13.9`` of it among 32 channels
    ======  ==============================================  ==================================

    plus 1e-38 where float32 itself runs out of digits. The log-mass is stored in float16: at most
    ``2**-11 * |x| + 2**-25``. Offsets and rows are exact.

    Raises:
        BadInput: the codec is unknown, a number is NaN, infinite or too large to store, or
            ``rows`` does not divide the slots.
    """
    chosen = _codec(codec)
    _check_rows(state)
    _check_range("keys", state.keys, _LARGEST_KEY)
    _check_range("values", state.values, _LARGEST_KEY)
    _check_range("bias", state.bias, _LARGEST_BIAS)
    with torch.no_grad():
        tensors = chosen.encode(state.keys.float(), state.values.float(), state.rows)
    tensors["bias"] = state.bias.to(torch.float16)
    tensors["offsets"] = _narrow(state.offsets)
    tensors["rows"] = state.rows.to(torch.int32)
    return PackedState(
        codec=codec,
        tensors={name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        num_layers=state.num_layers,
        span=state.span,
        num_tokens=state.num_tokens,
        text=state.text,
        bank=state.bank,
        coarser=tuple(pack(coarser, codec) for coarser in state.coarser),
    )


def unpack(packed: PackedState, device: torch.device | str = "cpu") -> GistState:
    """A state whose keys and values are as they are stored; the log-mass comes in float32.

    On the CPU it shares memory with ``packed``: read it, do not write into it.
    """
    tensors = {name: tensor.to(device) for name, tensor in packed.tensors.items()}
    return GistState(
        **{
            **tensors,
            "bias": tensors["bias"].float(),
            "offsets": tensors["offsets"].to(torch.int32),
        },
        num_layers=packed.num_layers,
        span=packed.span,
        num_tokens=packed.num_tokens,
        text=packed.text,
        bank=packed.bank,
        key_group=_codec(packed.codec).key_group,
        coarser=tuple(unpack(coarser, device) for coarser in packed.coarser),
    )


def to_bytes(packed: PackedState) -> bytes:
    """The bytes of a packed state; equal states give equal bytes."""
    specs: dict[str, dict[str, object]] = {}
    payloads: list[bytes] = []
    offset = 0
    for name, tensor in sorted(packed.tensors.items()):
        payload = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        specs[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "offset": offset,
        }
        payloads.append(_padded(payload))
        offset += len(payloads[-1])
    coarser = [to_bytes(state) for state in packed.coarser]
    ends = [*accumulate(map(len, coarser), initial=offset)]
    header = json.dumps(
        {
            "codec": packed.codec,
            "num_layers": packed.num_layers,
            "span": packed.span,
            "num_tokens": packed.num_tokens,
            "text": packed.text,
            "tensors": specs,
            **({} if packed.bank is None else {"bank": packed.bank}),
            **({"coarser": [*pairwise(ends)]} if coarser else {}),
        }
    ).encode()
    total = _aligned(_PREFIX.size + len(header)) + ends[-1]
    prefix = _PREFIX.pack(MAGIC, FORMAT, len(header), total)
    return b"".join([_padded(prefix + header), *payloads, *coarser])


def from_bytes(buffer: bytes | bytearray | memoryview) -> PackedState:
    """Read what ``to_bytes`` wrote; the tensors share the memory of a writable ``buffer``.

    A read-only buffer is copied once, since PyTorch has no read-only tensors, and so is one whose
    address does not suit the tensors' dtypes.

    Raises:
        CorruptEntry: the bytes are not a gist that ``unpack`` can read. Whether its numbers are
            the right ones is for a checksum to say.
        FormatTooNew: a newer gist-rag wrote them.
    """
    return _from_view(memoryview(buffer))


def _from_view(view: memoryview, *, inner: bool = False) -> PackedState:
    """``inner``: of a coarser state, which has none of its own."""
    if len(view) < _PREFIX.size:
        raise CorruptEntry(f"{len(view)} bytes are too few for a gist")
    magic, number, length, total = _PREFIX.unpack_from(view)
    if magic != MAGIC or number < 1:
        raise CorruptEntry("these bytes do not begin like a gist")
    if number > FORMAT:
        raise FormatTooNew(
            f"gist of format {number}, but this gist-rag reads formats up to {FORMAT}; "
            "upgrade gist-rag"
        )
    start = _aligned(_PREFIX.size + length)
    if total != len(view) or start > total:
        raise CorruptEntry(f"{len(view)} bytes of a gist of {total}, with a header of {length}")
    try:
        header = json.loads(bytes(view[_PREFIX.size : _PREFIX.size + length]))
    except (ValueError, RecursionError) as error:
        raise CorruptEntry(f"the header of a gist is not JSON: {error}") from error
    packed = _parse(header, _as_tensor(view)[start:])
    spans = header.get("coarser", [])
    if not spans:
        return packed
    if inner:
        raise CorruptEntry("a coarser state has coarser ones of its own")
    return replace(packed, coarser=_read_coarser(packed, spans, view[start:]))


def num_slots(packed: PackedState) -> int:
    """``M``: slots over all layers and heads."""
    return len(packed.tensors["offsets"])


def _encode_bf16(keys: Tensor, values: Tensor, rows: Tensor) -> dict[str, Tensor]:
    return {"keys": keys.to(torch.bfloat16), "values": values.to(torch.bfloat16)}


def _encode_int8(keys: Tensor, values: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """A scale per row and channel for keys, whose channels differ; one per slot for values."""
    return _tensors(quantise(keys, values, rows))


def _encode_int4(keys: Tensor, values: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The same for smaller groups, which four bits need."""
    half = keys.shape[1] // 2
    channels = max(size for size in range(1, _GROUP + 1) if half % size == 0)
    return _tensors(quantise(keys, values, rows, 4, key_group=_GROUP, value_group=channels))


def _tensors(packed: PackedKV) -> dict[str, Tensor]:
    assert packed.key_scales is not None
    assert packed.value_scales is not None
    return {
        "keys": packed.keys,
        "key_scales": packed.key_scales,
        "values": packed.values,
        "value_scales": packed.value_scales,
    }


_GROUP = 32

CODECS: Mapping[str, Codec] = {
    "bf16": Codec(
        layout={
            "keys": ((torch.bfloat16,), "MD"),
            "values": ((torch.bfloat16,), "MD"),
        },
        encode=_encode_bf16,
    ),
    "int8": Codec(
        layout={
            "keys": ((torch.int8,), "MD"),
            "key_scales": ((torch.bfloat16,), "RD"),
            "values": ((torch.int8,), "MD"),
            "value_scales": ((torch.bfloat16,), "M"),
        },
        encode=_encode_int8,
    ),
    "int4": Codec(
        layout={
            "keys": ((torch.uint8,), "MC"),
            "key_scales": ((torch.bfloat16,), "GD"),
            "values": ((torch.uint8,), "MC"),
            "value_scales": ((torch.bfloat16,), "MV"),
        },
        encode=_encode_int4,
        key_group=_GROUP,
    ),
}


def _codec(name: str) -> Codec:
    if name not in CODECS:
        raise BadInput(f"codec {name!r} is unknown; choose one of {', '.join(CODECS)}")
    return CODECS[name]


def _check_rows(state: GistState) -> None:
    if state.keys.dim() != 2 or state.keys.shape[1] == 0:
        raise BadInput(f"keys of shape {tuple(state.keys.shape)}; they must be (M, D)")
    if not _divides(state.rows, state.num_slots):
        raise BadInput(
            f"rows must rise from 0 to the number of slots, here {state.num_slots}; "
            f"given {state.rows.tolist()}"
        )


def _check_range(name: str, tensor: Tensor, largest: float) -> None:
    if not bool((tensor.detach().float().abs() <= largest).all()):  # NaN fails as well
        raise BadInput(
            f"{name} hold NaN, infinity or numbers beyond {largest:g}; such a state is not stored"
        )


def _divides(rows: Tensor, slots: int) -> bool:
    """Whether row edges ``(R + 1,)`` cut ``slots`` slots into rows."""
    if len(rows) == 0:
        return False
    return int(rows[0]) == 0 and int(rows[-1]) == slots and bool((rows.diff() >= 0).all())


def _narrow(offsets: Tensor) -> Tensor:
    """int16 where every offset fits, else int32."""
    limit = torch.iinfo(torch.int16)
    fits = bool(((offsets >= limit.min) & (offsets <= limit.max)).all())
    return offsets.to(torch.int16 if fits else torch.int32)


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _padded(payload: bytes) -> bytes:
    return payload.ljust(_aligned(len(payload)), b"\0")


def _as_tensor(view: memoryview) -> Tensor:
    """The bytes as a uint8 tensor, copied only where they cannot be shared."""
    tensor = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
    return tensor if tensor.data_ptr() % 8 == 0 else tensor.clone()


def _parse(header: object, payload: Tensor) -> PackedState:
    match header:
        case {
            "codec": str(codec),
            "num_layers": int(num_layers),
            "span": int(span),
            "num_tokens": int(num_tokens),
            "text": (str() | None) as text,
            "tensors": dict(specs),
            **rest,
        } if codec in CODECS and num_layers > 0:
            tensors = {name: _read_tensor(spec, payload) for name, spec in specs.items()}
            _check_layout(CODECS[codec], tensors, num_layers)
            bank = _read_bank(rest.get("bank"))
            return PackedState(codec, tensors, num_layers, span, num_tokens, text, bank)
    raise CorruptEntry("the header of a gist lacks a field, or has one of another type")


def _read_tensor(spec: object, payload: Tensor) -> Tensor:
    match spec:
        case {"dtype": str(name), "shape": [*shape], "offset": int(offset)} if (
            name in _DTYPES and len(shape) <= 2 and all(_is_size(size) for size in shape)
        ):
            end = offset + math.prod(shape) * _DTYPES[name].itemsize
            if offset >= 0 and offset % _ALIGNMENT == 0 and end <= len(payload):
                return payload[offset:end].view(_DTYPES[name]).view(shape)
    raise CorruptEntry("a gist's tensor does not lie within its bytes")


def _read_bank(temperature: object) -> float | None:
    if temperature is None:
        return None
    if isinstance(temperature, float) and 0 < temperature < math.inf:
        return temperature
    raise CorruptEntry(f"a gist's bank is read with temperature {temperature!r}, which none can be")


def _read_coarser(
    finest: PackedState, spans: object, payload: memoryview
) -> tuple[PackedState, ...]:
    states = []
    for span in spans if isinstance(spans, list) else [spans]:
        match span:
            case [int(begin), int(end)] if 0 < begin < end <= len(payload):
                states.append(_from_view(payload[begin:end], inner=True))
            case _:
                raise CorruptEntry("a coarser state does not lie within a gist's bytes")
    shape = (finest.codec, finest.num_layers, finest.num_tokens)
    if any((s.codec, s.num_layers, s.num_tokens) != shape for s in states):
        raise CorruptEntry("a coarser state is not of the same passage")
    return tuple(states)


def _is_size(size: object) -> bool:
    return isinstance(size, int) and 0 <= size < 2**31


def _check_layout(codec: Codec, tensors: Mapping[str, Tensor], num_layers: int) -> None:
    """Names, dtypes, shapes and rows as ``pack`` makes them, so that ``unpack`` cannot stumble."""
    layout = {**codec.layout, **_SHARED}
    sizes: dict[str, int] = {}
    sound = tensors.keys() == layout.keys() and all(
        tensors[name].dtype in dtypes
        and tensors[name].dim() == len(letters)
        and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(letters, tensors[name].shape, strict=True)
        )
        for name, (dtypes, letters) in layout.items()
    )
    num_rows = sizes.get("E", 0) - 1
    if not (
        sound
        and sizes.get("R", num_rows) == num_rows
        and num_rows % num_layers == 0
        and _divides(tensors["rows"], sizes["M"])
        and _is_sound(_kv(tensors, codec))
    ):
        raise CorruptEntry("a gist's tensors do not fit together")


def _kv(tensors: Mapping[str, Tensor], codec: Codec) -> PackedKV:
    scales = tensors.get("key_scales"), tensors.get("value_scales"), codec.key_group
    return PackedKV(tensors["keys"], tensors["values"], tensors["rows"], *scales)


def _is_sound(kv: PackedKV) -> bool:
    """Whether kernels can read it."""
    try:
        kv.check()
    except ValueError:
        return False
    return kv.key_scales is None or len(kv.key_scales) == int(kv.key_starts()[-1])
