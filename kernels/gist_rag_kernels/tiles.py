"""What the attention kernels share: rows of a head as tiles, and their products."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, sums):
    """``sums + a b``; the interpreter of triton 3.9 multiplies bf16 as if it were integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def load_rows(base, rows, live, channel, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """``(N, WIDTH)`` of rows of ``SIZE`` channels, zeros where there are none."""
    inside = live[:, None]
    if WIDTH != SIZE:
        inside = inside & (channel < SIZE)[None, :]
    return tl.load(base + rows[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, live, channel, stride, tile, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    inside = live[:, None]
    if WIDTH != SIZE:
        inside = inside & (channel < SIZE)[None, :]
    target = base + rows[:, None] * stride + channel[None, :]
    tl.store(target, tile.to(base.dtype.element_ty), mask=inside)


def head_constants(size: int) -> dict[str, int]:
    """Channels of a head, and of a tile of ``tl.dot`` that holds them."""
    return {"SIZE": size, "WIDTH": max(16, int(triton.next_power_of_2(size)))}
