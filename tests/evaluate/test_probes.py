"""Probes: generated tasks, and what they measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gist_rag.errors import BadInput
from gist_rag.evaluate.config import EvaluateConfig
from gist_rag.evaluate.probes import KV_RECORDS, PROBES, make_probe
from gist_rag.evaluate.runner import evaluate
from gist_rag.evaluate.tasks import NUM_CHOICES, Task

KINDS = {
    "boundary": ["start", "middle", "end"],
    "surprise": ["related", "unrelated"],
    "punctuation": ["with", "without"],
}


def probe(name: str, **changes: Any) -> Task:
    return make_probe(name, **{"num_passages": 1, "limit": 12, "seed": 0, **changes})


@pytest.mark.parametrize("name", PROBES)
def test_every_passage_holds_its_answer(name: str) -> None:
    examples = probe(name).examples
    assert len(examples) == 12
    for example in examples:
        assert example.passages[0].count(example.answers[0]) == 1
        assert example.answers[0] not in example.question
        assert len(set(example.choices)) == len(example.choices) <= NUM_CHOICES - 1
        assert example.answers[0] not in example.choices
    assert len({e.id for e in examples}) == 12


@pytest.mark.parametrize("name", PROBES)
def test_the_same_seed_gives_the_same_items(name: str) -> None:
    assert probe(name).examples == probe(name).examples
    assert probe(name).examples != probe(name, seed=1).examples


def test_more_questions_begin_with_the_fewer() -> None:
    few, many = probe("along", limit=3).examples, probe("along", limit=9).examples
    assert [e.passages for e in few] == [e.passages for e in many[:3]]


@pytest.mark.parametrize(("name", "kinds"), KINDS.items(), ids=KINDS)
def test_variants_differ_in_what_is_probed_only(name: str, kinds: list[str]) -> None:
    examples = probe(name).examples[: len(kinds)]
    assert [e.id.partition("/")[0] for e in examples] == kinds
    assert len({e.answers for e in examples}) == 1
    words = {
        "boundary": lambda text: sorted(text.split()),
        "punctuation": lambda text: text.replace(".", "").split(),
        "surprise": lambda text: len(text.split()),
    }[name]
    assert len({json.dumps(words(e.passages[0])) for e in examples}) == 1


def test_a_fact_at_the_boundary_comes_first() -> None:
    start, _, end = probe("boundary").examples[:3]
    assert start.passages[0].startswith("The code of the")
    assert end.passages[0].endswith(f"is {end.answers[0]}.")


def test_other_passages_stand_beside() -> None:
    for example in probe("along", num_passages=3).examples:
        assert len(example.passages) == 3
        assert sum(example.answers[0] in text for text in example.passages) == 1


@pytest.mark.parametrize(
    ("right", "scores"),
    [(0, [0, 0, 0]), (8, [1, 0, 0]), (20, [1, 1, 0]), (32, [1, 1, 1])],
)
def test_a_string_is_right_as_far_as_it_goes(right: int, scores: list[int]) -> None:
    task = probe("along")
    example = task.examples[0]
    answer = f"It is {example.answers[0][:right]}zz."
    assert list(task.score(example, answer).values()) == scores


def test_variants_are_scored_apart() -> None:
    task = probe("boundary")
    start, middle, _ = task.examples[:3]
    assert task.score(start, f"It is {start.answers[0]}.") == {"start": 1.0}
    assert task.score(middle, "No idea") == {"middle": 0.0}


def test_keys_may_come_from_a_file(tmp_path: Path) -> None:
    records = [[f"key-{i}", f"value-{i:04}"] for i in range(40)]
    path = tmp_path / "kv.jsonl"
    path.write_text(json.dumps({"ordered_kv_records": records, "key": "key-7", "value": "v"}))
    with pytest.raises(BadInput, match="leave out"):
        probe("along", file=path)
    [example, *_] = probe("key_value", file=path, limit=2).examples
    assert "key-7" in example.question
    assert example.passages[0].count("\n") == KV_RECORDS - 1


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kv.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"kv\.jsonl"):
        probe("key_value", file=path)


def test_no_more_passages_than_there_are() -> None:
    with pytest.raises(BadInput, match="61 passages at most"):
        probe("along", num_passages=62)


def test_an_unknown_probe_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="boundary, surprise, along"):
        probe("boundry")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["boundary", "along"])
def test_results_have_the_probes_scores(tiny_model_folder: Path, name: str) -> None:
    config = EvaluateConfig(
        probe=name, model=str(tiny_model_folder), ratio=4, limit=3, arms=("strided", "unigist")
    )
    result = evaluate(config)
    assert list(result["arms"]) == ["closed", "full", "strided", "unigist"]
    wanted = KINDS.get(name, ["first_8", "first_16", "first_32"])
    for arm in result["arms"].values():
        assert list(arm["scores"]) == wanted
        assert all(0 <= score <= 1 for score in arm["scores"].values())
    assert result["meta"]["probe"] == name
    json.dumps(result)


def test_neither_task_nor_probe_is_refused() -> None:
    with pytest.raises(BadInput, match="give one of them"):
        evaluate(EvaluateConfig())
