"""``ragged_slot_attention`` in decoding and short prefill, against SDPA over uniform bf16 slots.

    python kernels/benchmarks/bench_slot_attention.py [--dry-run] [--out FILE]

One layer of an 8B Llama (8 KV heads of 4 query heads, D 128) with 512 to 32k slots per KV head on
average, ragged as one budget over all heads makes them and uniform, and 64 local tokens. SDPA reads
the same number of uniform bf16 slots, the local tokens and no log-mass: less work than ours. The
floor is every stored number read once, at the measured copy bandwidth.

What it is to show: int8 and int4 ragged no slower than SDPA at 2k mean slots and faster from 8k,
and ragged at most 1.2 times its own uniform case.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from common import Run, arguments, bound_implementation, passage_rows, rotated
from torch import Tensor

from gist_rag_kernels import Plan, RaggedSlots, plan, ragged_slot_attention

POSITIONS = 4096


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    slots: RaggedSlots
    plan: Plan


def main() -> None:
    run = arguments("slot_attention", __doc__)
    for rows in (1,) if run.dry else (1, 32):
        for mean in (20,) if run.dry else (512, 2048, 8192, 32768):
            for ragged in (True, False):
                for bits in (16, 8, 4):
                    measure(run, rows, mean, bits, ragged)
            uniform_sdpa(run, rows, mean)
    run.write()


def measure(run: Run, rows: int, mean: int, bits: int, ragged: bool) -> None:
    inputs_of = functools.partial(make, run, rows, mean, bits, ragged)
    inputs = inputs_of(0)
    facts = dict(bits=bits, ragged=ragged, mean_slots=mean, queries=rows)
    with bound_implementation("reference"):
        truth = call(inputs)
    with bound_implementation("triton"):
        # P and V are bfloat16 in both; the interpreter, besides, cuts where a GPU rounds.
        run.check(f"slot_attention {facts}", call(inputs), truth, atol=2e-2, rtol=2e-2)
    tables = {id(inputs.slots.cos), id(inputs.slots.sin)}  # they stay in the L2 cache
    used = [inputs.query, inputs.key, inputs.value, *inputs.slots.tensors, inputs.query]
    needed = float(sum(t.nbytes for t in used if id(t) not in tables))
    group = inputs.query.shape[1] // inputs.key.shape[1]
    tokens = len(inputs.slots.keys) + inputs.key.shape[1] * inputs.key.shape[2]
    flops = 4.0 * tokens * group * rows * inputs.key.shape[3]
    copies = rotated(inputs_of, needed, dry=run.dry)
    for implementation in ("triton",) if mean > 2048 else ("triton", "reference"):
        with bound_implementation(implementation):
            calls = [functools.partial(call, given) for given in copies]
            run.time(implementation, calls, floor_bytes=needed, floor_flops=flops, **facts)


def uniform_sdpa(run: Run, rows: int, mean: int) -> None:
    batch, heads, group, size, own = shape_of(run)

    def inputs_of(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        query = random(run, batch, heads * group, rows, size)
        key, value = random(run, 2, batch, heads, mean + own, size)
        return [query, key, value]

    query, key, value = inputs_of(0)
    needed = float(2 * query.nbytes + key.nbytes + value.nbytes)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    calls = [functools.partial(sdpa, *given) for given in rotated(inputs_of, needed, dry=run.dry)]
    facts = dict(bits=16, ragged=False, mean_slots=mean, queries=rows)
    flops = 4.0 * batch * heads * (mean + own) * group * rows * size
    run.time("sdpa", calls, floor_bytes=needed, floor_flops=flops, **facts)


def call(inputs: Inputs) -> Tensor:
    return ragged_slot_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.slots,
        inputs.query.shape[-1] ** -0.5,
        plan=inputs.plan,
    )


def make(run: Run, rows: int, mean: int, bits: int, ragged: bool, seed: int) -> Inputs:
    batch, heads, group, size, own = shape_of(run)
    generator = torch.Generator().manual_seed(seed)
    lengths = passage_rows(batch, heads, mean, generator, ragged=ragged)
    flat = lengths.flatten()
    starts = (flat.cumsum(0) - flat).view_as(lengths).to(run.device)
    lengths = lengths.to(torch.int32).to(run.device)
    total = int(flat.sum())
    torch.manual_seed(seed)
    slots = stored(run, bits, total, size, starts, lengths)
    return Inputs(
        random(run, batch, heads * group, rows, size),
        *random(run, 2, batch, heads, own + rows, size),
        slots,
        plan(starts, lengths),
    )


def stored(
    run: Run, bits: int, total: int, size: int, starts: Tensor, lengths: Tensor
) -> RaggedSlots:
    device = run.device
    bias = torch.randn(total, device=device)
    order = torch.zeros(total, dtype=torch.int32, device=device)
    if bits == 16:
        keys, values = random(run, 2, total, size)
        return RaggedSlots(keys, values, bias, order, starts, lengths)
    if bits == 8:
        numbers = torch.randint(-127, 128, (2, total, size), dtype=torch.int8, device=device)
    else:
        numbers = torch.randint(0, 256, (2, total, size // 2), dtype=torch.uint8, device=device)
    largest = 127 if bits == 8 else 7
    passages = max(1, total // 16)  # a scale per channel of each passage's 16 slots
    angles = torch.arange(POSITIONS)[:, None] * 1e4 ** (-torch.arange(size // 2) * 2.0 / size)
    angles = torch.cat((angles, angles), 1)
    return RaggedSlots(
        *numbers,
        bias,
        order,
        starts,
        lengths,
        key_scales=((torch.rand(passages, size, device=device) + 1) / largest).half(),
        scale_rows=(torch.arange(total, device=device) // 16).clamp(max=passages - 1).int(),
        value_scales=((torch.rand(total, device=device) + 1) / largest).half(),
        positions=torch.arange(total, device=device, dtype=torch.int32) % POSITIONS,
        cos=angles.cos().half().to(device),
        sin=angles.sin().half().to(device),
    )


def random(run: Run, *shape: int) -> Tensor:
    return torch.randn(shape, device=run.device, dtype=torch.bfloat16)


def shape_of(run: Run) -> tuple[int, int, int, int, int]:
    """Batch, KV heads, query heads of each, head size, local tokens before the queries."""
    return (1, 2, 2, 32, 3) if run.dry else (1, 8, 4, 128, 64)


if __name__ == "__main__":
    main()
