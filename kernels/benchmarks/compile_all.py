"""Compile every kernel configuration ahead of time, on a machine without a GPU.

    python kernels/benchmarks/compile_all.py [--ops compose_kv,kv_quant] [--check] [--out FILE]

Each operation's ``kernel.py`` lists its configurations (``compilations()``). All are compiled for
``sm_80`` (A100), ``sm_90`` (H100) and ``gfx942`` (MI300); what the machine code asks of the chip is
written to ``results/compile.json``. ``--check`` fails when a hot kernel spills or does not fit.

``registers`` are those of one thread. ``spills`` are words of four bytes per thread that did not
fit into them: on NVIDIA the stack frame that ptxas reserved, on AMD spilled vector registers.
``shared_bytes`` are those of one program. ``occupancy`` is the share of a multiprocessor's
resident warps that registers, shared memory and program slots leave possible.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton: functions compile or are interpreted

OPS = (
    "compose_kv",
    "gist_attention",
    "kv_quant",
    "retention_attention",
    "select_fit",
    "slot_attention",
)
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
RESULT = Path(__file__).parent / "results" / "compile.json"
WORKERS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ops", default=",".join(OPS), help="operations, separated by commas")
    parser.add_argument("--check", action="store_true", help="fail where a hot kernel is faulty")
    parser.add_argument("--out", type=Path, help="default: results/compile.json for all operations")
    args = parser.parse_args()
    ops = args.ops.split(",")
    out = args.out or (RESULT if set(ops) == set(OPS) else None)

    table = compile_all(ops)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    for row in table["kernels"]:
        print(
            f"{row['op']:16} {row['name']:32} {row['target']:6} {row['registers']:3} registers "
            f"{row['spills']:3} spills {row['shared_bytes']:6} bytes shared "
            f"{row['occupancy']:4.0%} occupancy"
        )
    faulty = [r for r in table["kernels"] if r["hot"] and (r["spills"] or not r["occupancy"])]
    for row in faulty:
        fault = "spills" if row["spills"] else "does not fit"
        print(f"hot kernel {fault}: {row['op']} {row['name']} on {row['target']}", file=sys.stderr)
    return int(args.check and bool(faulty))


def compile_all(ops: list[str]) -> dict[str, Any]:
    """The table of all configurations and targets, sorted."""
    import triton

    jobs = [
        (op, index, target)
        for op in ops
        for index in range(len(_compilations(op)))
        for target in TARGETS
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool:
        rows = list(pool.map(_compile, *zip(*jobs, strict=True), chunksize=3))
    rows.sort(key=lambda row: (row["op"], row["name"], row["target"]))
    return {"triton": triton.__version__, "kernels": rows}


def _compilations(op: str) -> list[Any]:
    found = importlib.import_module(f"gist_rag_kernels.{op}.kernel").compilations()
    names = [item.name for item in found]
    if len(set(names)) < len(names):
        raise ValueError(f"names of {op}'s configurations are not unique: {sorted(names)}")
    return list(found)


def _compile(op: str, index: int, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    job = _compilations(op)[index]
    names = job.kernel.arg_names
    given = {**job.signature, **dict.fromkeys(job.constants, "constexpr")}
    if set(given) != set(names):
        raise ValueError(f"{op} {job.name}: arguments {sorted(set(given) ^ set(names))} disagree")
    signature = {name: given[name].removesuffix(":16") for name in names}
    aligned = [
        i for i, name in enumerate(names) if given[name].endswith(":16") or given[name][0] == "*"
    ]
    compiled = triton.compile(
        ASTSource(
            job.kernel,
            signature,
            constexprs=dict(job.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget(*TARGETS[target]),
        options={
            "num_warps": job.num_warps,
            "num_stages": job.num_stages,
            "enable_fp_fusion": True,
        },
    )
    shared = int(compiled.metadata.shared)
    warps = int(compiled.metadata.num_warps)
    if target.startswith("gfx"):
        registers, spills = _read_amdgcn(compiled.asm["amdgcn"])
        occupancy = _occupancy_cdna3(registers, shared, warps)
    else:
        registers, spills = _read_cubin(compiled.asm["cubin"])
        occupancy = _occupancy_nvidia(registers, shared, warps, target)
    return {
        "op": op,
        "name": job.name,
        "target": target,
        "hot": job.hot,
        "num_warps": job.num_warps,
        "num_stages": job.num_stages,
        "registers": registers,
        "spills": spills,
        "shared_bytes": shared,
        "occupancy": round(occupancy, 3),
    }


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and words of stack, by the cuobjdump that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {text!r}")
    return int(found[1]), -(-(int(found[2]) + int(found[3])) // 4)


def _read_amdgcn(text: str) -> tuple[int, int]:
    """Vector registers (accumulation registers included) per lane, and spilled ones."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    if registers is None or spills is None:
        raise RuntimeError("the assembly names no vector registers")
    return int(registers[1]), int(spills[1])


def _occupancy_nvidia(registers: int, shared: int, warps: int, target: str) -> float:
    """64 warps, 32 programs, 64 K registers; 1 KiB of shared memory is the system's per program.

    Source: CUDA C++ programming guide, compute capabilities 8.0 and 9.0.
    """
    capacity = {"sm_80": 164, "sm_90": 228}[target] * 1024
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256) // warps
    by_shared = capacity // (shared + 1024)
    return min(by_registers, by_shared, 32, 64 // warps) * warps / 64


def _occupancy_cdna3(registers: int, shared: int, warps: int) -> float:
    """Four SIMDs of 8 waves and 512 registers a lane (granules of 8); 64 KiB of shared memory.

    Source: AMD CDNA3 instruction set guide.
    """
    by_registers = min(512 // (math.ceil(max(registers, 1) / 8) * 8), 8) * 4 // warps
    by_shared = 65536 // shared if shared else 32
    return min(by_registers, by_shared, 32 // warps) * warps / 32


if __name__ == "__main__":
    sys.exit(main())
