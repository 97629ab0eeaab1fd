"""What the benchmarks share.

- ``arguments(op, about)``: the command line (``--dry-run``, ``--out``); call it first, since a dry
  run sets ``TRITON_INTERPRET=1`` before triton is imported.
- ``Run``: one benchmark run. ``run.device``; ``run.check(name, ours, truth, atol, rtol)`` refuses
  to go on when an operation is wrong; ``run.time(name, calls, floor_bytes=, floor_flops=)`` times
  and records a row; ``run.write()`` writes ``results/<op>_<gpu>.json``.
- ``rotated(make, bytes_each)``: copies of the inputs, enough that a call does not find its inputs
  in the L2 cache; pass ``[functools.partial(op, *inputs) for inputs in rotated(...)]`` to ``time``.
- ``both(attention, *inputs, grad)``: output and gradients of an attention.
- ``passage_rows(...)``: ragged row lengths of passages under one budget.
- ``bound_implementation(name)``: a context in which operations run ``triton`` or ``reference``.

A dry run does everything at tiny sizes on the CPU except timing: it calls each candidate once and
records no milliseconds. ``LLAMA_8B`` and ``TINY`` are the shapes that the benchmarks use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
PEAK_FLOPS = 800e12
"""What a large bf16 matrix product reaches on an H100; the data sheet says 989e12."""


class Shape(NamedTuple):
    """Layers, KV heads, head size."""

    layers: int
    heads: int
    size: int


LLAMA_8B = Shape(32, 8, 128)
TINY = Shape(2, 2, 64)

T = TypeVar("T")
Call = Callable[[], object]


class Wrong(Exception):
    """An operation disagrees with its reference, so its time means nothing."""


def arguments(op: str, about: str) -> Run:
    """Read the command line and open a run."""
    parser = argparse.ArgumentParser(description=about.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, no timing")
    parser.add_argument("--out", type=Path, help="default: results/<op>_<gpu>.json")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("there is no GPU to time on; --dry-run checks this script without one")
    return Run(op, args.dry_run, args.out)


@dataclass
class Run:
    """Rows of one benchmark, and where they go."""

    op: str
    dry: bool
    out: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    _copy_bandwidth: float | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def copy_bandwidth(self) -> float:
        """Measured bytes per second of a large copy, reads and writes counted."""
        if self._copy_bandwidth is None:
            source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copy_bandwidth = 2 * (1 << 30) / (_median_ms(lambda: target.copy_(source)) / 1e3)
        return self._copy_bandwidth

    def check(self, name: str, ours: object, truth: object, atol: float, rtol: float = 0.0) -> None:
        """Compare tensors, or tuples of tensors, in float32.

        Raises:
            Wrong: they differ by more than ``atol + rtol * |truth|`` somewhere.
        """
        pairs = zip(_tensors(ours), _tensors(truth), strict=True)
        for number, (mine, true) in enumerate(pairs):
            mine, true = mine.float(), true.float()
            if mine.shape != true.shape:
                raise Wrong(f"{name}[{number}]: shape {mine.shape}, should be {true.shape}")
            same = torch.isclose(mine, true, atol=atol, rtol=rtol, equal_nan=True)
            if not bool(same.all()):
                worst = float((mine - true)[~same].abs().max())
                raise Wrong(f"{name}[{number}]: off by {worst:.3g} at {int((~same).sum())} places")

    def time(
        self,
        name: str,
        calls: Sequence[Call],
        *,
        floor_bytes: float = 0.0,
        floor_flops: float = 0.0,
        peak_flops: float = PEAK_FLOPS,
        **facts: object,
    ) -> None:
        """Time ``calls`` in turn (the same call over copies of its inputs) and record a row.

        Args:
            floor_bytes: bytes that must cross device memory in one call.
            floor_flops: operations that one call needs.
            peak_flops: operations per second that the chip reaches on such numbers.
            facts: what else describes the row, such as ``passages=5``.
        """
        row: dict[str, Any] = {"name": name, **facts}
        row |= {"bytes": int(floor_bytes), "flops": int(floor_flops)}
        if self.dry:
            calls[0]()
        else:
            row["ms"] = rotating_ms(calls)
            row["floor_ms"] = 1e3 * max(floor_bytes / self.copy_bandwidth, floor_flops / peak_flops)
            row["of_floor"] = round(row["floor_ms"] / row["ms"], 4)
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def write(self) -> None:
        """Write the result file; a dry run writes one only where ``--out`` says so."""
        import triton

        if self.dry and self.out is None:
            return
        name = "" if self.dry else torch.cuda.get_device_name().replace(" ", "_")
        out = self.out or RESULTS / f"{self.op}_{name}.json"
        head: dict[str, Any] = {
            "op": self.op,
            "device": "cpu, Triton's interpreter, no timing" if self.dry else name,
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        if not self.dry:
            head["copy_bandwidth_gb_per_s"] = round(self.copy_bandwidth / 1e9, 1)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**head, "rows": self.rows}, indent=1) + "\n")


def rotating_ms(calls: Sequence[Call]) -> float:
    """Median milliseconds of a call, the copies taken in turn."""
    index = 0

    def next_call() -> object:
        nonlocal index
        index += 1
        return calls[index % len(calls)]()

    for call in calls:
        call()
    return _median_ms(next_call)


def rotated(make: Callable[[int], T], bytes_each: float, *, dry: bool = False) -> list[T]:
    """``make(seed)`` as often as it takes to pass twice the L2 cache (once in a dry run)."""
    if dry:
        return [make(0)]
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [make(seed) for seed in range(2 + int(2 * l2 / bytes_each))]


def both(attention: Callable[..., Tensor], *inputs: Tensor) -> object:
    """Output and gradients; the last input is the output's gradient."""
    *leaves, grad = inputs
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def passage_rows(
    passages: int, rows: int, mean: int, generator: torch.Generator, *, ragged: bool = True
) -> Tensor:
    """Row lengths ``(passages, rows)``, int64, with ``passages * rows * mean`` slots in all.

    Ragged lengths are uneven as one budget over all heads makes them: most rows keep little, a few
    keep most of a passage.
    """
    if not ragged:
        return torch.full((passages, rows), mean)
    weight = torch.rand(passages, rows, generator=generator).pow(3)
    share = weight / weight.sum(1, keepdim=True) * rows * mean
    lengths = share.long()
    lengths[:, 0] += rows * mean - lengths.sum(1)
    return lengths


@contextmanager
def bound_implementation(name: str) -> Iterator[None]:
    """Operations run this implementation inside: ``triton`` or ``reference``."""
    before = os.environ.get("GIST_RAG_KERNELS")
    os.environ["GIST_RAG_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["GIST_RAG_KERNELS"]
        else:
            os.environ["GIST_RAG_KERNELS"] = before


def _median_ms(call: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def _tensors(given: object) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, (tuple, list)):
        return [tensor for tensor in given if tensor is not None]
    raise TypeError(f"cannot compare a {type(given).__name__}")
