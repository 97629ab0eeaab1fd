"""What every result file says of itself: machine, versions, commit and command."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "gist-rag")
ENVIRONMENT = ("device", "threads", "python", *_PACKAGES, "commit", "command")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command: a value for each name of ``ENVIRONMENT``."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "command": _command(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its sources
        return "not installed"


def _command() -> str:
    """What was run: ``gist-rag``, or a script, named from the root of the repository on."""
    script, root = Path(sys.argv[0]), Path(__file__).resolve().parents[2]
    if script.suffix != ".py":
        return " ".join(["gist-rag", *sys.argv[1:]])
    if script.resolve().is_relative_to(root):
        script = script.resolve().relative_to(root)
    return " ".join(["python", str(script), *sys.argv[1:]])


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
