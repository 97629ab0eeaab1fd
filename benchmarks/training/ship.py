"""A run > a compressor that ships: weights in bfloat16, settings, and the log of the run.

python benchmarks/training/ship.py runs/trim_kv trim_kv-4x
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gist_rag.compressors.registry import SHIPPED


def main(run: Path, name: str) -> None:
    target = SHIPPED / name
    target.mkdir(parents=True, exist_ok=True)
    weights = load_file(run / "compressor.safetensors")
    halved = {key: weight.to(torch.bfloat16) for key, weight in weights.items()}
    save_file(halved, target / "compressor.safetensors")
    settings = json.loads((run / "train.json").read_text())
    settings |= {"data": [Path(path).name for path in settings["data"]], "out": name}
    (target / "train.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in ("compressor.json", "log.jsonl"):
        shutil.copy(run / file, target / file)
    print(f"{target}: {sum(f.stat().st_size for f in target.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
