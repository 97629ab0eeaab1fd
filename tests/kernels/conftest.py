"""Kernels on the GPU where there is one, else under Triton's interpreter on the CPU.

Triton decides when a function is decorated, so the variable is set before any kernel is imported.
Triton's own library (``tl.sum``) is decorated when triton is imported, which transformers does
early on: it is read again under the variable.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:
        for name in ("triton.language.standard", "triton.language.random", "triton.language"):
            importlib.reload(importlib.import_module(name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, ``-m gpu`` runs the kernels' tests on it."""
    if torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run their kernel; a test that wants the reference calls it by its module."""
    monkeypatch.setenv("GIST_RAG_KERNELS", "triton")


@pytest.fixture(autouse=True)
def _empty_means_nan() -> Iterator[None]:
    """``torch.empty`` holds NaN (integers: their largest), so an unwritten output cannot hide."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
