"""The ``gist-rag`` command: precompute | ask | demo | train | evaluate | bench | info | verify.

What needs torch is imported inside the commands, so that ``--help`` comes at once. Results go to
stdout, progress and messages to stderr. Exit codes: 2 for input that cannot be used, 1 for what
failed or was found broken, 130 for an interrupted ``precompute``.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gist_rag.errors import BadInput, GistRagError
from gist_rag.models import DEFAULT_EMBEDDER, DEFAULT_RAG_MODEL

if TYPE_CHECKING:
    from gist_rag.store import GistStore
    from gist_rag.train.loop import Report

PACKAGES = (
    "gist-rag",
    "torch",
    "transformers",
    "faiss-cpu",
    "sentence-transformers",
    "langchain-core",
    "llama-index-core",
    "triton",
)

COMPRESSOR = "attention_matching"
"""``compressors.DEFAULT_COMPRESSOR``, which needs torch."""

app = typer.Typer(
    help="Compress RAG passages once into small KV states, and answer from those.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench, name="bench")
console = Console()
messages = Console(stderr=True)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
Model = Annotated[str, typer.Option(help="Alias, local folder or Hugging Face id.")]
Method = Annotated[str, typer.Option(help="Name of a method, or folder of a trained compressor.")]
ReaderFolder = Annotated[
    str | None, typer.Option("--reader", help="Who answers: alias or folder of a trained reader.")
]
Dtype = Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, float16.")]
Ratio = Annotated[
    str, typer.Option(help="Tokens per kept slot; or several, finest first: 4,8,16, for --budget.")
]
Preset = Annotated[str | None, typer.Option(help="fast, balanced, thorough or best.")]
RefineSteps = Annotated[int | None, typer.Option(help="Steps of refinement per passage.")]


def main() -> None:
    """Entry point of the console script."""
    app()


@app.callback()
def _configure() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("gist_rag").setLevel(logging.INFO)


@app.command()
def precompute(
    corpus: Annotated[Path, typer.Option(help="JSONL file of passages, or .jsonl.gz.")],
    store: StoreFolder,
    model: Model = DEFAULT_RAG_MODEL,
    compressor: Method = COMPRESSOR,
    ratio: Ratio = "",
    preset: Preset = None,
    refine_steps: RefineSteps = None,
    codec: Annotated[str, typer.Option(help="bf16, int8 or int4.")] = "bf16",
    namespace: Annotated[str, typer.Option(help="Tenant whose gists these are.")] = "",
    limit: Annotated[int | None, typer.Option(help="Take the first N passages.")] = None,
    no_title: Annotated[bool, typer.Option("--no-title", help="Leave titles out.")] = False,
    no_index: Annotated[bool, typer.Option("--no-index", help="Make no FAISS index.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a corpus into a store and index it. Run again, it goes on where it was stopped.

    A line of the corpus is {"id": ..., "title": ..., "text": ...}; only the text is needed.
    """
    with _reported(as_json), _interruptible():
        from gist_rag.engine import GistEngine
        from gist_rag.rag import GistRAG
        from gist_rag.retrieval import read_corpus

        passages = read_corpus(corpus, with_title=not no_title, limit=limit)
        with _loading(model):
            engine = GistEngine.from_pretrained(
                model,
                store,
                compressor=compressor,
                ratio=_numbers("--ratio", ratio, float) or None,
                settings=_given(preset=preset, refine_steps=refine_steps),
                codec=codec,
                namespace=namespace,
            )
        with engine, _bar("passages", hidden=as_json) as progress:
            fill = engine.precompute if no_index else GistRAG(engine).build
            done = fill(passages, progress=progress)
        text_bytes = sum(len(passage.text.encode()) for passage in passages)
        report = {
            "passages": done.passages,
            "written": done.written,
            "skipped": done.skipped,
            "tokens": done.tokens,
            "seconds": round(done.seconds, 2),
            "tokens_per_second": round(done.tokens / done.seconds, 1),
            "bytes_per_passage": round(done.num_bytes / done.written) if done.written else None,
            "text_bytes_per_passage": round(text_bytes / done.passages),
            "ratio": engine.compressor.config.ratio,
            "coarser": list(getattr(engine.compressor.config, "coarser", ())),
            "indexed": not no_index,
        }
        _show(report, as_json, _precompute_lines)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    store: StoreFolder,
    k: Annotated[int, typer.Option("-k", help="Passages to retrieve.")] = 5,
    full_text: Annotated[bool, typer.Option("--full-text", help="Read text, not gists.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    namespace: Annotated[
        str | None, typer.Option(help="Whose gists, where a store has several namespaces.")
    ] = None,
    reader: ReaderFolder = None,
    judge: Annotated[
        str,
        typer.Option(
            help="Who weighs passages: index (its embedder), likelihood (the model), the name of "
            "an embedder, or none. auto: index, but none with --focus or --apart."
        ),
    ] = "auto",
    focus: Annotated[
        int | None, typer.Option(min=1, help="Read only so many passages: those that matter most.")
    ] = None,
    apart: Annotated[
        int | None,
        typer.Option(min=1, help="So many, each read by itself, answer with all together."),
    ] = None,
    expand: Annotated[
        float | None,
        typer.Option(min=0, help="Doubt (nats) from which on a passage is read as text."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What all gists may take: 400 (slots), 16x or 2.5MB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question from a store that precompute made."""
    with _reported(as_json):
        from gist_rag.rag import GistRAG
        from gist_rag.types import Sampling

        with _loading("the model of the store"):
            rag = GistRAG.open(
                store,
                namespace=namespace,
                reader=reader,
                judge=None if judge == "none" else judge,
                focus=focus,
                apart=apart,
                expand=expand,
                budget=budget,
            )
        with rag:
            found = rag.search(question, k)
            passages = [f.passage for f in found]
            sampling = Sampling(max_tokens=max_tokens)
            chunks = rag.stream(question, sampling=sampling, full_text=full_text, passages=passages)
            for chunk in chunks:
                if not as_json:
                    typer.echo(chunk.text, nl=chunk.answer is not None)
        answer = chunk.answer
        assert answer is not None
        report = {
            "answer": answer.text,
            "passages": [
                {"id": f.passage.id, "content": f.passage.content, "score": round(f.score, 4)}
                for f in found
            ],
            "stats": {
                "gists": answer.stats.hits,
                "texts": len(found) - answer.stats.hits - answer.stats.left_out,
                "left_out": answer.stats.left_out,
                "expanded": answer.stats.expanded,
                "source_tokens": answer.stats.source_tokens,
                "gist_slots": round(answer.stats.gist_slots, 1),
                "gist_bytes": answer.stats.num_bytes,
                "first_token_ms": round(answer.stats.first_token_ms, 1),
                "total_ms": round(answer.stats.total_ms, 1),
                "new_tokens": answer.num_tokens,
            },
        }
        _show(report, as_json, _ask_lines)


@app.command()
def demo(
    store: Annotated[
        Path | None, typer.Option(help="Keep the gists here; default: a folder that goes away.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress 60 passages about SQLite, then ask through LangChain and through LlamaIndex."""
    with _reported(as_json):
        from gist_rag.demo import DemoEngine, run
        from gist_rag.rag import GistRAG
        from gist_rag.sample import sample_passages

        passages, results = sample_passages(), []
        with _loading(DEFAULT_RAG_MODEL):
            engine = DemoEngine.from_pretrained(DEFAULT_RAG_MODEL, store, judge=DEFAULT_EMBEDDER)
        with engine:
            with _bar("passages", hidden=as_json) as progress:
                GistRAG(engine).build(passages, progress=progress)
            for shown in run(engine, passages):
                results.append(asdict(shown))
                if not as_json:
                    _echo(_demo_lines(results[-1]))
        if as_json:
            _print_json({"answers": results})
        else:
            typer.echo("\nTimes are from the question to the first token of its answer.")
    if any(row["read_as_gists"] < row["retrieved"] for row in results):
        raise typer.Exit(1)


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Where the result goes, as JSON.")],
    task: Annotated[
        Path | None, typer.Option(help="JSONL file of questions, or .jsonl.gz.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="boundary, surprise, along, punctuation or key_value.")
    ] = None,
    compressor: Method = COMPRESSOR,
    ratio: Annotated[float, typer.Option(help="Tokens per kept slot.")] = 8.0,
    passages: Annotated[int, typer.Option(help="Passages per question.")] = 1,
    limit: Annotated[int, typer.Option(help="Questions.")] = 100,
    seed: Annotated[int, typer.Option(help="Chooses the questions and their order.")] = 0,
    model: Model = DEFAULT_RAG_MODEL,
    arms: Annotated[str, typer.Option(help="Arms to compare, with commas between them.")] = "",
    preset: Preset = None,
    refine_steps: RefineSteps = None,
    positions: Annotated[str | None, typer.Option(help="sequence or parallel.")] = None,
    judge: Annotated[
        str, typer.Option(help="Who says which passages matter: likelihood, or an embedder's name.")
    ] = "likelihood",
    codec: Annotated[
        str | None, typer.Option(help="Read gists as they would be stored: bf16, int8 or int4.")
    ] = None,
    reader: ReaderFolder = None,
    dtype: Dtype = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Ask only what the file at --out does not answer yet.")
    ] = False,
) -> None:
    """Score a compressor on questions, beside full text and controls."""
    with _reported(as_json=False):
        from pydantic import ValidationError

        from gist_rag.evaluate.config import EvaluateConfig
        from gist_rag.evaluate.runner import evaluate as run

        if not out.parent.is_dir() or out.is_dir():
            raise BadInput(f"--out is {out}; it must be a file in a folder that is there")
        before = _earlier_result(out) if resume and out.exists() else None
        options = {
            "task": task,
            "probe": probe,
            "compressor": compressor,
            "ratio": ratio,
            "passages": passages,
            "limit": limit,
            "seed": seed,
            "model": model,
            "settings": _given(preset=preset, refine_steps=refine_steps),
            "arms": tuple(filter(None, arms.split(","))),
            "reader": reader,
            "judge": judge,
            "codec": codec,
            "dtype": dtype,
            **_given(positions=positions),
        }
        try:
            config = EvaluateConfig.model_validate(options)
        except ValidationError as error:
            raise BadInput(str(error)) from error
        _quiet_transformers()
        with _bar("questions") as progress:
            result = run(config, progress, partial(_replace, out), before)
        rows = [{"arm": arm, **row} for arm, row in result["arms"].items()]
        _print_rows([{**row, **row.pop("scores", {})} for row in rows])


@app.command()
def train(
    method: Annotated[
        str | None, typer.Option(help="A method that is trained, or 'reader' for who reads.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Files of questions, or corpora; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    task: Annotated[
        str | None, typer.Option(help="passages, or thoughts (rows of worked answers).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options override it.")] = None,
    model: Annotated[str | None, typer.Option(help="Alias, folder or Hugging Face id.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Repeatable: one a step.")] = None,
    passages: Annotated[str | None, typer.Option(help="Beside a question: 2, or 1-4.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order and initial weights.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda.")] = None,
    reader: ReaderFolder = None,
    dtype: Dtype = None,
) -> None:
    """Train a compressor, or the reader. Run again, it goes on where it was stopped."""
    with _reported(as_json=False), _interruptible():
        from gist_rag.train.config import TrainConfig
        from gist_rag.train.loop import train as run

        given = _given(
            method=method,
            task=task,
            data=data,
            out=out,
            model=model,
            ratios=ratio,
            passages=_range(passages),
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            device=device,
            reader=reader,
            dtype=dtype,
        )
        settings = TrainConfig.read((_yaml(config) if config else {}) | given)
        _quiet_transformers()
        with _training_bar() as report:
            folder = run(settings, report)
        _say(f"{settings.method} is in {folder}")


@bench.command()
def ttft(
    passages: Annotated[str, typer.Option(help="Passages per prompt, as in 1,2,5.")] = "1,2,5,10",
    model: Model = DEFAULT_RAG_MODEL,
    ratio: Ratio = "8",
    budget: Annotated[
        str | None, typer.Option(help="What weighed passages may take: 400 (slots), 16x or 2.5MB.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed prompts per row and arm.")] = 5,
    apart: Annotated[int, typer.Option(min=1, help="Passages that answer, read apart.")] = 3,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Time to the first token, from text and from gists."""
    with _reported(as_json):
        from gist_rag.evaluate.ttft import bench_ttft

        with _loading(model) as say:
            result = bench_ttft(
                _numbers("--passages", passages, int),
                model=model,
                ratio=_numbers("--ratio", ratio, float),
                budget=budget,
                dtype=dtype,
                repeats=repeats,
                apart=apart,
                progress=say,
            )
        _show_rows(result, as_json)


@bench.command("precompute")
def precompute_cost(
    passages: Annotated[int, typer.Option(help="Passages to time.")] = 6,
    compressor: Annotated[
        list[str] | None, typer.Option(help="Repeatable: timed beside the presets.")
    ] = None,
    model: Model = DEFAULT_RAG_MODEL,
    ratio: Ratio = "8",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Seconds per passage of each preset, beside one plain prefill of it."""
    with _reported(as_json):
        from gist_rag.evaluate.precompute import bench_precompute

        with _loading(model):
            result = bench_precompute(
                passages,
                compressors=compressor or (),
                model=model,
                ratio=_numbers("--ratio", ratio, float),
                dtype=dtype,
            )
        _show_rows(result, as_json)


@bench.command("matching")
def matching_speed(
    passages: Annotated[int, typer.Option(help="Passages that are known.")] = 1_000_000,
    prompts: Annotated[int, typer.Option(help="Timed prompts of each kind.")] = 200,
    as_json: Json = False,
) -> None:
    """Time to find the known passages of a prompt, and the memory that takes."""
    with _reported(as_json):
        from gist_rag.evaluate.matching import bench_matching

        with _bar("passages", hidden=as_json) as progress:
            result = bench_matching(passages, prompts=prompts, progress=progress)
        _show_rows(result, as_json)


@app.command()
def info(
    store: Annotated[Path | None, typer.Option(help="Folder of a store.")] = None,
    as_json: Json = False,
) -> None:
    """What is installed, and what a store holds."""
    with _reported(as_json):
        import torch

        from gist_rag_kernels import describe

        report: dict[str, Any] = {
            "versions": {"python": platform.python_version()} | _versions(PACKAGES),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch_threads": torch.get_num_threads(),
            "kernels": describe(),
        }
        if store is not None:
            with _existing(store) as opened:
                report["store"] = _describe(opened)
        _show(report, as_json, _info_lines)


@app.command()
def verify(store: StoreFolder, as_json: Json = False) -> None:
    """Check the checksum of every gist, and every index against the gists."""
    with _reported(as_json):
        with _existing(store) as opened:
            broken = [
                {
                    "space": key.space,
                    "content": key.content,
                    "id": passage.id if (passage := opened.passage(key.content)) else "",
                    "error": error,
                }
                for key, error in opened.verify()
            ]
            indexes = {space: _index_state(opened, space) for space in opened.spaces()}
            entries = opened.stats().entries
        sound = not broken and set(indexes.values()) <= {"ok", "none"}
        report = {"sound": sound, "entries": entries, "broken": broken, "indexes": indexes}
        _show(report, as_json, _verify_lines)
    raise typer.Exit(0 if sound else 1)


# ---- what commands share


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """Our own errors as one message and an exit code."""
    try:
        yield
    except GistRagError as error:
        if as_json:
            _print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            _say(f"error: {error}", style="red")
        raise typer.Exit(2 if isinstance(error, BadInput) else 1) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; what was committed stays; run again to go on")
        raise typer.Exit(130) from None


@contextmanager
def _loading(what: str) -> Iterator[Callable[[str], None]]:
    """A sign of life, which may be told what is going on, in place of transformers' own bars."""
    _quiet_transformers()
    with messages.status(f"loading {what}") as status:
        yield status.update


class Advance(Protocol):
    """Called with things done and things in all, and with tokens done where these count."""

    def __call__(self, done: int, total: int, tokens: int | None = None) -> None: ...


@contextmanager
def _bar(things: str, *, hidden: bool = False) -> Iterator[Advance]:
    """A progress bar with speed and time left."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=messages,
        disable=hidden,
    )
    with bar:
        task, started = bar.add_task(things, total=None), time.perf_counter()

        def advance(done: int, total: int, tokens: int | None = None) -> None:
            seconds = time.perf_counter() - started
            speed = f"{things}, {done / seconds:.2f}/s"
            if tokens is not None:
                speed += f", {tokens / seconds:.0f} tokens/s"
            bar.update(task, completed=done, total=total, description=speed)

        yield advance


@contextmanager
def _training_bar() -> Iterator[Callable[[Report], None]]:
    """A progress bar with loss terms and speed; a line each where there is no terminal."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=messages,
    )
    with bar:
        task = bar.add_task("steps", total=None)

        def show(report: Report) -> None:
            terms = " ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
            line = f"{terms}, {report.tokens_per_second:.0f} tokens/s"
            bar.update(task, completed=report.step, total=report.steps, description=line)
            if not messages.is_terminal:
                _say(f"step {report.step}/{report.steps}: {line}")

        yield show


def _range(text: str | None) -> tuple[int, int] | None:
    """``"2"`` or ``"1-4"``."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError as error:
        raise BadInput(f"--passages {text}: give a number or a range like 1-4") from error


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict):
        raise BadInput(f"{path} must hold settings by name")
    return given


def _quiet_transformers() -> None:
    """No progress bars besides our own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _replace(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole, or leave the file as it was."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def _earlier_result(path: Path) -> dict[str, Any]:
    """What an earlier ``evaluate`` wrote."""
    from gist_rag.evaluate.result import check_result

    try:
        return check_result(json.loads(path.read_text()))
    except (ValueError, BadInput):
        raise BadInput(
            f"{path} is no result of evaluate; give another --out, or leave --resume out"
        ) from None


N = TypeVar("N", int, float)


def _numbers(option: str, text: str | None, kind: Callable[[str], N]) -> list[N]:
    """Of an option that takes several, with commas between them."""
    try:
        return [kind(number) for number in text.split(",")] if text else []
    except ValueError:
        raise BadInput(f"{option} is {text!r}; give numbers, as in 8,16") from None


def _given(**options: object) -> dict[str, object]:
    """The options that were given; the others are left to their owner's default."""
    return {name: value for name, value in options.items() if value is not None}


def _existing(folder: Path) -> GistStore:
    """A store to look into."""
    from gist_rag.store import GistStore

    return GistStore.open(folder, create=False, read_only=True)


def _index_state(store: GistStore, space: str) -> str:
    """``ok``, ``none``, or what is wrong with the index of a space."""
    from gist_rag.rag import check_index, index_folder
    from gist_rag.retrieval import VectorIndex

    folder = index_folder(store, space)
    if not folder.exists():
        return "none"
    try:
        check_index(VectorIndex.load(folder), store, space)
    except GistRagError as error:
        return str(error)
    return "ok"


def _describe(store: GistStore) -> dict[str, Any]:
    stats = store.stats()
    shown = ("model", "compressor", "codec", "namespace")
    return {
        "folder": str(store.path),
        "entries": stats.entries,
        "bytes": stats.live_bytes,
        "bytes_per_passage": round(stats.live_bytes / max(stats.entries, 1)),
        "dead_bytes": stats.dead_bytes,
        "spaces": [
            {
                "space": space[:16],
                **{name: description[name] for name in shown},
                **cast(dict[str, object], description["settings"]),
                "entries": len(store.contents(space)),
                "index": _index_state(store, space),
            }
            for space, description in store.spaces().items()
        ],
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# ---- output


def _show(
    report: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], Iterator[str]]
) -> None:
    """A report as JSON, or as the lines that a command makes of it."""
    if as_json:
        _print_json(report)
    else:
        _echo(lines(report))


def _show_rows(result: dict[str, Any], as_json: bool) -> None:
    """A benchmark's result as JSON, or its rows as a table."""
    if as_json:
        _print_json(result)
    else:
        _print_rows(result["results"])


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2))


def _say(text: str, style: str = "") -> None:
    messages.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """As a table, or, where that is wider than the terminal, as a line for each."""
    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*map(str, row.values()))
    unbounded = console.options.update(max_width=10_000)
    if console.measure(table, options=unbounded).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        (_, name), *fields = row.items()
        typer.echo(f"{name}: " + ", ".join(f"{field} {value}" for field, value in fields))


def _precompute_lines(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{report['passages']} passages: {report['written']} written, {report['skipped']} skipped"
        + (" (their gists are there already)" if report["skipped"] else "")
    )
    if report["written"]:
        ratios = ", ".join(f"{ratio:g}x" for ratio in (report["ratio"], *report["coarser"]))
        yield (
            f"{report['tokens']:,} tokens in {report['seconds']:.1f} s "
            f"({report['tokens_per_second']:.0f} tokens/s) at {ratios}; per passage "
            f"{report['bytes_per_passage']:,} bytes of gist for "
            f"{report['text_bytes_per_passage']:,} bytes of text"
        )


def _ask_lines(report: dict[str, Any]) -> Iterator[str]:
    stats = report["stats"]
    line = f"{stats['gists']} passages read as gists, {stats['texts']} as text"
    if stats["gists"]:
        line += f"; {stats['source_tokens']} source tokens > {stats['gist_slots']:.0f} slots"
    if stats["left_out"]:
        line += f"; {stats['left_out']} left out, others matter more"
    if stats["expanded"]:
        line += f"; {stats['expanded']} read again as text, out of doubt"
    yield f"{line}; first token after {stats['first_token_ms']:.0f} ms"


def _demo_lines(shown: dict[str, Any]) -> Iterator[str]:
    yield f"\n[{shown['framework']}] {shown['question']}"
    yield f"  from gists ({shown['gist_ms']:5.0f} ms): {' '.join(shown['answer'].split())}"
    yield f"  from text  ({shown['text_ms']:5.0f} ms): {' '.join(shown['text_answer'].split())}"
    yield f"  gold answer: {shown['gold']}"
    yield f"  {shown['read_as_gists']} of {shown['retrieved']} retrieved passages read as gists"


def _info_lines(report: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    yield (
        f"device {report['device']}, {report['torch_threads']} torch threads, "
        f"kernels: {report['kernels']}"
    )
    if store := report.get("store"):
        yield (
            f"{store['folder']}: {store['entries']} gists, {store['bytes']:,} bytes "
            f"({store['bytes_per_passage']:,} per passage), {store['dead_bytes']:,} to compact"
        )
        for space in store["spaces"]:
            yield "  " + ", ".join(
                f"{name} {value}" for name, value in space.items() if value not in ("", None)
            )


def _verify_lines(report: dict[str, Any]) -> Iterator[str]:
    for entry in report["broken"]:
        yield f"broken: {entry['id'] or entry['content']}: {entry['error']}"
    for space, state in report["indexes"].items():
        yield f"index of space {space[:16]}: {state}"
    yield f"{report['entries']} gists, {len(report['broken'])} broken"


if __name__ == "__main__":
    main()
