"""``unigist``: a sliding window, sinks, and all gists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.layout import Layout


@pytest.fixture
def method(backbone: Backbone, taught: Callable[[Compressor], Compressor]) -> Compressor:
    settings = {"ratio": 4.0, "window": 8, "sinks": 2}
    return taught(make_compressor("unigist", backbone, settings))


def test_mask(drawn: Callable[[Layout], str]) -> None:
    """The mask of the docstring: S a g b b g c c g."""
    layout = Layout.interleave([2, 4, 6], place="next", reach=1, prefix=1)
    assert drawn(layout) == (
        "x\nxx\nxxx\nxxxx\nxxxxx\nxxxxxx\nx.xxxxx\nx.xxxxxx\nx.xxxxxxx"  # a has left the window
    )
    assert layout.position.tolist() == [0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_a_gist_may_share_the_position_of_the_next_token(backbone: Backbone, ids: Tensor) -> None:
    settings = {"ratio": 4.0, "window": 8, "sinks": 2, "positions": "paper"}
    layout = make_compressor("unigist", backbone, settings).layout(ids)
    gists = layout.is_gist.nonzero()[:-1, 0]
    assert torch.equal(layout.position[gists], layout.position[gists + 1])
    raw = layout.position[~layout.is_gist]
    assert torch.equal(raw, torch.arange(len(ids)))  # tokens keep their distances


def test_sinks_may_be_more_than_a_unit(drawn: Callable[[Layout], str]) -> None:
    layout = Layout.interleave([1, 2, 3], prefix=2)  # S g S g c g
    assert drawn(layout).splitlines()[-2] == "xxxxx"
    assert layout.prefix == 3


def test_tokens_outside_the_window_are_known_by_gists_only(method: Compressor, ids: Tensor) -> None:
    layout = method.layout(ids)
    seen = layout.mask()[-1] & ~layout.is_gist
    assert layout.source[seen].tolist() == [0, 1, *range(36, 48)]  # sinks; 8 of window, own unit
    assert bool((layout.mask()[-1] | ~layout.is_gist).all())  # and every gist


def test_a_later_token_reaches_no_earlier_gist(
    method: Compressor, unchanged: Callable[..., list[int]]
) -> None:
    assert unchanged(method, [20]) == [0, 1, 2, 3, 4]


def test_language_term_learns(method: Compressor, ids: Tensor, lowers: Callable[..., bool]) -> None:
    def loss() -> Tensor:
        return method.language_loss(method.encode([ids])[-1], [ids], [method.layout(ids)])

    assert lowers(method, loss)
