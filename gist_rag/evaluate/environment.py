"""What every result file says of itself, and the shipped sample that speed is measured on."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gist_rag.types import Passage

DATA = Path(__file__).parents[1] / "data"


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "gist-rag")},
        "commit": _commit(),
        "command": " ".join(["gist-rag", *sys.argv[1:]]),
    }


def sample_passages() -> list[Passage]:
    """The 60 passages that ship with the package."""
    rows = [json.loads(line) for line in _lines("sqlite_passages.jsonl")]
    return [Passage(f"{row['title']}\n{row['text']}", id=row["id"]) for row in rows]


def sample_questions() -> list[str]:
    """The 30 questions that ship with the package."""
    return [json.loads(line)["question"] for line in _lines("sqlite_questions.jsonl")]


def _lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf8").splitlines()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=DATA)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
