"""``sentence_anchored``: units at sentence ends, and no text from beyond them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.sentence_anchored import SENTENCE_END, SentenceAnchored
from gist_rag.layout import Layout, unit_ends, unit_slots


@pytest.fixture
def method(backbone: Backbone, taught: Callable[[Compressor], Compressor]) -> Compressor:
    settings = {"ratio": 4.0, "gists": 3, "sinks": 0}
    return taught(make_compressor("sentence_anchored", backbone, settings))


def test_mask(drawn: Callable[[Layout], str]) -> None:
    """The mask of the docstring, with a sink: a a g g b b g g."""
    layout = Layout.interleave([2, 4], gists=[range(2)] * 2, place="own", prefix=1)
    assert drawn(layout) == (
        "x\nxx\nxxx\nxxxx\nx.xxx\nx.xxxx\nx.xxxxx\nx.xxxxxx"  # b sees its own, and gists of a
    )
    assert layout.source.tolist() == [0, 1, -1, -2, 2, 3, -1, -2]
    assert layout.position.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two!  Three?", ["One.", " Two!", "  Three?"]),
        ("It cost 3.5 dollars. Fine.", ["It cost 3.5 dollars.", " Fine."]),
        ('He said "no." Then he left.', ['He said "no."', " Then he left."]),
        ("A title\nA sentence of its own.", ["A title\n", "A sentence of its own."]),
        ("no end at all", ["no end at all"]),
    ],
    ids=["marks", "decimals", "quotes", "title", "none"],
)
def test_sentences_end_where_they_should(
    backbone: Backbone, text: str, sentences: list[str]
) -> None:
    ids = backbone.tokenize(text)
    ends = [e for e in backbone.breaks(ids, SENTENCE_END) if e < len(ids)]
    parts = [backbone.tokenizer.decode(ids[a:b]) for a, b in pairwise([0, *ends, len(ids)])]
    assert parts == sentences


@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0, 16.0])
def test_the_ratio_is_met_by_merging_and_cutting(
    backbone: Backbone, ids: Tensor, ratio: float
) -> None:
    compressor = make_compressor("sentence_anchored", backbone, {"ratio": ratio})
    assert int(compressor.layout(ids).is_gist.sum()) == round(len(ids) / ratio)


@pytest.mark.parametrize(
    ("breaks", "count", "longest", "ends"),
    [
        ([10, 20, 30], 4, 99, [10, 20, 30, 40]),
        ([10, 20, 30], 2, 99, [20, 40]),  # short neighbours are merged
        ([4, 8], 3, 99, [4, 8, 40]),
        ([4, 8], 3, 16, [8, 24, 40]),  # the run-on is cut, so the short ones go together
        ([], 4, 99, [10, 20, 30, 40]),
    ],
    ids=["as-they-are", "merge", "run-on", "capped", "no-breaks"],
)
def test_units(breaks: list[int], count: int, longest: int, ends: list[int]) -> None:
    assert unit_ends(breaks, 40, count, longest) == ends


def test_the_shortest_unit_takes_what_is_left_over() -> None:
    assert unit_slots([20, 24, 40], 7, 3) == [3, 1, 3]


def test_gists_of_a_sentence_differ(method: Compressor, ids: Tensor) -> None:
    assert isinstance(method, SentenceAnchored)
    source = method.layout(ids).source
    first = source[source < 0][:3].tolist()
    assert first == [-1, -2, -3]
    starts = method.gist_inputs(method.backbone.embed(ids), method.layout(ids))
    assert not torch.equal(starts[0], starts[1])
    assert len(method.gists) == 3


def test_later_text_never_reaches_earlier_gists(
    method: Compressor, unchanged: Callable[..., list[int]]
) -> None:
    """12 gists in four units; the last unit's text is for its own gists only."""
    assert unchanged(method, [47]) == list(range(9))


def test_earlier_text_reaches_later_units_through_gists_only(
    method: Compressor, ids: Tensor
) -> None:
    """With gists out of sight, too, a unit is as if it stood alone."""
    layout = method.layout(ids)
    first = int((layout.source < 0).nonzero()[0])  # slots before it: the first unit's text
    later = layout.mask()[first + 3 :, :first]
    assert not bool(later.any())


def test_language_term_learns(method: Compressor, ids: Tensor, lowers: Callable[..., bool]) -> None:
    def loss() -> Tensor:
        return method.language_loss(method.encode([ids])[-1], [ids], [method.layout(ids)])

    assert lowers(method, loss)
