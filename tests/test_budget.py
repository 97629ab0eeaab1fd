"""What the gists of a prompt may take together, and at which of its ratios each is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.budget import TOLERANCE, Budget, make_budget
from gist_rag.compressors import make_compressor
from gist_rag.compressors.base import ratio_settings
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.focus import Expand, Focus
from gist_rag.rag import GistRAG
from gist_rag.store import GistStore
from gist_rag.types import Answer, GistState, Passage, Sampling

QUESTION = "\n\nWhat is SQLite?"
NESTED = {"ratio": 2, "coarser": [4, 8]}
Engines = Callable[..., GistEngine]


def prompt(passages: list[Passage]) -> str:
    return "Documents:\n" + "\n\n".join(p.text for p in passages) + QUESTION


def ask(engine: GistEngine, text: str) -> Answer:
    return engine.generate(text, Sampling(max_tokens=4))


@pytest.fixture
def ids(backbone: Backbone, passages: list[Passage]) -> list[Tensor]:
    return [backbone.tokenize(p.text) for p in passages[:3]]


@pytest.fixture
def states(backbone: Backbone, ids: list[Tensor]) -> list[GistState]:
    return make_compressor("attention_matching", backbone, NESTED).compress(ids)


def read(chosen: list[GistState | None], states: list[GistState]) -> list[int | None]:
    """Which ratio of its passage each is."""
    of = {id(level): n for state in states for n, level in enumerate([state, *state.coarser])}
    return [None if level is None else of[id(level)] for level in chosen]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("attention_matching", {}),
        ("attention_matching", {"preset": "fast", "budget": "head"}),
        ("attention_matching", {"preset": "thorough"}),
        ("attention_matching", {"preset": "best", "refine_steps": 2}),
        ("trim_kv", {}),
        ("trim_kv", {"budget": "global"}),
    ],
    ids=str,
)
def test_each_ratio_is_what_it_would_be_alone(
    backbone: Backbone, ids: list[Tensor], name: str, settings: dict[str, object]
) -> None:
    torch.manual_seed(0)
    compressor = make_compressor(name, backbone, settings | NESTED)
    with torch.no_grad():
        nested = compressor.compress(ids)
        for place, ratio in enumerate(compressor.config.ratios):
            compressor.config = type(compressor.config).model_validate(settings | {"ratio": ratio})
            for state, alone in zip(nested, compressor.compress(ids), strict=True):
                level = [state, *state.coarser][place]
                assert level.ratio == pytest.approx(ratio, rel=0.05)
                assert torch.equal(level.rows, alone.rows)
                assert torch.allclose(level.keys, alone.keys, atol=1e-4)
                assert torch.allclose(level.values, alone.values, atol=1e-3)
                assert torch.allclose(level.bias, alone.bias, atol=1e-3)


def test_ratios_must_rise(backbone: Backbone, tmp_path: Path) -> None:
    make_compressor("trim_kv", backbone).save_pretrained(tmp_path / "trained")
    for name in ("attention_matching", tmp_path / "trained"):
        for coarser in ([1.5], [2], [8, 4]):
            with pytest.raises(BadInput, match="coarser ratios must rise, all above 2"):
                make_compressor(name, backbone, {"ratio": 2, "coarser": coarser})
        for coarser in (8, None, ["x"], [float("nan")], [float("inf")]):
            with pytest.raises(BadInput, match="coarser"):
                make_compressor(name, backbone, {"ratio": 2, "coarser": coarser})
    with pytest.raises(BadInput, match="coarser"):
        make_compressor("strided", backbone, {"ratio": 2, "coarser": [4]})


def test_ratios_as_they_are_given() -> None:
    assert ratio_settings(None) == {}
    assert ratio_settings("8") == {"ratio": "8"}  # for pydantic to read
    assert ratio_settings(np.int64(8)) == {"ratio": 8}
    assert ratio_settings([8]) == ratio_settings((8,)) == {"ratio": 8}
    assert ratio_settings([4, 8, 16]) == {"ratio": 4, "coarser": [8, 16]}
    with pytest.raises(BadInput, match="ratio is empty"):
        ratio_settings([])


def test_gists_of_one_ratio_are_those_of_before_there_were_several(backbone: Backbone) -> None:
    """So that their space is the same, and stores of then are read."""
    compressor = make_compressor("attention_matching", backbone)
    assert "coarser" not in compressor.describe()["settings"]
    one = compressor.fingerprint
    compressor.set_ratio(8, 16)
    assert compressor.describe()["settings"]["coarser"] == [16]
    assert compressor.fingerprint != one


@pytest.mark.parametrize("name", ["attention_matching", "trim_kv"])
def test_a_store_of_several_ratios_is_opened_again(
    tiny_model_folder: Path, passages: list[Passage], tmp_path: Path, name: str
) -> None:
    """By its names, or where the weights of a trained compressor lie in a folder."""
    with GistEngine.from_pretrained(str(tiny_model_folder)) as engine:
        made = make_compressor(name, engine.backbone)
        made.save_pretrained(tmp_path / "compressor")
    compressor = tmp_path / "compressor" if made.trained else name
    with GistEngine.from_pretrained(
        str(tiny_model_folder), tmp_path / "store", compressor=compressor, ratio=[2, 4, 8]
    ) as engine:
        GistRAG(engine).build(passages[:3])
    with GistRAG.open(tmp_path / "store", budget="8x") as rag:
        stats = rag.ask("What is SQLite?", k=3, sampling=Sampling(max_tokens=2)).stats
        assert stats.hits == 3
        assert stats.ratio == pytest.approx(8, rel=0.06)


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        (400, Budget(400)),
        ("400", Budget(400)),
        ("16x", Budget(16, "ratio")),
        ("2.5MB", Budget(2.5e6, "bytes")),
        (" 3 KB ", Budget(3e3, "bytes")),
        (None, None),
        (Budget(7), Budget(7)),
    ],
)
def test_budgets_as_they_are_written(written: str | int | None, budget: Budget | None) -> None:
    assert make_budget(written) == budget


@pytest.mark.parametrize("given", [(float("nan"), "slots"), (float("inf"), "slots"), (5, "slot")])
def test_what_no_budget_can_be(given: tuple[float, Any]) -> None:
    with pytest.raises(BadInput, match="budget"):
        Budget(*given)


@pytest.mark.parametrize("written", ["x", "16y", "-4", "1e3", "", "0.5", "0x", 0])
def test_what_is_no_budget(written: str | int) -> None:
    with pytest.raises(BadInput, match="budget"):
        make_budget(written)


def test_what_matters_most_is_read_finest(states: list[GistState]) -> None:
    judged = torch.tensor([1.0, 3.0, 2.0])
    sizes = [[s.mean_slots for s in (state, *state.coarser)] for state in states]
    coarsest = sum(size[2] for size in sizes)
    for budget, levels in (
        (Budget(coarsest), [2, 2, 2]),
        (Budget(coarsest - 1), [None, 2, 1]),
        (Budget(1), [None, 2, None]),
        (Budget(coarsest + sizes[1][0] - sizes[1][2]), [2, 0, 2]),
        (Budget(sizes[1][0] + sizes[2][1] + sizes[0][2]), [2, 0, 1]),
        (Budget(sum(size[0] for size in sizes)), [0, 0, 0]),
        (Budget(2, "ratio"), [0, 0, 0]),
        (Budget(8, "ratio"), [2, 2, 2]),
        (Budget(sum(s.num_bytes for s in states), "bytes"), [0, 0, 0]),
        (Budget(sum(s.coarser[1].num_bytes for s in states), "bytes"), [2, 2, 2]),
    ):
        assert read(budget.chosen(states, judged), states) == levels, budget
    one_fine = Budget(coarsest + sizes[0][0] - sizes[0][2])
    assert read(one_fine.chosen(states), states) == [0, 2, 2]  # nobody judges: the first one most
    assert Budget(1).chosen([]) == []


def test_a_prompt_stays_within_its_budget(
    make_engine: Engines, passages: list[Passage], ids: list[Tensor]
) -> None:
    """Read from the disk, whatever the codec; the passage that weighs most takes most slots for
    its tokens. What is left out is told."""
    tokens = sum(map(len, ids))
    for codec in ("bf16", "int8", "int4"):
        engine = make_engine(
            settings=NESTED, codec=codec, judge="likelihood", budget=make_budget("4x")
        )
        engine.precompute(passages[:3])
        answer = ask(engine, prompt(passages[:3]))
        assert tokens / 8 < answer.stats.gist_slots <= TOLERANCE * tokens / 4
        assert (answer.stats.hits, answer.stats.left_out) == (3, 0)
        assert max(answer.weights) == 1
        assert engine.count(prompt(passages[:3])) == pytest.approx(answer.stats.input_tokens, abs=6)

        small = make_engine(settings=NESTED, codec=codec, judge="likelihood", budget=Budget(1))
        answer = ask(small, prompt(passages[:3]))
        assert (answer.stats.hits, answer.stats.left_out) == (1, 2)
        assert answer.weights == [1]


def test_a_passage_within_a_budget_is_read_as_if_it_had_that_ratio_only(
    make_engine: Engines, passages: list[Passage]
) -> None:
    fitted = make_engine(settings=NESTED, budget=make_budget("8x"))
    fitted.precompute(passages[:3])
    alone = make_engine(settings={"ratio": 8})
    alone.precompute(passages[:3])
    assert ask(fitted, prompt(passages[:3])).text == ask(alone, prompt(passages[:3])).text
    unlimited = make_engine(settings=NESTED)
    finest = make_engine(settings={"ratio": 2})
    finest.precompute(passages[:3])
    slots = [ask(e, prompt(passages[:3])).stats.gist_slots for e in (unlimited, finest)]
    assert slots[0] == slots[1] > ask(fitted, prompt(passages[:3])).stats.gist_slots


@pytest.mark.parametrize(
    "options", [{}, {"judge": "likelihood"}, {"focus": Focus(2)}, {"expand": Expand(0.0)}], ids=str
)
def test_each_prompt_of_a_batch_has_its_own(
    make_engine: Engines, passages: list[Passage], options: dict[str, object]
) -> None:
    """The same passage is fine in one and coarse in another."""
    engine = make_engine(settings=NESTED, budget=Budget(60), **options)
    engine.precompute(passages[:4])
    prompts = [prompt(passages[:1]), prompt(passages[:4]), prompt(passages[3:0:-1]), QUESTION]
    together = engine.batch(prompts, Sampling(max_tokens=4))
    alone = [engine.batch([p], Sampling(max_tokens=4))[0] for p in prompts]
    assert [a.text for a in together] == [a.text for a in alone]
    slots = [a.stats.gist_slots for a in together]
    assert slots == [a.stats.gist_slots for a in alone]
    assert max(slots) <= 60
    stats = [a.stats for a in together]
    assert [s.hits + s.left_out + s.expanded for s in stats] == [1, 4, 3, 0]


@pytest.mark.parametrize("judge", [None, "likelihood"])
def test_a_passage_that_stands_twice_costs_twice(
    make_engine: Engines, passages: list[Passage], ids: list[Tensor], judge: str | None
) -> None:
    tokens = len(ids[0])
    text = "\n\nAgain:\n".join([passages[0].text] * 2) + QUESTION
    for slots, ratio in ((tokens + 1, 2), (tokens - 1, 4), (tokens / 2 - 1, 8)):
        engine = make_engine(settings=NESTED, judge=judge, budget=Budget(slots))
        engine.precompute(passages[:1])
        stats = ask(engine, text).stats
        assert (stats.hits, stats.left_out) == (2, 0)
        assert stats.gist_slots == pytest.approx(2 * tokens / ratio, rel=0.02)


def test_bytes_are_those_of_what_is_read(make_engine: Engines, passages: list[Passage]) -> None:
    for codec in ("bf16", "int8", "int4"):
        engine = make_engine(settings=NESTED, codec=codec)
        done = engine.precompute(passages[:1])
        alone = make_engine(settings={"ratio": 2}, codec=codec)
        assert ask(engine, prompt(passages[:1])).stats.num_bytes < done.num_bytes
        size = alone.precompute(passages[:1]).num_bytes
        assert ask(engine, prompt(passages[:1])).stats.num_bytes == size
        limit = size / 3
        small = make_engine(settings=NESTED, codec=codec, budget=Budget(limit, "bytes"))
        assert size / 5 < ask(small, prompt(passages[:1])).stats.num_bytes <= limit


def test_passages_apart_have_no_budget(make_engine: Engines) -> None:
    with pytest.raises(BadInput, match="apart or budget"):
        make_engine(focus=Focus(2, apart=True), budget=Budget(60))
    with pytest.raises(BadInput, match="apart or budget"):  # before a model is looked for
        GistEngine.from_pretrained("/no/such/model", apart=2, budget=60)


def test_all_ratios_are_stored_in_one_entry(
    make_engine: Engines, passages: list[Passage], states: list[GistState]
) -> None:
    engine = make_engine(settings=NESTED)
    done = engine.precompute(passages[:3])
    assert done.written == 3
    with GistStore.open(engine.store.path, read_only=True) as store:
        assert len(list(store.passages(engine.space))) == 3
    levels = [s for state in states for s in (state, *state.coarser)]
    whole = sum(level.num_slots for level in levels) * 2 * states[0].keys.shape[1] * 2
    assert whole < done.num_bytes < 1.3 * whole
