"""Thoughts to learn from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gist_rag.errors import BadInput
from gist_rag.train.config import TrainConfig
from gist_rag.train.loop import Report, train
from gist_rag.train.traces import Traces, load_traces

ROWS = [
    {
        "question": f"A shelf holds {n} books and {n} more come. How many are there?",
        "answer": f"There are {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} books.\n#### {2 * n}",
    }
    for n in range(2, 10)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "traces.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.write("\n".join(json.dumps(row) for row in ROWS))
    return path


def test_steps_become_thoughts(file: Path) -> None:
    first = load_traces(file)[0]
    assert first.answer == "There are 2+2=4 books.\n\nThe answer is 4"
    assert first.question.endswith("How many are there?")


def test_every_trace_comes_before_one_comes_twice(file: Path) -> None:
    config = TrainConfig.read(
        {"method": "light_thinker", "data": [file], "out": "unused", "batch_size": 4}
    )
    supply = Traces(config, lambda text: len(text.split()))
    batches = [supply.batch(step)[0] for step in range(3)]
    assert len({e.question for batch in batches[:2] for e in batch}) == 8
    assert batches[2] == batches[0]


@pytest.mark.parametrize("line", ["{}", "no json", '{"question": "?"}', "[]"])
def test_bad_rows_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(BadInput, match="line 1"):
        load_traces(path)


def run(file: Path, model: Path, out: Path, **changes: Any) -> list[Report]:
    settings = {
        "method": "light_thinker",
        "task": "thoughts",
        "data": [file],
        "out": out,
        "model": str(model),
        "device": "cpu",
        "steps": 15,
        "batch_size": 2,
        "lr": 2e-2,
        "log_every": 1,
        "settings": {"cache_tokens": 2},
    }
    reports: list[Report] = []
    train(TrainConfig.read(settings | changes), reports.append)
    return reports


@pytest.mark.slow
def test_thinking_is_learnt(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    reports = run(file, tiny_model_folder, tmp_path / "run")
    assert reports[-1].losses["lm"] < 0.8 * reports[0].losses["lm"]
    assert (tmp_path / "run" / "compressor.safetensors").exists()


@pytest.mark.slow
def test_gates_learn_from_thoughts(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    settings = {"start": 2.0, "width": 16}
    out = tmp_path / "run"
    reports = run(file, tiny_model_folder, out, method="trim_kv", settings=settings)
    first, last = (sum(reports[i].losses.values()) for i in (0, -1))
    assert reports[0].losses.keys() == {"kl", "ce", "cap"}
    assert last < first


def test_others_compress_no_thoughts(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not compress its own thoughts"):
        run(file, tiny_model_folder, tmp_path / "run", method="gisting", settings={})


@pytest.mark.slow
def test_a_reader_learns_to_write_them(file: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    reports = run(file, tiny_model_folder, tmp_path / "run", method="reader", settings={})
    assert reports[-1].losses["ce"] < 0.8 * reports[0].losses["ce"]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
