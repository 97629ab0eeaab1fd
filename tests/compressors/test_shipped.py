"""The trained compressors that ship, with the model that they were trained for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.compressors.registry import SHIPPED, shipped
from gist_rag.compressors.repeat import Repeater
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput, UnknownCompressor
from gist_rag.losses import cross_entropy
from gist_rag.rag import GistRAG
from gist_rag.sample import sample_passages

pytestmark = [pytest.mark.slow, pytest.mark.model]


KEEP_TOKENS = ("trim_kv-4x",)
"""Those that choose tokens: what they keep of a passage suffices to repeat it."""


@pytest.fixture(params=shipped())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_are_some() -> None:
    assert shipped()


@pytest.mark.parametrize("name", KEEP_TOKENS)
@torch.no_grad()
def test_it_is_far_better_than_controls(name: str, embedded_backbone: Backbone) -> None:
    """On passages that it has not learnt from: how well the model repeats them."""
    ids = [embedded_backbone.tokenize(p.text) for p in sample_passages()[:2]]
    trained = make_compressor(name, embedded_backbone)
    control = make_compressor("strided", embedded_backbone, {"ratio": trained.config.ratio})
    errors = {
        method.name: float(
            cross_entropy(
                torch.cat(Repeater(embedded_backbone).read(method.compress(ids), ids)),
                torch.cat(ids),
            ).mean()
        )
        for method in (trained, control)
    }
    assert errors[trained.name] < 0.8 * errors[control.name]


@pytest.mark.parametrize("name", KEEP_TOKENS)
@torch.no_grad()
def test_heads_get_more_of_a_passage_than_from_controls(
    name: str, embedded_backbone: Backbone
) -> None:
    """On passages that it has not learnt from: how far each head is from the whole passage."""
    ids = [embedded_backbone.tokenize(p.text) for p in sample_passages()[:2]]
    repeater, full = Repeater(embedded_backbone), make_compressor("full", embedded_backbone)
    repeat = repeater(full.compress(ids), ids)
    targets = [repeater.target(repeat, row, 48) for row in range(len(ids))]
    trained = make_compressor(name, embedded_backbone)
    control = make_compressor("strided", embedded_backbone, {"ratio": trained.config.ratio})
    errors = {
        method.name: sum(
            float(repeater.error(target, state))
            for target, state in zip(targets, method.compress(ids), strict=True)
        )
        for method in (trained, control)
    }
    assert errors[trained.name] < 0.9 * errors[control.name]


@torch.no_grad()
def test_gates_keep_what_a_repetition_looks_at(embedded_backbone: Backbone) -> None:
    """Without having the model repeat anything; a choice at random would share a quarter."""
    ids = [embedded_backbone.tokenize(p.text) for p in sample_passages()[:4]]
    matching = {"ratio": 4.0, "preset": "fast"}
    kept = [
        [
            {*zip(s.row_of_slot().tolist(), s.offsets.tolist(), strict=True)}
            for s in make_compressor(name, embedded_backbone, settings).compress(ids)
        ]
        for name, settings in (("attention_matching", matching), ("trim_kv-4x", {"ratio": 4.0}))
    ]
    for wanted, ours in zip(*kept, strict=True):
        assert len(wanted & ours) > 0.7 * len(wanted)


@torch.no_grad()
def test_gists_ship_with_what_they_have_learnt(name: str, embedded_backbone: Backbone) -> None:
    """They are not those of the same method untrained."""
    ids = [embedded_backbone.tokenize(sample_passages()[0].text)]
    trained = make_compressor(name, embedded_backbone)
    settings = trained.config.model_dump(mode="json")
    untrained = make_compressor(trained.name, embedded_backbone, settings)
    one, other = (method.compress(ids)[0] for method in (trained, untrained))
    same = one.num_slots == other.num_slots and torch.equal(one.offsets, other.offsets)
    assert not same or float((one.keys - other.keys).norm() / other.keys.norm()) > 0.01


def test_another_ratio_is_another_space(name: str, embedded_backbone: Backbone) -> None:
    own, other = (make_compressor(name, embedded_backbone, s) for s in (None, {"ratio": 6.0}))
    ids = embedded_backbone.tokenize(sample_passages()[0].text)
    assert other.compress([ids])[0].ratio == pytest.approx(6, rel=0.3)
    assert own.fingerprint != other.fingerprint
    with pytest.raises(BadInput, match="greater than or equal to 1"):
        make_compressor(name, embedded_backbone, {"ratio": 0.5})
    with pytest.raises(BadInput, match="leave out budget"):
        make_compressor(name, embedded_backbone, {"budget": "head"})


def test_it_belongs_to_one_model(name: str, backbone: Backbone) -> None:
    with pytest.raises(BadInput, match="which is not tiny-llama"):
        make_compressor(name, backbone)


def test_a_store_finds_it_again_by_its_name(
    name: str, embedded_backbone: Backbone, tmp_path: Path
) -> None:
    compressor = make_compressor(name, embedded_backbone, {"ratio": 6.0})
    with GistRAG(GistEngine(embedded_backbone, compressor, tmp_path)) as rag:
        rag.build(sample_passages()[:2])
        space = rag.engine.space
        assert rag.engine.describe()["folder"] == name
    with GistRAG.open(tmp_path) as rag:
        assert rag.engine.space == space
        assert rag.engine.compressor.config.ratio == 6.0


def test_how_it_was_made_lies_beside_it(name: str) -> None:
    files = {path.name for path in (SHIPPED / name).iterdir()}
    assert files == {"compressor.json", "compressor.safetensors", "log.jsonl", "train.json"}


def test_no_such_name_lists_those_there_are(backbone: Backbone) -> None:
    with pytest.raises(UnknownCompressor, match=shipped()[0]):
        make_compressor("no-such-compressor", backbone)
