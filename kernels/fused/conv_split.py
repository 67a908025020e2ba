"""Tiles whose sum is shared by several programs: each hands in a part, the last adds them up.

Where tiles are few, more programs than tiles keep the GPU busy. Parts are added in order, whoever
comes last, so the bits are always the same.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.device import last_to_arrive

AT_ONCE = tl.constexpr(16384)  # elements that are on their way from memory at a time


@triton.jit
def hand_in(total, job, split, splits, parts_ptr, arrivals_ptr):
    """Store a program's part of a tile; return whether all parts are there.

    Args:
        total: The part, [pixels, channels] float32.
        job: Which tile.
        split: Which of its `splits` parts.
        parts_ptr: Scratch, [tiles, splits, pixels, channels] float32.
        arrivals_ptr: Scratch, [tiles] int32, zero.
    """
    tl.store(_part(total, job * splits + split, parts_ptr), total)
    return last_to_arrive(arrivals_ptr + job, splits)


@triton.jit
def add_up(total, job, splits, parts_ptr):
    """Return the sum of all parts of a tile; `total` says their shape."""
    SIZE: tl.constexpr = total.shape[0] * total.shape[1]
    PARTS: tl.constexpr = max(1, min(4, AT_ONCE.value // SIZE))
    part = _part(total, job * splits, parts_ptr)
    total = tl.zeros_like(total)
    for first in range(0, splits, PARTS):
        for ahead in tl.static_range(PARTS):
            there = tl.full(total.shape, 1, tl.int1) & (first + ahead < splits)
            total += tl.load(part + ahead * SIZE, there, other=0.0, cache_modifier=".cg")
        part += PARTS * SIZE
    return total


@triton.jit
def _part(total, index, parts_ptr):
    rows, columns = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1])
    offset = index.to(tl.int64) * (total.shape[0] * total.shape[1])
    return parts_ptr + offset + rows[:, None] * total.shape[1] + columns[None, :]
