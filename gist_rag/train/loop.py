"""The training loop: batches, optimiser, checkpoints, resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gist_rag.errors import BadInput, MissingExtra, NotANumber
from gist_rag.reader import load_backbone
from gist_rag.train.config import TrainConfig
from gist_rag.train.data import Examples
from gist_rag.train.students import Student, make_student
from gist_rag.train.traces import Traces

CHECKPOINT = "checkpoint"
SETTINGS = "train.json"
LOG = "log.jsonl"
FREE = {"steps", "save_every", "log_every", "out", "device"}
"""Settings that may differ when a run is resumed."""


@dataclass(frozen=True)
class Report:
    """Where a run stands.

    Attributes:
        losses: weighted terms, means over the steps since the last report.
        tokens_per_second: tokens of passages, questions and answers, each counted once.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    lr: float
    tokens_per_second: float


def train(config: TrainConfig, report: Callable[[Report], None] | None = None) -> Path:
    """Run a training, or go on with one.

    ``config.out`` gets what has been learnt (ready for use), the settings, a log and a checkpoint.
    The same settings started again go on from the checkpoint, exactly as the run would have gone
    on without the interruption.

    Args:
        report: called every ``log_every`` steps.

    Returns:
        ``config.out``.

    Raises:
        BadInput: unusable data or settings, or the folder of another run.
        NotANumber: the loss is infinite or NaN; says where, and the last checkpoint is kept.
        MissingExtra: ``accelerate`` is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
    except ImportError as error:
        raise MissingExtra("accelerate", "train") from error
    _claim(config)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulate, cpu=config.device == "cpu"
    )
    set_seed(config.seed)
    device = config.device or str(accelerator.device)
    backbone, reader = load_backbone(config.model, config.reader, dtype=config.dtype, device=device)
    supply = Traces if config.task == "thoughts" else Examples
    examples = supply(config, lambda text: len(backbone.tokenize(text)))
    student = make_student(backbone, config, reader)
    optimiser = torch.optim.AdamW(student.groups(), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(config))
    model, optimiser = accelerator.prepare(student, optimiser)
    accelerator.register_for_checkpointing(schedule)

    first = _resume(accelerator, config)
    meter = _Meter()
    workers, worker = accelerator.num_processes, accelerator.process_index
    for step in range(first, config.steps):
        for part in range(config.accumulate):
            batch, ratio = examples.batch((step * config.accumulate + part) * workers + worker)
            with accelerator.accumulate(model):
                losses: dict[str, Tensor] = model(batch, ratio)
                total = torch.stack(list(losses.values())).sum()
                _check("loss", total, losses, step, config)
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
                    _check("gradient's norm", norm, losses, step, config)
                optimiser.step()
                optimiser.zero_grad()
            meter.add(losses, student.count(batch))
        schedule.step()
        done = step + 1
        last = done == config.steps
        if accelerator.is_main_process and (last or done % config.log_every == 0):
            state = meter.report(done, config.steps, float(schedule.get_last_lr()[0]))
            with (config.out / LOG).open("a") as log:
                log.write(json.dumps(asdict(state)) + "\n")
            if report:
                report(state)
        if last or done % config.save_every == 0:
            _save(accelerator, student, config, done)
    return config.out


def _claim(config: TrainConfig) -> None:
    """Make the folder, or make sure that it holds the same run."""
    path, given = config.out / SETTINGS, config.model_dump(mode="json")
    if path.exists():
        known = json.loads(path.read_text())
        keys = (given.keys() | known.keys()) - FREE
        if changed := sorted(key for key in keys if known.get(key) != given.get(key)):
            raise BadInput(
                f"{config.out} holds a run with other settings ({', '.join(changed)}); "
                "choose another folder, or delete it"
            )
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(given, indent=2) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write to {config.out}: {error}") from error


def _resume(accelerator: Any, config: TrainConfig) -> int:
    """Load the last checkpoint, if there is one; the step to go on with."""
    folder = config.out / CHECKPOINT
    if not folder.exists():
        return 0
    accelerator.load_state(str(folder))
    return int(json.loads((folder / "step.json").read_text())["step"])


def _save(accelerator: Any, student: Student, config: TrainConfig, step: int) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    accelerator.wait_for_everyone()
    folder, scratch = config.out / CHECKPOINT, config.out / f"{CHECKPOINT}.new"
    accelerator.save_state(str(scratch))
    if accelerator.is_main_process:
        (scratch / "step.json").write_text(json.dumps({"step": step}))
        student.save(config.out)
        old = config.out / f"{CHECKPOINT}.old"
        if folder.exists():
            os.replace(folder, old)
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _check(
    what: str, value: Tensor, losses: Mapping[str, Tensor], step: int, config: TrainConfig
) -> None:
    """Stop before anything that is no number gets into the weights."""
    if not bool(torch.isfinite(value)):
        terms = ", ".join(f"{name} {float(term.detach()):.3g}" for name, term in losses.items())
        raise NotANumber(
            f"the {what} is {float(value.detach())} at step {step} ({terms}); the last checkpoint "
            f"in {config.out} is kept; start again with a lower lr than {config.lr:g}"
        )


def _cosine(config: TrainConfig) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(config.warmup * config.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        along = (step - warmup) / max(1, config.steps - warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, along))

    return factor


@dataclass
class _Meter:
    """Means between two reports."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    tokens: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, losses: Mapping[str, Tensor], tokens: int) -> None:
        for name, term in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(term.detach())
        self.count += 1
        self.tokens += tokens

    def report(self, step: int, steps: int, lr: float) -> Report:
        seconds = time.perf_counter() - self.since
        means = {name: total / max(1, self.count) for name, total in self.sums.items()}
        speed = self.tokens / max(seconds, 1e-9)
        self.sums, self.count, self.tokens, self.since = {}, 0, 0, time.perf_counter()
        return Report(step, steps, means, lr, speed)
