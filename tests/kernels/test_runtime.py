"""The switch: what runs where, and what a wrong setting says."""

from __future__ import annotations

import logging

import pytest
import torch

from gist_rag_kernels import runtime

HERE = torch.zeros(1)


def test_auto_takes_the_reference_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIST_RAG_KERNELS")
    assert runtime.choose(HERE) == "reference"


def test_reference_can_be_insisted_on(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv("GIST_RAG_KERNELS", "reference")
    assert runtime.choose(HERE.to(device)) == "reference"
    assert runtime.describe() == "reference (chosen)"


def test_unknown_choice_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIST_RAG_KERNELS", "cuda")
    for call in (lambda: runtime.choose(HERE), runtime.describe):
        with pytest.raises(ValueError, match=r"'cuda'.*auto, triton, reference"):
            call()


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runtime.choose(HERE) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        runtime.choose(HERE)


def test_missing_triton_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(runtime, "_has_triton", lambda: False)
    runtime._warn_once.cache_clear()
    monkeypatch.setenv("GIST_RAG_KERNELS", "auto")
    with caplog.at_level(logging.WARNING):
        chosen = [runtime.choose(OnGpu()) for _ in range(3)]
    assert chosen == ["reference"] * 3
    assert len([r for r in caplog.records if "triton is not installed" in r.message]) == 1
    assert "not installed" in runtime.describe()
    monkeypatch.setenv("GIST_RAG_KERNELS", "triton")
    with pytest.raises(ValueError, match="not installed"):
        runtime.choose(HERE)


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_description_names_triton_and_its_place(
    monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setenv("GIST_RAG_KERNELS", choice)
    said = runtime.describe()
    assert said.startswith(f"{choice}: ")
    assert "triton" in said
