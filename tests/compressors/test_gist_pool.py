"""``gist_pool``: windows, the shift by a layer, parameters of its own; each can be switched off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor, make_compressor
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
    assert drawn(layout) == "x\nxx\nxxx\nxx.x\nxx.xx\n...xxx"
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


def test_a_gist_starts_as_the_mean_of_its_window(
    make: Callable[..., Compressor], ids: Tensor
) -> None:
    method = make()
    tokens = method.backbone.embed(ids)
    start = method.gist_inputs(tokens, method.layout(ids))
    assert torch.allclose(start, tokens.view(12, 4, -1).mean(1), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "plain"])
def test_a_layer_reads_what_comes_out_of_it(
    make: Callable[..., Compressor], ids: Tensor, shift: bool
) -> None:
    """Keys and values are the plain reader's projections of the stream one layer on."""
    method = make(shift=shift)
    [state] = method.compress([ids])
    keys, values, _ = state.dense()
    stream = gists_of(method, ids)
    for index, layer in enumerate(method.backbone.layers):
        normed = layer.input_layernorm(stream[index + shift])
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
    assert [name for name, _ in make(separate=False).named_parameters()] == ["gists"]
    assert any(name.startswith("lora") for name, _ in make().named_parameters())


@pytest.mark.parametrize("switch", ["shift", "windowed", "separate"])
def test_every_switch_changes_what_is_read(
    make: Callable[..., Compressor], ids: Tensor, switch: str
) -> None:
    with torch.no_grad():
        [whole], [without] = (m.compress([ids]) for m in (make(), make(**{switch: False})))
    assert whole.num_slots == without.num_slots
    assert not torch.allclose(whole.keys, without.keys, atol=1e-2)
