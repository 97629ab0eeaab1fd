"""Everything that needs a CUDA device, in the order in which it is wanted when time is short.

    python benchmarks/gpu.py --out DIR [--only tests,kernels] [--model M] [--data FILE ...] [--list]

Correctness first, then timings, then training and evaluation; a reader last, as one ships. A step
that fails, or takes longer than ``--seconds``, is reported and the next one runs; the exit code is
then 1. What a training that was stopped had learnt at its last checkpoint is evaluated. Needs
torch, triton, transformers, accelerate and pytest; no FAISS, no LangChain, no installation of this
project.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPERATIONS = (
    "compose_kv",
    "kv_quant",
    "slot_attention",
    "gist_attention",
    "retention_attention",
    "select_fit",
)
METHODS = (
    *("unigist", "gisting", "sentence_anchored", "autoencoding", "gist_pool", "incomes"),
    *("gist_coco", "light_thinker", "trim_kv"),
)
CONFIGS = {"trim_kv": "trim_kv.yaml --steps 1500"}
"""Of methods that are not trained as the others are."""
PYTHON = shlex.quote(sys.executable)
CLI = f"{PYTHON} -m gist_rag.cli"


def steps(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Names and commands."""
    out, model = Path(args.out), f"--model {args.model} --dtype bfloat16"
    yield "tests", f"{PYTHON} -m pytest -q -m gpu tests/kernels tests/test_gpu.py"
    for op in OPERATIONS:
        yield "kernels", f"{PYTHON} kernels/benchmarks/bench_{op}.py --out {out}/{op}.json"
    yield "serving", f"{PYTHON} benchmarks/serving/first_token.py --out {out}/first_token.json"
    data = " ".join(f"--data {path}" for path in args.data)
    train = f"{CLI} train {model} {data} --config benchmarks/training"
    for method in METHODS if args.data else ():
        config = CONFIGS.get(method, "gists.yaml")
        yield f"train-{method}", f"{train}/{config} --method {method} --out {out}/{method}"
    for passages in (1, 5, 10) if args.task else ():
        trained = [f"{out}/{method}" for method in METHODS if (out / method).exists()]
        ratios = [f"attention_matching@{ratio}" for ratio in (8, 16, 32)]
        command = f"{CLI} evaluate --task {args.task} --passages {passages} --limit 200 {model}"
        several = [f"{arm}{how}" for how in ("*", "^3") for arm in ("reuse", *ratios)]
        several += [f"attention_matching@{within}*" for within in ("4-8-16/8x", "8-16-32/16x")]
        several = several if passages > 1 else []
        arms = ",".join(("reuse", *ratios, *several, "attention_matching@16+1", *trained))
        yield (
            f"evaluate-{passages}",
            f"{command} --preset best --arms {arms} --out {out}/nq_p{passages}.json",
        )
    if args.data:
        yield "train-reader", f"{train}/reader.yaml --steps 1500 --batch-size 64 --out {out}/reader"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="out", help="folder of the results")
    parser.add_argument("--only", default="", help="names of steps, or what they begin with")
    parser.add_argument("--model", default="smollm2-135m-rag")
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="training questions")
    parser.add_argument("--task", type=Path, help="questions to evaluate on")
    parser.add_argument("--seconds", type=float, help="longest that a step may take")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    wanted = tuple(filter(None, args.only.split(",")))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    failed = []
    for name, command in steps(args):
        if wanted and not name.startswith(wanted):
            continue
        print(f"[{name}] {command}", flush=True)
        if args.list:
            continue
        started = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": paths}
        try:
            done = subprocess.run(
                shlex.split(command), cwd=ROOT, env=environment, timeout=args.seconds
            )
            ended = f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "stopped"
        print(f"[{name}] {ended}, {time.perf_counter() - started:.0f} s", flush=True)
        if ended != "exit 0":
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
