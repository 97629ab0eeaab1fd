"""Every kernel compiles for the GPUs we name, on a machine without one, and no hot one spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
SCRIPT = KERNELS / "benchmarks" / "compile_all.py"
TARGETS = {"sm_80", "sm_90", "gfx942"}


def operations() -> set[str]:
    """Operations that have a kernel."""
    return {path.parent.name for path in KERNELS.glob("gist_rag_kernels/*/kernel.py")}


def test_the_list_of_operations_is_complete() -> None:
    found = re.search(r"^OPS = \(([^)]*)\)", SCRIPT.read_text(), re.MULTILINE)
    assert found is not None
    assert set(re.findall(r'"(\w+)"', found[1])) == operations()


@pytest.mark.slow
def test_every_kernel_compiles_and_no_hot_one_spills(tmp_path: Path) -> None:
    """Without the interpreter, hence in its own process."""
    out = tmp_path / "compile.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check", "--out", out],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert {(row["op"], row["target"]) for row in rows} == {
        (op, target) for op in operations() for target in TARGETS
    }
    hot = [row for row in rows if row["hot"]]
    assert [row for row in hot if row["spills"]] == []
    assert all(row["registers"] > 0 and 0 < row["occupancy"] <= 1 for row in hot)


def test_the_stored_table_knows_every_kernel() -> None:
    """``compile.json`` is what people read; it is written anew when a kernel joins."""
    stored = json.loads((KERNELS / "benchmarks/results/compile.json").read_text())
    assert {row["op"] for row in stored["kernels"]} == operations()
