"""A training run, on a tiny random model and the sample's questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.errors import BadInput, NotANumber
from gist_rag.models import load_model
from gist_rag.train.config import TrainConfig
from gist_rag.train.loop import Report, train

QUESTIONS = Path("gist_rag/data/sqlite_questions.jsonl").resolve()


@pytest.fixture
def settings(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "method": "gisting",
        "data": [QUESTIONS],
        "out": tmp_path / "run",
        "model": str(tiny_model_folder),
        "device": "cpu",
        "passages": (1, 2),
        "max_passage_tokens": 400,
        "ratios": [4.0],
        "steps": 6,
        "batch_size": 2,
        "lr": 5e-3,
        "save_every": 3,
        "log_every": 1,
    }


def run(settings: dict[str, Any], **changes: Any) -> list[Report]:
    reports: list[Report] = []
    train(TrainConfig.read(settings | changes), reports.append)
    return reports


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "compressor.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "own"),
    [("gisting", {"start": "learned", "positions": "paper"}), ("reader", {})],
    ids=["gisting", "reader"],
)
def test_training_lowers_the_loss(
    settings: dict[str, Any], method: str, own: dict[str, str]
) -> None:
    given = {"method": method, "settings": own, "passages": (1, 1)}
    reports = run(settings | given, steps=30, save_every=30, lr=2e-2)
    total = [sum(r.losses.values()) for r in reports]
    assert sum(total[-5:]) < 0.9 * sum(total[:5])
    assert [r.step for r in reports] == list(range(1, 31))
    log = (settings["out"] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 31))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_it_would_have(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = settings | {"out": tmp_path / "whole"}, settings
    run(whole)

    def stop(report: Report) -> None:
        if report.step == 5:  # after the checkpoint at 3, before the next
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig.read(broken), stop)
    assert [r.step for r in run(broken)] == [4, 5, 6]
    ours, theirs = weights(broken["out"]), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_was_trained_loads_by_folder(settings: dict[str, Any]) -> None:
    run(settings, steps=1)
    backbone = Backbone(*load_model(settings["model"]), name=settings["model"])
    compressor = make_compressor(settings["out"], backbone)
    ids = backbone.tokenize("SQLite reads and writes ordinary disk files.")
    [state] = compressor.compress([ids])
    assert state.ratio == pytest.approx(4, rel=0.3)


def test_a_trained_folder_can_go_on(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, steps=1)
    first = weights(settings["out"])
    again = settings | {"method": str(settings["out"]), "out": tmp_path / "again"}
    run(again, steps=2)
    later = weights(tmp_path / "again")
    assert first.keys() == later.keys()
    assert any(not torch.equal(first[name], later[name]) for name in first)


def test_the_teacher_is_the_plain_model(settings: dict[str, Any]) -> None:
    """A run changes its own parameters only: the model it borrowed is as it was."""
    from gist_rag.train.students import GistStudent

    backbone = Backbone(*load_model(settings["model"]), name=settings["model"])
    before = backbone.fingerprint
    student = GistStudent(backbone, TrainConfig.read(settings))
    borrowed = {id(p) for p in backbone.model.parameters()}
    assert not borrowed & {id(p) for p in student.parameters()}
    del backbone.__dict__["fingerprint"]
    assert backbone.fingerprint == before


def test_a_folder_of_another_run_is_refused(settings: dict[str, Any]) -> None:
    run(settings, steps=1)
    with pytest.raises(BadInput, match=r"other settings \(lr\)"):
        run(settings, steps=1, lr=1e-3)


def test_a_loss_that_is_no_number_stops_the_run(settings: dict[str, Any]) -> None:
    with pytest.raises(NotANumber, match=r"at step .* lower lr than 1e\+30"):
        run(settings, steps=20, save_every=1, lr=1e30, clip=1e30)
    kept = weights(settings["out"])
    assert kept
    assert all(bool(w.isfinite().all()) for w in kept.values())


def test_a_loss_term_that_does_not_exist_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="no loss term mse; there are ce, kl"):
        run(settings, weights={"mse": 1.0})


def test_a_term_that_does_not_exist_may_have_no_weight(settings: dict[str, Any]) -> None:
    """So that one file of settings serves methods with different terms."""
    [report] = run(settings, steps=1, weights={"mse": 0.0})
    assert report.losses.keys() == {"kl", "ce"}


def test_terms_of_no_weight_are_left_out(settings: dict[str, Any]) -> None:
    [report] = run(settings, steps=1, weights={"ce": 0.0})
    assert report.losses.keys() == {"kl"}
    with pytest.raises(BadInput, match="every loss term has weight 0: ce, kl"):
        run(settings, out=settings["out"] / "none", weights={"kl": 0.0, "ce": 0.0})


@pytest.mark.slow
def test_passages_alone_teach_too(settings: dict[str, Any]) -> None:
    """No question is asked, and targets are found once for each passage."""
    alone = {"questions_per_context": 0, "weights": {"match": 1.0}, "passages": (1, 1)}
    reports = run(settings, **alone, steps=30, save_every=30, lr=2e-2)
    assert all(report.losses.keys() == {"match"} for report in reports)
    matched = [report.losses["match"] for report in reports]
    assert sum(matched[-5:]) < 0.9 * sum(matched[:5])


@pytest.mark.parametrize("method", ["gisting", "incomes"])
def test_a_passage_is_taught_by_repeating_it(settings: dict[str, Any], method: str) -> None:
    """From any gists that can be read, those of a bank too."""
    alone = {"questions_per_context": 0, "weights": {"repeat": 1.0}, "passages": (1, 1)}
    reports = run(settings, method=method, **alone, steps=2)
    assert all(report.losses.keys() == {"repeat"} for report in reports)
    assert all(0 < report.losses["repeat"] < 20 for report in reports)


@pytest.mark.slow
def test_gates_learn_to_foretell_what_a_repetition_looks_at(settings: dict[str, Any]) -> None:
    alone = {"questions_per_context": 0, "weights": {"score": 1.0, "cap": 0.0}, "passages": (1, 1)}
    gates = {"method": "trim_kv", "settings": {"budget": "global", "start": 4.0}}
    reports = run(settings | alone | gates, steps=30, save_every=30, lr=1e-2)
    scored = [report.losses["score"] for report in reports]
    assert sum(scored[-5:]) < 0.5 * sum(scored[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions_per_context": 0}, r"no loss: .*match, score or repeat"),
        ({"method": "incomes", "weights": {"match": 1.0}}, "a bank"),
        ({"method": "gisting", "weights": {"score": 1.0}}, "keeps no tokens that could be scored"),
    ],
    ids=["no questions", "a bank", "no tokens"],
)
def test_where_nothing_is_taught_is_said(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run(settings, **changes)


def test_a_method_without_parameters_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="nothing to train"):
        run(settings, method="strided")
