"""The benchmark scripts run as they stand, on tiny sizes; what they would time is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "op",
    [
        "compose_kv",
        "gist_attention",
        "kv_quant",
        "retention_attention",
        "select_fit",
        "slot_attention",
    ],
)
def test_dry_run_checks_and_times_nothing(op: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / f"bench_{op}.py", "--dry-run", "--out", out]
    done = subprocess.run(command, env=_plain(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "no timing" in result["device"]
    assert result["rows"]
    assert all(row["bytes"] > 0 and "ms" not in row for row in result["rows"])


@pytest.mark.slow
def test_dry_run_reads_text_and_gists(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    script = BENCHMARKS.parents[1] / "benchmarks" / "serving" / "first_token.py"
    command = [sys.executable, script, "--dry-run", "--out", out]
    done = subprocess.run(command, env=_plain(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    stored = {(r["arm"], r.get("ratio"), r.get("codec")): r for r in rows if r["passages"] == 3}
    assert [*stored][:2] == [("text", None, None), ("reuse", 1, "bf16")]
    assert len(stored) == 8
    halves = stored["gists", 8, "bf16"]["bytes"], stored["gists", 16, "bf16"]["bytes"]
    assert stored["reuse", 1, "bf16"]["bytes"] > 7 * halves[0] > 13 * halves[1]
    assert not any("ttft_ms" in row for row in rows)


def _plain() -> dict[str, str]:
    """As a user's shell has it: no switch set."""
    return {
        k: v for k, v in os.environ.items() if k not in ("GIST_RAG_KERNELS", "TRITON_INTERPRET")
    }
