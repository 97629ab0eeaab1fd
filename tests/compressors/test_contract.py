"""What every compressor promises, over the whole registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import compose, place
from gist_rag.compressors import COMPRESSORS, Compressor, make_compressor
from gist_rag.errors import BadInput, PassageTooLong, UnknownCompressor
from gist_rag.store import pack, unpack
from gist_rag.types import GistState, Passage

RATIO = 4.0


@pytest.fixture(params=sorted(COMPRESSORS))
def compressor(request: pytest.FixtureRequest, backbone: Backbone) -> Compressor:
    settings = {} if request.param == "full" else {"ratio": RATIO}
    return make_compressor(request.param, backbone, settings)


@pytest.fixture
def ids(backbone: Backbone, passages: list[Passage]) -> list[Tensor]:
    return [backbone.tokenize(p.text) for p in passages[:3]]


def compress(compressor: Compressor, ids: list[Tensor]) -> list[GistState]:
    with torch.no_grad():
        return compressor.compress(ids)


def test_shape_fits_the_backbone(
    compressor: Compressor, backbone: Backbone, ids: list[Tensor]
) -> None:
    for state, tokens in zip(compress(compressor, ids), ids, strict=True):
        assert (state.num_layers, state.num_heads) == (backbone.num_layers, backbone.num_heads)
        assert state.num_tokens == len(tokens)
        size = len(compressor.layout(tokens))
        room = state.span if state.bank is None else size  # a bank takes no positions
        assert 0 <= int(state.offsets.min()) <= int(state.offsets.max()) < room <= size


def test_ratio_is_what_was_asked_for(compressor: Compressor, ids: list[Tensor]) -> None:
    for state in compress(compressor, ids):
        assert state.ratio == pytest.approx(compressor.config.ratio, rel=0.05)


def test_a_batch_equals_one_by_one(compressor: Compressor, ids: list[Tensor]) -> None:
    for together, alone in zip(
        compress(compressor, ids), (compress(compressor, [i])[0] for i in ids), strict=True
    ):
        assert torch.equal(together.rows, alone.rows)
        assert torch.equal(together.offsets, alone.offsets)
        assert torch.allclose(together.keys, alone.keys, atol=1e-3)
        assert torch.allclose(together.bias, alone.bias, atol=1e-2)


def test_neighbours_do_not_leak(compressor: Compressor, ids: list[Tensor]) -> None:
    """A passage's state is the same whatever else is in its batch."""
    with_a = compress(compressor, [ids[0], ids[1]])[0]
    with_b = compress(compressor, [ids[0], ids[1].flip(0)])[0]
    assert torch.equal(with_a.keys, with_b.keys)
    assert torch.equal(with_a.values, with_b.values)


@pytest.mark.parametrize("method", sorted(COMPRESSORS))
def test_half_precision_is_read_stored_or_not(
    make_model: Callable[[str], Any],
    tokenizer: PreTrainedTokenizerFast,
    ids: list[Tensor],
    method: str,
) -> None:
    """Some parts of a state may have been worked out in float32."""
    backbone = Backbone(make_model("llama").bfloat16(), tokenizer)
    compressor = make_compressor(method, backbone, {"ratio": RATIO} if method != "full" else {})
    states = compress(compressor, ids)
    read = []
    for given in (states, [unpack(pack(state, "bf16")) for state in states]):
        placed, end = place(given, 0, "sequence")
        context = Context([backbone.prefix(ids[0][:0])], compose([placed], backbone))
        with torch.no_grad():
            read.append(backbone.read(context, [Local.after(ids[0][:9], end, len(placed))]))
    assert read[0].dtype == torch.bfloat16
    assert bool(read[0].isfinite().all())
    error = (read[0] - read[1]).abs().max() / (read[0].max() - read[0].min())
    assert error < 0.05


def test_compressing_leaves_the_backbone_alone(compressor: Compressor, ids: list[Tensor]) -> None:
    before = compressor.backbone.fingerprint
    compress(compressor, ids[:1])
    del compressor.backbone.__dict__["fingerprint"]
    assert compressor.backbone.fingerprint == before
    assert not any(p.requires_grad for p in compressor.backbone.model.parameters())


def test_save_and_load_gives_the_same_states(
    compressor: Compressor, backbone: Backbone, ids: list[Tensor], tmp_path: Path
) -> None:
    compressor.save_pretrained(tmp_path)
    loaded = make_compressor(tmp_path, backbone)
    assert loaded.fingerprint == compressor.fingerprint
    [ours], [theirs] = compress(compressor, ids[:1]), compress(loaded, ids[:1])
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


def test_a_setting_changes_the_fingerprint(backbone: Backbone) -> None:
    prints = {make_compressor("strided", backbone, {"ratio": r}).fingerprint for r in (2, 4, 8)}
    assert len(prints) == 3


def test_a_passage_without_tokens_is_refused(compressor: Compressor) -> None:
    with pytest.raises(BadInput, match="without tokens"):
        compressor.compress([torch.empty(0, dtype=torch.long)])


def test_a_passage_longer_than_the_window_is_refused(compressor: Compressor) -> None:
    with pytest.raises(PassageTooLong, match="split it first"):
        compressor.compress([torch.zeros(5000, dtype=torch.long)])


def test_one_token_can_be_compressed(compressor: Compressor, backbone: Backbone) -> None:
    [state] = compress(compressor, [backbone.tokenize("a")])
    assert state.num_tokens == 1
    assert state.num_slots >= 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("strided", {"ratio": 0.5}, "greater than or equal to 1"),
        ("strided", {"ratoi": 4}, "ratoi"),
        ("attention_matching", {"preset": "quick"}, "fast"),
        ("attention_matching", {"refine_steps": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_named(
    backbone: Backbone, name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        make_compressor(name, backbone, settings)


def test_unknown_method_lists_the_known_ones(backbone: Backbone) -> None:
    with pytest.raises(UnknownCompressor, match=r"attention_matching, .*full"):
        make_compressor("gist-o-matic", backbone)


def test_a_folder_without_a_compressor_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UnknownCompressor, match=r"compressor\.json"):
        make_compressor(tmp_path, backbone)
