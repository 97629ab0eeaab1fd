"""``benchmarks/serving/load.py`` runs as it stands, for a few seconds over a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/serving/load.py"


@pytest.mark.slow
def test_load_finds_right_answers_and_a_free_loop(tiny_model_folder: Path) -> None:
    options = ["--model", str(tiny_model_folder), "--seconds", "4", "--json"]
    ended = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)["results"]
    ours = results["gist_rag"]
    assert ours["wrong"] == 0, ours["examples"]
    assert len(ours["answers"]) == 9  # every way to ask was taken
    assert ours["loop"]["callback_computed_ms"]["max"] < 50
    assert results["transformers"]["loop"]["beats"] > 10
