"""``compose_packed`` against the copy bandwidth, plain torch and ``torch.compile``.

    python kernels/benchmarks/bench_compose_kv.py [--dry-run] [--out FILE]

5 to 50 passages of 128 tokens at 8x, keys and values of an 8B Llama (32 layers, 8 KV heads, D 128)
as they are stored, into a bf16 cache: ``uniform`` heads (contiguous), ``ragged`` heads (one flat
buffer without padding) and ragged heads in ``paged`` cache pages of 16 slots. The floor is every
stored byte read once and every byte of the cache written once, at the measured copy bandwidth.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from common import LLAMA_8B, TINY, Run, arguments, bound_implementation, passage_rows, rotated

from gist_rag_kernels import Composed, PackedKV, compose_kv, compose_packed, quantise
from gist_rag_kernels.compose_kv import reference

PAGE = 16


@dataclass(frozen=True)
class Case:
    passages: int
    mean: int
    """Slots per passage, layer and head."""
    stored: str
    layout: str

    @property
    def bits(self) -> int:
        return {"bf16": 16, "int8": 8, "int4": 4}[self.stored]


def main() -> None:
    run = arguments("compose_kv", __doc__)
    shape = TINY if run.dry else LLAMA_8B
    passages = (2,) if run.dry else (5, 10, 20, 50)
    for count in passages:
        for stored in ("bf16", "int8", "int4"):
            for layout in ("uniform", "ragged", "paged"):
                measure(run, shape, Case(count, 4 if run.dry else 16, stored, layout))
        measure_floats(run, shape, count, 4 if run.dry else 16)
    run.write()


def measure(run: Run, shape: tuple[int, int, int], case: Case) -> None:
    first = make(run.device, shape, case, 0)
    size = needed_bytes(first)
    inputs = rotated(lambda seed: make(run.device, shape, case, seed), size, dry=run.dry)
    truth = make(run.device, shape, case, 0)
    with bound_implementation("reference"):
        expected = compose_packed(**truth)
    with bound_implementation("triton"):
        run.check(f"{case}", compose_packed(**first), expected, atol=1e-2, rtol=2.0**-7)
    facts = dict(passages=case.passages, slots=first["packed"].num_slots, layout=case.layout)
    for implementation in ("triton", "reference"):
        with bound_implementation(implementation):
            calls = [functools.partial(compose_packed, **given) for given in inputs]
            name = f"{case.stored} {implementation}"
            run.time(name, calls, floor_bytes=size, **facts)
    if not run.dry and case.layout == "uniform":
        with bound_implementation("reference"):
            compiled = torch.compile(compose_packed)
            calls = [functools.partial(compiled, **given) for given in inputs]
            run.time(f"{case.stored} torch.compile", calls, floor_bytes=size, **facts)


def make(
    device: torch.device, shape: tuple[int, int, int], case: Case, seed: int
) -> dict[str, Any]:
    """Arguments of ``compose_packed``."""
    layers, heads, size = shape
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = passage_rows(
        case.passages,
        layers * heads,
        case.mean,
        generator,
        ragged=case.layout != "uniform",
    )
    total, rows = int(lengths.sum()), torch.tensor([0, *lengths.flatten().tolist()]).cumsum(0)
    keys, values = torch.randn(2, total, size, device=device, dtype=torch.bfloat16)
    rows = rows.to(device, torch.int32)
    packed = (
        PackedKV(keys, values, rows) if case.bits == 16 else quantise(keys, values, rows, case.bits)
    )
    span = 8 * case.mean
    angles = torch.arange(2 * span)[:, None] * 500000.0 ** -torch.linspace(0, 1, size // 2)
    angles = torch.cat((angles, angles), 1).to(device)

    used = lengths.sum(0)  # slots of each cache row
    place = (used + PAGE - 1) // PAGE * PAGE if case.layout == "paged" else used
    starts = (place.cumsum(0) - place) + lengths.cumsum(0) - lengths
    given: dict[str, Any] = dict(
        packed=packed,
        offsets=torch.randint(span, (total,), generator=generator, dtype=torch.int16).to(device),
        base=torch.full((case.passages,), span, device=device),
        cos=angles.cos(),
        sin=angles.sin(),
        destination=starts.flatten().to(device),
        bias=torch.zeros(total, dtype=torch.float16, device=device),
        order=torch.arange(case.passages, dtype=torch.int32, device=device),
    )
    slots = int(place.sum())
    if case.layout == "paged":
        table = torch.randperm(slots // PAGE, generator=generator)
        given |= dict(block_table=table.to(device, torch.int32), page_size=PAGE)
    out = torch.zeros(2, slots, size, dtype=torch.bfloat16, device=device)
    given["out"] = Composed(
        *out,
        torch.zeros(slots, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device),
    )
    return given


def needed_bytes(given: dict[str, Any]) -> float:
    """Every stored byte once, every written slot once; tables only at the positions in use."""
    packed, out = given["packed"], given["out"]
    read = [*packed.tensors(), given["offsets"], given["destination"], given["bias"]]
    tables = 2 * given["cos"][: len(given["cos"]) // 2]
    slot = 2 * packed.head_dim * out.keys.itemsize + out.bias.itemsize + out.order.itemsize
    return float(sum(t.nbytes for t in read) + tables.nbytes + packed.num_slots * slot)


def measure_floats(run: Run, shape: tuple[int, int, int], passages: int, mean: int) -> None:
    """``compose_kv``, the differentiable route, forward: bf16 slots and an angle per slot."""
    layers, heads, size = shape
    slots = layers * heads * passages * mean

    def inputs_of(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        keys, values = torch.randn(2, slots, size, device=run.device, dtype=torch.bfloat16)
        cos, sin = torch.randn(2, slots, size, device=run.device)
        return keys, values, cos, sin, torch.randperm(slots, device=run.device), slots

    needed = float(slots * (8 * size + 8 * size + 8))
    inputs = rotated(inputs_of, needed, dry=run.dry)
    with bound_implementation("triton"):
        ours = compose_kv(*inputs[0])
    run.check("floats", ours, reference.compose_kv(*inputs[0]), atol=1e-2, rtol=2.0**-7)
    for implementation in ("triton", "reference"):
        with bound_implementation(implementation):
            calls = [functools.partial(compose_kv, *given) for given in inputs]
            facts = dict(passages=passages, slots=slots, layout="by slot")
            run.time(f"floats {implementation}", calls, floor_bytes=needed, **facts)


if __name__ == "__main__":
    main()
