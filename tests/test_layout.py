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
