"""``gist_attention``: the kernels equal a dense mask, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist_rag.layout import NEVER, Layout
from gist_rag_kernels import gist_attention, gist_shift
from gist_rag_kernels.gist_attention import kernel, reference
from gist_rag_kernels.gist_attention.shift import as_prefix

# Triton's interpreter cuts to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
WINDOWS = Layout.interleave([4, 8, 12, 16, 18])
Vectors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16, so that tiny layouts have blocks to skip."""
    if not torch.cuda.is_available():
        small = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(kernel, "_tile", lambda *_: dict(small))


def vectors(*layouts: Layout) -> Vectors:
    """Layouts of a batch, padded on the right by slots that see nothing."""
    size = max(map(len, layouts))
    is_gist = torch.zeros(len(layouts), size, dtype=torch.bool)
    local_from = torch.full((len(layouts), size), NEVER)
    gist_from = local_from.clone()
    for row, layout in enumerate(layouts):
        own = slice(0, len(layout))
        is_gist[row, own] = layout.is_gist
        local_from[row, own], gist_from[row, own] = layout.local_from, layout.gist_from
    return is_gist, local_from, gist_from


def tensors(
    given: Vectors, heads: int, group: int, size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Query as a model has it (a view of ``(B, S, Hq, D)``), key, value and a gradient."""
    batch, slots = given[0].shape
    query, grad = (
        torch.randn(2, batch, slots, heads * group, size).to(device, dtype).transpose(2, 3)
    )
    key, value = torch.randn(2, batch, heads, slots, size).to(device, dtype)
    return [query, key, value, grad]


def agree(
    given: Vectors,
    device: torch.device,
    *,
    prefix: Tensor | int = 0,
    heads: int = 1,
    group: int = 2,
    size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> None:
    query, key, value, grad = tensors(given, heads, group, size, dtype, device)
    given = given[0].to(device), given[1].to(device), given[2].to(device)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out = gist_attention(*leaves, *given, prefix)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    leaves = [t.detach().float().requires_grad_() for t in (query, key, value)]
    out = reference.gist_attention(*leaves, *given, as_prefix(prefix, given[0]), size**-0.5)
    truth = [out.detach(), *torch.autograd.grad(out, leaves, grad.float())]
    for mine, true in zip(ours, truth, strict=True):
        assert mine.dtype == dtype
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
def test_kernels_equal_a_dense_mask(dtype: torch.dtype, size: int, device: torch.device) -> None:
    agree(vectors(WINDOWS), device, group=1, size=size, dtype=dtype)


@pytest.mark.parametrize(("heads", "group"), [(3, 1), (2, 2), (1, 8)])
def test_query_heads_of_a_group_share_keys(heads: int, group: int, device: torch.device) -> None:
    agree(vectors(Layout.interleave([5, 9])), device, heads=heads, group=group)


@pytest.mark.parametrize(
    "layout",
    [
        Layout.tokens(20),
        Layout.append(15, 4),
        Layout.interleave([3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36]),
        Layout.interleave([6, 12, 18], raw_sees_gists=False),
        Layout.interleave([6, 12, 18], gists_see_gists=False),
        Layout.interleave([6, 12, 18], raw_is_local=False),
        Layout.interleave([1]),
        Layout.append(0, 3),
        Layout.tokens(1),
    ],
    ids=[
        "tokens",
        "gists at the end",
        "windows",
        "raw blind to gists",
        "gists blind to gists",
        "raw sees all raw",
        "one and one",
        "gists only",
        "one",
    ],
)
def test_every_kind_of_layout(layout: Layout, device: torch.device) -> None:
    agree(vectors(layout), device, group=1)


@pytest.mark.parametrize("prefix", [1, 7, 40])
def test_prefix_is_seen_by_all_later_slots(prefix: int, device: torch.device) -> None:
    agree(vectors(Layout.interleave([10, 20, 30])), device, prefix=prefix, group=1)


def test_layouts_of_a_batch_differ_and_padding_is_zero(device: torch.device) -> None:
    given = vectors(WINDOWS, Layout.append(5, 2), Layout.tokens(3))
    agree(given, device, group=1)
    query, key, value, _ = tensors(given, 1, 1, 32, torch.float32, device)
    out = gist_attention(query, key, value, *(v.to(device) for v in given))
    for row, size in enumerate((len(WINDOWS), 7, 3)):
        assert bool((out[row, :, size:] == 0).all())


def test_windows_that_do_not_rise(device: torch.device) -> None:
    """The rule allows any vectors, not only those of today's layouts."""
    slots = 40
    given = (
        torch.rand(1, slots) < 0.3,
        torch.randint(0, slots, (1, slots)),
        torch.randint(0, slots, (1, slots)),
    )
    agree(given, device, prefix=2, group=1)


@settings(max_examples=5, deadline=None)
@given(
    slots=st.integers(1, 36),
    batch=st.integers(1, 2),
    prefix=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    share=st.floats(0, 1),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_shape(
    slots: int, batch: int, prefix: tuple[int, int], share: float, group: int, seed: int
) -> None:
    torch.manual_seed(seed)
    given = (
        torch.rand(batch, slots) < share,
        torch.randint(0, slots + 5, (batch, slots)),
        torch.randint(0, slots + 5, (batch, slots)),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    each = torch.tensor(prefix[:batch], device=device)
    agree(given, device, prefix=each, group=group, size=16)


def test_a_shift_is_made_once_for_all_layers(device: torch.device) -> None:
    given = vectors(WINDOWS)
    query, key, value, _ = tensors(given, 2, 1, 32, torch.float32, device)
    given = given[0].to(device), given[1].to(device), given[2].to(device)
    shift = gist_shift(*given)
    assert torch.equal(
        gist_attention(query, key, value, *given, shift=shift),
        gist_attention(query, key, value, *given),
    )


def test_shift_puts_gists_last_and_keeps_order() -> None:
    is_gist, local_from, gist_from = vectors(Layout.interleave([2, 4]))  # t t g t t g
    shift = gist_shift(is_gist, local_from, gist_from)
    assert shift.order.tolist() == [[0, 1, 3, 4, 2, 5]]
    assert shift.raws.tolist() == [[0, 1, 2, 2, 3, 4, 4]]


def test_until_is_behind_the_last_query_that_sees_a_key() -> None:
    given = vectors(Layout.interleave([3, 5, 9], raw_sees_gists=False))
    shift = gist_shift(*given, prefix=1)
    mask = reference.visibility(*given, torch.ones(1))[0]
    for kind, queries in enumerate((~given[0][0], given[0][0])):
        rows = (torch.arange(len(mask)) + 1)[:, None] * (mask & queries[:, None])
        last = rows.amax(0)
        assert bool((shift.until[kind, 0] >= last).all())
        assert bool((shift.until[kind, 0][last > 0] == last[last > 0]).all())


def test_misshapen_inputs_are_refused(device: torch.device) -> None:
    given = vectors(WINDOWS)
    query, key, value, _ = tensors(given, 2, 2, 32, torch.float32, device)

    def refused(match: str, *inputs: Tensor, prefix: Tensor | int = 0) -> None:
        with pytest.raises(ValueError, match=match):
            gist_attention(*inputs, prefix=prefix)  # type: ignore[misc]

    refused("does not fit", query[:, :, 1:], key, value, *given)
    refused("no multiple", query[:, :3], key, value, *given)
    refused("must be", query, key, value[:, :1], *given)
    refused("float16", query.half(), key, value, *given)
    refused("gist_from", query, key, value, *given[:2], given[2][:, 1:])
    refused("prefix", query, key, value, *given, prefix=-1)
    refused("prefix", query, key, value, *given, prefix=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="bool"):
        gist_shift(given[1], given[1], given[2])
    with pytest.raises(ValueError, match="must all be"):
        gist_shift(given[0], given[1][:, 1:], given[2])
