"""The nouns of gist-rag: passages, their keys, their compressed states, and answers.

Alphabet of every docstring in the project: ``B`` batch, ``T`` passage tokens, ``P`` prompt tokens,
``S`` slots of a layout (tokens and gists), ``N`` kept slots of one head, ``L`` layers, ``H`` KV
heads, ``D`` head size, ``E`` hidden size, ``V`` vocabulary, ``M`` slots of a ragged state over all
layers and heads. A compression ratio is tokens per slot ("8x"), never a fraction removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from gist_rag.errors import BadInput
from gist_rag_kernels import PackedKV, dequantise

if TYPE_CHECKING:
    from gist_rag.constrain import Constraint


def normalise(text: str) -> str:
    """Fold every run of whitespace to one space: the form in which a passage is recognised."""
    return " ".join(text.split())


def content_key(text: str) -> str:
    """sha256 (hex) of the normalised text: texts that differ in whitespace only are one passage."""
    return hashlib.sha256(normalise(text).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Passage:
    """A text that retrieval returns. Its content is its identity; ``id`` only names its source."""

    text: str
    id: str = ""
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise BadInput(f"passage {self.id!r} has no text")

    @cached_property
    def content(self) -> str:
        return content_key(self.text)


@dataclass(frozen=True)
class GistKey:
    """Where a gist lives: ``space`` says who made it and how, ``content`` says of which text.

    ``space`` is the fingerprint of backbone, tokenizer, chat template, compressor weights and
    config, codec and tenant namespace; a gist of another space is never read.
    """

    space: str
    content: str


@dataclass(frozen=True)
class GistState:
    """One compressed passage, free of position, ragged over layers and heads.

    Rows are (layer, KV head) pairs in layer-major order; slots of one row are contiguous.

    Attributes:
        keys: ``(M, D)`` keys *before* RoPE: floats, or as they are stored (``PackedKV``).
        values: ``(M, D)``, as ``keys``.
        bias: ``(M,)`` log-mass added to the attention logit of a slot; zeros for plain slots.
        offsets: ``(M,)`` int32, place of each slot inside the passage, below ``span`` or ``T``.
        rows: ``(L * H + 1,)`` int32, where each row's slots begin and end.
        num_layers: ``L``.
        span: positions the passage takes in a prompt, from ``N`` (packed) to ``T`` (spread).
        num_tokens: ``T``; the ratio is ``T * L * H / M``.
        text: a verbalised gist, for models that can only be talked to.
        bank: the slots join no attention but a bank beside it (``Slots.bank``), which is read with
            this temperature; ``None`` for ordinary gists.
        key_scales, value_scales, key_group: see ``PackedKV``; no scales for floats.
        coarser: the same passage at higher ratios, each fitted by itself, the finest of them first
            (``budget``).
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    offsets: Tensor
    rows: Tensor
    num_layers: int
    span: int
    num_tokens: int
    text: str | None = None
    bank: float | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_group: int = 0
    coarser: tuple[GistState, ...] = ()

    def __post_init__(self) -> None:
        slots = len(self.keys)
        shapes = {
            "values": self.values.shape == self.keys.shape,
            "bias": self.bias.shape == (slots,),
            "offsets": self.offsets.shape == (slots,),
            "rows": self.rows.dim() == 1 and (len(self.rows) - 1) % self.num_layers == 0,
        }
        wrong = [name for name, fits in shapes.items() if not fits]
        if wrong:
            raise BadInput(f"state of {slots} slots with ill-shaped {', '.join(wrong)}")

    @classmethod
    def uniform(
        cls,
        keys: Tensor,
        values: Tensor,
        offsets: Tensor,
        *,
        span: int,
        num_tokens: int,
        bias: Tensor | None = None,
    ) -> GistState:
        """A state whose heads all keep ``N`` slots.

        Args:
            keys: ``(L, H, N, D)`` before RoPE.
            values: ``(L, H, N, D)``.
            offsets: ``(N,)``.
            bias: ``(L, H, N)`` or ``None`` for zeros.
        """
        layers, heads, slots, size = keys.shape
        rows = torch.arange(layers * heads + 1, dtype=torch.int32, device=keys.device) * slots
        flat_bias = keys.new_zeros(layers * heads * slots) if bias is None else bias.reshape(-1)
        return cls(
            keys=keys.reshape(-1, size),
            values=values.reshape(-1, size),
            bias=flat_bias.float(),
            offsets=offsets.to(torch.int32).repeat(layers * heads),
            rows=rows,
            num_layers=layers,
            span=span,
            num_tokens=num_tokens,
        )

    @property
    def num_slots(self) -> int:
        """``M``: slots over all layers and heads."""
        return len(self.keys)

    @property
    def kv(self) -> PackedKV:
        """Keys and values as kernels take them."""
        scales = self.key_scales, self.value_scales, self.key_group
        return PackedKV(self.keys, self.values, self.rows, *scales)

    @property
    def num_heads(self) -> int:
        """``H``: KV heads of one layer."""
        return (len(self.rows) - 1) // self.num_layers

    @property
    def mean_slots(self) -> float:
        """Slots of an average head: what the passage costs in a KV cache."""
        return self.num_slots / (len(self.rows) - 1)

    @property
    def ratio(self) -> float:
        """Compression ratio ``T / mean_slots``."""
        return self.num_tokens / max(self.mean_slots, 1e-9)

    @property
    def num_bytes(self) -> int:
        """Size as it is stored, without the coarser states."""
        held = (self.keys, self.values, self.key_scales, self.value_scales, self.rows)
        places = 4 * self.num_slots  # log-masses and offsets
        return places + sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def lengths(self) -> Tensor:
        """``(L * H,)`` kept slots of each row."""
        return self.rows.diff()

    def row_of_slot(self) -> Tensor:
        """``(M,)`` the row each slot belongs to."""
        index = torch.arange(len(self.rows) - 1, device=self.rows.device)
        return index.repeat_interleave(self.lengths.long())

    def rank_of_slot(self) -> Tensor:
        """``(M,)`` the place of each slot in its row."""
        index = torch.arange(self.num_slots, device=self.rows.device)
        return index - self.rows.long()[self.row_of_slot()]

    def side_by_side(self) -> GistState:
        """The same with slots at places 0, 1, ... of their row, so that the passage takes as few
        positions as there are slots."""
        span = int(self.lengths.max()) if len(self.rows) > 1 else 0
        coarser = tuple(state.side_by_side() for state in self.coarser)
        offsets = self.rank_of_slot().to(torch.int32)
        return replace(self, offsets=offsets, span=span, coarser=coarser)

    def emptied(self) -> GistState:
        """The same without slots."""
        key_scales, value_scales = self.key_scales, self.value_scales
        if key_scales is not None and self.key_group:
            key_scales = key_scales[:0]
        return replace(
            self,
            keys=self.keys[:0],
            values=self.values[:0],
            bias=self.bias[:0],
            offsets=self.offsets[:0],
            rows=torch.zeros_like(self.rows),
            key_scales=key_scales,
            value_scales=None if value_scales is None else value_scales[:0],
            coarser=(),
        )

    def select(self, keep: Tensor) -> GistState:
        """Some of the slots of floats: ``(M,)`` bool."""
        lengths = torch.bincount(self.row_of_slot()[keep], minlength=len(self.rows) - 1)
        return replace(
            self,
            keys=self.keys[keep],
            values=self.values[keep],
            bias=self.bias[keep],
            offsets=self.offsets[keep],
            rows=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            coarser=(),
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``(L, H, Nmax, D)`` and bias ``(L, H, Nmax)``, ``-inf`` on padding."""
        row, rank, lengths = self.row_of_slot(), self.rank_of_slot(), self.lengths.long()
        width = int(lengths.max()) if len(lengths) else 0
        shape = (len(lengths), width)
        keys = self.keys.new_zeros(*shape, self.keys.shape[-1])
        values = torch.zeros_like(keys)
        bias = self.bias.new_full(shape, -torch.inf)
        keys[row, rank], values[row, rank], bias[row, rank] = self.keys, self.values, self.bias
        heads = (self.num_layers, self.num_heads, width)
        size = self.keys.shape[-1]
        return keys.view(*heads, size), values.view(*heads, size), bias.view(heads)

    def to(self, device: torch.device | str) -> GistState:
        """On a device, as it is stored."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            bias=self.bias.to(device),
            offsets=self.offsets.to(device),
            rows=self.rows.to(device),
            key_scales=moved(self.key_scales),
            value_scales=moved(self.value_scales),
            coarser=tuple(state.to(device) for state in self.coarser),
        )

    def floats(self, dtype: torch.dtype) -> GistState:
        """With keys and values in a float dtype."""
        if self.key_scales is None:
            keys, values = self.keys.to(dtype), self.values.to(dtype)
        else:
            keys, values = dequantise(self.kv, dtype)
        return replace(
            self,
            keys=keys,
            values=values,
            key_scales=None,
            value_scales=None,
            key_group=0,
            coarser=tuple(state.floats(dtype) for state in self.coarser),
        )


@dataclass(frozen=True)
class PackedState:
    """A ``GistState`` as it is stored: keys and values perhaps quantised, on the CPU.

    Attributes:
        codec: name of the codec that packed it.
        tensors: named tensors; which ones is the codec's business.
        num_layers, span, num_tokens, text, bank, coarser: as in ``GistState``.
    """

    codec: str
    tensors: Mapping[str, Tensor]
    num_layers: int
    span: int
    num_tokens: int
    text: str | None = None
    bank: float | None = None
    coarser: tuple[PackedState, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Payload size in bytes, that of the coarser states included."""
        own = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return own + sum(state.num_bytes for state in self.coarser)


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Stats:
    """What one answer cost. Times in milliseconds, sizes in bytes.

    ``hits`` counts passages read as gists, ``misses`` known passages without a gist, ``expanded``
    those that were read as text after the model had read their gists in doubt, ``left_out`` those
    with a gist that were not read since others mattered more. ``ratio`` is source tokens per slot
    over the passages that were read as gists. ``first_token_ms`` counts from the call to the first
    new token: matching, fetching, choosing passages, composing and reading included.
    ``kernels`` says what composed and read the gists, ``"triton"`` or ``"reference"``.
    """

    hits: int = 0
    misses: int = 0
    expanded: int = 0
    left_out: int = 0
    gist_slots: float = 0.0
    source_tokens: int = 0
    text_tokens: int = 0
    cached_tokens: int = 0
    num_bytes: int = 0
    match_ms: float = 0.0
    fetch_ms: float = 0.0
    focus_ms: float = 0.0
    compose_ms: float = 0.0
    read_ms: float = 0.0
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    kernels: str = "reference"

    @property
    def ratio(self) -> float:
        return self.source_tokens / self.gist_slots if self.gist_slots else 1.0

    @property
    def input_tokens(self) -> int:
        """Positions that were attended to: tokens of the text and slots of the gists."""
        return round(self.text_tokens + self.cached_tokens + self.gist_slots)


@dataclass(frozen=True)
class Answer:
    """A generated text and how it came about.

    ``finish_reason`` is ``"stop"`` (end token or stop string), ``"length"`` or ``"cancelled"``.
    ``passages`` are those read as gists, in prompt order, and ``weights`` how much of its attention
    the prompt gave each beside the others, as a factor: 1 for the one that matters most, and for
    all where nobody judges.
    """

    text: str
    passages: Sequence[Passage]
    finish_reason: str
    num_tokens: int
    stats: Stats
    weights: Sequence[float] = ()

    def report(self) -> dict[str, object]:
        """What was read as gists and what that saved, for response metadata."""
        return {
            "hits": self.stats.hits,
            "misses": self.stats.misses,
            "expanded": self.stats.expanded,
            "left_out": self.stats.left_out,
            "passages": [passage.id or passage.content for passage in self.passages],
            "weights": [round(weight, 3) for weight in self.weights],
            "gist_tokens": round(self.stats.gist_slots),
            "source_tokens": self.stats.source_tokens,
            "ratio": round(self.stats.ratio, 3),
            "first_token_ms": round(self.stats.first_token_ms, 3),
        }


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``seed`` makes sampling repeatable.

    ``constraint`` says what form the answer must have; what it does not allow is never chosen.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[str] = ()
    seed: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BadInput(f"max_tokens is {self.max_tokens}; it must be 1 or more")
        if self.temperature < 0:
            raise BadInput(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.top_k < 0:
            raise BadInput(f"top_k is {self.top_k}; it must be 0 or more")
        if isinstance(self.stop, str) or any(not s for s in self.stop):
            raise BadInput("stop must be a list of non-empty strings")
