"""``benchmarks/training/ship.py``: what ships is what was trained, at a lower rank if it may be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.types import Passage

SCRIPT = Path(__file__).parents[2] / "benchmarks/training/ship.py"


@pytest.fixture
def run(backbone: Backbone, tmp_path: Path) -> Path:
    """Folder of a run whose updates have rank 2 where 4 were allowed."""
    compressor = make_compressor("unigist", backbone, {"ratio": 4, "lora": {"rank": 4, "alpha": 8}})
    with torch.no_grad():
        for name, weight in compressor.named_parameters():
            if name.startswith("lora.up."):
                weight[:, :2] = 0.1 * torch.randn(len(weight), 2)
    folder = tmp_path / "run"
    compressor.save_pretrained(folder)
    (folder / "train.json").write_text(json.dumps({"data": ["/somewhere/q.jsonl"], "out": "run"}))
    (folder / "log.jsonl").write_text("{}\n")
    return folder


def shipped(run: Path, *options: str) -> Path:
    command = [sys.executable, str(SCRIPT), str(run), "ours", "--to", str(run.parent), *options]
    subprocess.run(command, check=True, capture_output=True)
    return run.parent / "ours"


@pytest.mark.parametrize("options", [(), ("--rank", "2")], ids=["as-trained", "rank-2"])
@torch.no_grad()
def test_it_compresses_as_the_run_did(
    run: Path, backbone: Backbone, passages: list[Passage], options: tuple[str, ...]
) -> None:
    ids = [backbone.tokenize(passages[0].text)]
    trained, ours = (make_compressor(f, backbone) for f in (run, shipped(run, *options)))
    one, other = (c.compress(ids)[0] for c in (trained, ours))
    assert torch.allclose(one.keys, other.keys, atol=0.02 * float(one.keys.abs().max()))
    assert ranks(ours) == ({2} if options else {4})
    document = json.loads((run.parent / "ours" / "train.json").read_text())
    assert document == {"data": ["q.jsonl"], "out": "ours"}


def ranks(compressor: Compressor) -> set[int]:
    weights = compressor.state_dict()
    return {weight.shape[0] for name, weight in weights.items() if name.startswith("lora.down.")}
