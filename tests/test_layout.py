"""Which tokens a gist stands for, and what it starts from."""

from __future__ import annotations

import pytest
import torch

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.layout import Layout


def shares(layout: Layout) -> list[tuple[int, int]]:
    return list(zip(*(place.tolist() for place in layout.shares), strict=True))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout.interleave([3, 5]), [(0, 3), (3, 5)]),
        (Layout.interleave([4, 6], gists=[(0, 1), (0,)]), [(0, 2), (2, 4), (4, 6)]),
        (Layout.append(7, 3, kinds=2), [(0, 2), (2, 4), (4, 7)]),
        (Layout.append(2, 4), [(0, 0), (0, 1), (1, 1), (1, 2)]),
        (Layout.interleave([3, 6], prefix=1), [(1, 3), (3, 6)]),
        (Layout.interleave([3, 6], prefix=4), [(3, 3), (4, 6)]),
        (Layout.interleave([2, 5, 7], gists=[(), (0,), ()], prefix=2), [(2, 5)]),
        (Layout.tokens(4), []),
    ],
    ids=[
        "windows",
        "unit of two",
        "appended",
        "few tokens",
        "sink",
        "only sinks",
        "prompt",
        "none",
    ],
)
def test_gists_share_the_tokens_before_them(
    layout: Layout, expected: list[tuple[int, int]]
) -> None:
    assert shares(layout) == expected


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout.interleave([3, 5], place="own"), [0, 1, 2, 2, 3, 4, 4]),
        (Layout.interleave([4], gists=[(0, 1)], place="own"), [0, 1, 2, 3, 1, 3]),
        (Layout.append(6, 2), [0, 1, 2, 3, 4, 5, 2, 5]),
        (Layout.append(1, 2), [0, 0, 0]),
        (Layout.tokens(3), [0, 1, 2]),
    ],
    ids=["windows", "unit of two", "appended", "few tokens", "none"],
)
def test_gists_stand_beside_their_tokens(layout: Layout, expected: list[int]) -> None:
    beside = layout.beside_tokens()
    assert beside.position.tolist() == expected
    assert torch.equal(beside.mask(), layout.mask())  # who sees whom stays


@torch.no_grad()
def test_gists_that_see_everything_may_stand_anywhere(backbone: Backbone) -> None:
    """Positions that do not rise by 1 are not taken for several texts, also in a batch of one."""
    ids = torch.arange(10, 31)
    method = make_compressor("gisting", backbone, {"ratio": 4})
    other = ids.clone()
    other[3] = 99
    one, changed = (method.encode([i])[-1, 0, -1] for i in (ids, other))
    assert not torch.allclose(one, changed, atol=1e-3)


@pytest.mark.parametrize("name", ["gisting", "sentence_anchored", "incomes"])
def test_a_gist_starts_from_its_tokens(backbone: Backbone, name: str) -> None:
    """From the last one, or from their mean, until it has learnt something else."""
    ids = torch.arange(10, 31)
    for start in ("token", "mean"):
        method = make_compressor(name, backbone, {"ratio": 4, "start": start})
        layout, tokens = method.layout(ids), backbone.embed(ids)
        starts = method.gist_inputs(tokens, layout)
        for given, (first, end) in zip(starts, shares(layout), strict=True):
            wanted = tokens[end - 1] if start == "token" else tokens[first:end].mean(0)
            assert torch.allclose(given, wanted, atol=1e-6)
    learned = make_compressor(name, backbone, {"ratio": 4, "start": "learned"}).gist_inputs(
        tokens, layout
    )
    assert not torch.allclose(learned, starts, atol=1e-3)
