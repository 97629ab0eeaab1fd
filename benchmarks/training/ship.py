"""A run > a compressor that ships: weights in bfloat16, settings, and the log of the run.

    python benchmarks/training/ship.py runs/trim_kv trim_kv-4x
    python benchmarks/training/ship.py runs/unigist unigist-4x --rank 4

With a rank, each update of the LoRA becomes the nearest one of that rank, for a smaller file; what
that costs is for ``gist-rag evaluate`` to say.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gist_rag.compressors.registry import SHIPPED

DOWN, UP = "lora.down.", "lora.up."


def lower_rank(weights: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The same weights with updates ``B A`` of a lower rank (truncated SVD; Eckart and Young)."""
    out = dict(weights)
    for name in (key for key in weights if key.startswith(UP)):
        left, values, right = torch.linalg.svd(
            weights[name].float() @ weights[DOWN + name.removeprefix(UP)].float(),
            full_matrices=False,
        )
        root = values[:rank].sqrt()
        out[name] = left[:, :rank] * root
        out[DOWN + name.removeprefix(UP)] = root[:, None] * right[:rank]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help="what users call it")
    parser.add_argument("--rank", type=int, help="of the LoRA; default: as it was trained")
    parser.add_argument("--to", type=Path, default=SHIPPED, help="folder of what ships")
    args = parser.parse_args()

    target = args.to / args.name
    target.mkdir(parents=True, exist_ok=True)
    document = json.loads((args.run / "compressor.json").read_text())
    weights = load_file(args.run / "compressor.safetensors")
    if args.rank:
        weights = lower_rank(weights, args.rank)
        lora = document["config"]["lora"]
        lora |= {"rank": args.rank, "alpha": lora["alpha"] * args.rank / lora["rank"]}
    halved = {key: weight.to(torch.bfloat16).contiguous() for key, weight in weights.items()}
    save_file(halved, target / "compressor.safetensors")
    (target / "compressor.json").write_text(json.dumps(document, indent=2) + "\n")
    settings = json.loads((args.run / "train.json").read_text())
    settings |= {"data": [Path(path).name for path in settings["data"]], "out": args.name}
    (target / "train.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copy(args.run / "log.jsonl", target / "log.jsonl")
    print(f"{target}: {sum(f.stat().st_size for f in target.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
