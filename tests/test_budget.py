"""What the gists of a prompt may take together, and at which of its ratios each is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.budget import Budget, make_budget
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.focus import Expand, Focus
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
                assert torch.allclose(level.bias, alone.bias, atol=1e-3)


def test_ratios_must_rise(backbone: Backbone) -> None:
    for coarser in ([1.5], [2], [8, 4]):
        with pytest.raises(BadInput, match="coarser ratios must rise, all above 2"):
            make_compressor("attention_matching", backbone, {"ratio": 2, "coarser": coarser})
    with pytest.raises(BadInput, match="coarser"):
        make_compressor("strided", backbone, {"ratio": 2, "coarser": [4]})


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
        assert tokens / 8 < answer.stats.gist_slots <= tokens / 4 + 1.5
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


def test_passages_apart_have_no_budget(make_engine: Engines) -> None:
    with pytest.raises(BadInput, match="apart or budget"):
        make_engine(focus=Focus(2, apart=True), budget=Budget(60))


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
