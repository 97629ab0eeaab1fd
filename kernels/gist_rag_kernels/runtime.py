"""Which implementation an operation runs, and what its kernels look like to a compiler.

``GIST_RAG_KERNELS`` decides: ``auto`` (the default) takes Triton on a CUDA or ROCm device and plain
torch elsewhere, ``triton`` insists on Triton, ``reference`` insists on plain torch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

VARIABLE = "GIST_RAG_KERNELS"
CHOICES = ("auto", "triton", "reference")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compilation:
    """One configuration of a kernel, as ``benchmarks/compile_all.py`` compiles it without a GPU.

    Attributes:
        name: unique among the configurations of an operation, such as ``forward_bf16_d128``.
        kernel: the function under ``@triton.jit``.
        signature: a type per argument that is no constant: ``*bf16``, ``i32``, ``fp32``. Pointers
            are taken as 16-byte aligned; an integer that is a multiple of 16 says ``i32:16``.
        constants: a value per ``tl.constexpr`` argument; an absent optional pointer is ``None``.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        hot: on the path of a query or a training step, where a register spill is a fault.
    """

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    hot: bool


def choose(*tensors: Tensor) -> Literal["triton", "reference"]:
    """The implementation for these tensors.

    Raises:
        ValueError: ``GIST_RAG_KERNELS`` has an unknown value, or asks for Triton where it cannot
            run: it is not installed, or a tensor is on the CPU outside of Triton's interpreter.
    """
    wanted = _wanted()
    if wanted == "reference":
        return "reference"
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if wanted == "triton":
        if not _has_triton():
            raise ValueError(f"{VARIABLE}=triton, but triton is not installed")
        if not on_gpu and not _interprets():
            raise ValueError(
                f"{VARIABLE}=triton, but a tensor is on the CPU, where Triton only runs with "
                "TRITON_INTERPRET=1 set before triton is imported; use auto or reference"
            )
        return "triton"
    if on_gpu and not _has_triton():
        _warn_once()
        return "reference"
    return "triton" if on_gpu else "reference"


def flash_for(query: Tensor) -> Callable[..., Tensor] | None:
    """``flash_attn_func`` of flash-attn, where it is installed and can read this query."""
    reads = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return _flash() if reads and _wanted() != "reference" else None


@functools.cache
def _flash() -> Callable[..., Tensor] | None:
    try:
        found: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError):
        return None
    return found


def describe() -> str:
    """What ``choose`` does here, for ``gist-rag info``: ``auto: triton 3.6.0 on NVIDIA H100``."""
    wanted = _wanted()
    if wanted == "reference":
        return "reference (chosen)"
    if not _has_triton():
        return f"{wanted}: reference, triton is not installed"
    import triton

    if torch.cuda.is_available():
        prefill = ", flash-attn for plain prefill" if _flash() else ""
        name = torch.cuda.get_device_name()
        return f"{wanted}: triton {triton.__version__} on {name}{prefill}"
    if wanted == "triton":
        place = "its interpreter" if _interprets() else "a CUDA device, of which there is none"
        return f"triton: triton {triton.__version__} on {place}"
    return f"auto: reference on CPU, triton {triton.__version__} wherever there is a GPU"


def _wanted() -> str:
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}={wanted!r} is unknown; choose one of {', '.join(CHOICES)}")
    return wanted


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once() -> None:
    _log.warning(
        "triton is not installed, so kernels run as plain torch on the GPU; "
        "pip install 'gist-rag[triton]'"
    )
