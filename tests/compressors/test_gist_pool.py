"""``gist_pool``: windows, the shift by a layer, parameters of its own; each can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.gist_pool import GistPool
from gist_rag.layout import Layout


@pytest.fixture
def make(
    backbone: Backbone, taught: Callable[[Compressor], Compressor]
) -> Callable[..., Compressor]:
    return lambda **switches: taught(
        make_compressor("gist_pool", backbone, {"ratio": 4.0, **switches})
    )


@torch.no_grad()
def gists_of(method: Compressor, ids: Tensor) -> Tensor:
    """Residual streams ``(L + 1, N, E)`` of the gists."""
    return method.encode([ids])[:, 0, method.layout(ids).is_gist]


def test_mask(backbone: Backbone, drawn: Callable[[Layout], str]) -> None:
    """The mask of the docstring: t t g t t g."""
    method = make_compressor("gist_pool", backbone, {"ratio": 2.0})
    layout = method.layout(torch.arange(4))
    assert drawn(layout) == "x\nxx\nxxx\nxx.x\nxx.xx\nx..xxx"
    assert layout.position.tolist() == [0, 1, 1, 2, 3, 3]


def test_a_gist_sees_its_own_window_only(make: Callable[..., Compressor], ids: Tensor) -> None:
    """After one layer, before tokens can have told each other anything."""
    method, other = make(), ids.clone()
    other[20] = 9
    same = (gists_of(method, ids)[1] == gists_of(method, other)[1]).all(-1)
    assert same.logical_not().nonzero().flatten().tolist() == [5]


def test_later_tokens_reach_no_gist(
    make: Callable[..., Compressor], unchanged: Callable[..., list[int]]
) -> None:
    assert unchanged(make(), [20, 40]) == [0, 1, 2, 3, 4]


def test_tokens_stay_the_backbones_own(make: Callable[..., Compressor], ids: Tensor) -> None:
    method = make()
    with torch.no_grad():
        raw = method.encode([ids])[:, 0, ~method.layout(ids).is_gist]
        assert torch.allclose(raw, method.backbone.encode(ids[None])[:, 0], atol=1e-4)


def test_a_gist_may_start_as_the_mean_of_its_window(
    make: Callable[..., Compressor], ids: Tensor
) -> None:
    method = make(start="mean", sink=False)
    tokens = method.backbone.embed(ids)
    start = method.gist_inputs(tokens, method.layout(ids))
    assert torch.allclose(start, tokens.view(12, 4, -1).mean(1), atol=1e-5)


def test_without_a_sink_a_gist_sees_nothing_but_its_window(
    backbone: Backbone, drawn: Callable[[Layout], str]
) -> None:
    method = make_compressor("gist_pool", backbone, {"ratio": 2.0, "sink": False})
    assert drawn(method.layout(torch.arange(4))).splitlines()[-1] == "...xxx"


@torch.no_grad()
@pytest.mark.parametrize(
    ("shift", "shares"),
    [(True, (1.0, 1.0, 1.0)), (False, (0.0, 0.0, 0.0)), ("learned", (0.5, 0.25, 0.0))],
    ids=["shifted", "plain", "learned"],
)
def test_a_layer_reads_what_comes_out_of_it(
    make: Callable[..., Compressor],
    ids: Tensor,
    shift: bool | str,
    shares: tuple[float, ...],
) -> None:
    """Keys and values are the plain reader's projections of the stream up to one layer on."""
    method = make(shift=shift)
    if shift == "learned":
        cast(GistPool, method).ahead.copy_(torch.tensor(shares))
    [state] = method.compress([ids])
    keys, values, _ = state.dense()
    stream = gists_of(method, ids)
    for index, (layer, share) in enumerate(zip(method.backbone.layers, shares, strict=True)):
        normed = layer.input_layernorm(stream[index] * (1 - share) + stream[index + 1] * share)
        for ours, project in ((keys, layer.self_attn.k_proj), (values, layer.self_attn.v_proj)):
            theirs = project(normed).view(12, 2, -1).transpose(0, 1)  # (H, N, D)
            assert torch.allclose(ours[index], theirs, atol=1e-4)


def test_without_windows_gists_stand_at_the_end(
    make: Callable[..., Compressor], backbone: Backbone, ids: Tensor
) -> None:
    ours = make(windowed=False).layout(ids)
    theirs = make_compressor("gisting", backbone, {"ratio": 4.0}).layout(ids)
    assert torch.equal(ours.mask(), theirs.mask())
    assert torch.equal(ours.position, theirs.position)


def test_without_parameters_of_its_own_only_the_embedding_learns(
    make: Callable[..., Compressor],
) -> None:
    plain = make(separate=False, shift=False)
    assert [name for name, _ in plain.named_parameters()] == ["gists"]
    assert any(name.startswith("lora") for name, _ in make().named_parameters())


@pytest.mark.parametrize("switch", ["shift", "windowed", "separate"])
def test_every_switch_changes_what_is_read(
    make: Callable[..., Compressor], ids: Tensor, switch: str
) -> None:
    with torch.no_grad():
        [whole], [without] = (m.compress([ids]) for m in (make(), make(**{switch: False})))
    assert whole.num_slots == without.num_slots
    assert not torch.allclose(whole.keys, without.keys, atol=1e-2)
