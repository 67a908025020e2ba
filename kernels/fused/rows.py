"""Sums of one row of numbers from each program, in a fixed order."""

import triton
import triton.language as tl

from flashdip.kernels.fused.device import last_to_arrive
from flashdip.kernels.fused.norm import GROUP


def sum_shapes(fits: int, programs: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the float32 rows and the int32 counters that `sum_rows` needs."""
    groups = triton.cdiv(programs, GROUP.value)
    return (fits, programs + groups + 1, width), (fits, groups + 1)


@triton.jit
def row_of(rows_ptr, program, programs, fit, WIDTH: tl.constexpr):
    """Return where a program is to store its row; see `sum_rows`."""
    rows = programs + tl.cdiv(programs, GROUP) + 1  # of one fit
    return rows_ptr + (fit.to(tl.int64) * rows + program) * WIDTH


@triton.jit
def sum_rows(rows_ptr, counters_ptr, program, programs, fit, WIDTH: tl.constexpr):
    """Sum one row from each program of a fit, in a fixed order: groups of programs first.

    Args:
        rows_ptr: [F, programs + groups + 1, WIDTH] float32: rows, their sums by group, and the sum.
        counters_ptr: [F, groups + 1] int32, zero.

    Returns:
        Whether this program is the last one, and where its fit's sum lies: only there is it valid.
    """
    groups = tl.cdiv(programs, GROUP)
    rows_ptr = row_of(rows_ptr, 0, programs, fit, WIDTH)
    groups_ptr = rows_ptr + programs * WIDTH
    counters_ptr += fit * (groups + 1)
    total_ptr = groups_ptr + groups * WIDTH
    group = program // GROUP
    members = tl.minimum(GROUP, programs - group * GROUP)
    last = False
    if last_to_arrive(counters_ptr + 1 + group, members):
        _add(rows_ptr + group * GROUP * WIDTH, members, groups_ptr + group * WIDTH, WIDTH)
        last = last_to_arrive(counters_ptr, groups)
        if last:
            _add(groups_ptr, groups, total_ptr, WIDTH)
            tl.debug_barrier()  # all warps have stored
    return last, total_ptr


@triton.jit
def _add(rows_ptr, count, total_ptr, WIDTH: tl.constexpr):
    ROWS: tl.constexpr = min(GROUP, 16384 // WIDTH)  # 64 or 128 registers of a thread
    i = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        at = rows_ptr + row[:, None] * WIDTH + i[None, :]
        total += tl.sum(tl.load(at, (row < count)[:, None], other=0.0, cache_modifier=".cg"), 0)
    tl.store(total_ptr + i, total)
