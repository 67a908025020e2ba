"""Gradients made of `Gradient`: dy, or the bilinear filter's adjoint of it, and of a thin skip.

The adjoint is computed as the filter is (`flashdip.kernels.fused.smooth`): a patch of the result is
a constant matrix times dy. The pixels of the patch itself serve the skip's gradients too; so they
are one factor, and the rim about them another one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import dot, last_to_arrive, narrow
from flashdip.kernels.fused.launch import Allocator, Gradient, Launch, Map, Tile, size
from flashdip.kernels.fused.norm import load_pull, pulled_gradient
from flashdip.kernels.fused.smooth import (
    around,
    pending,
    skip_arguments,
    skip_constants,
    skip_flops,
    weights,
)

SHARES = tl.constexpr(128)  # added at a time


def backward(
    name: str,
    dy: Gradient,
    out: Tensor,
    tile: Tile,
    memory: Allocator,
    *,
    bilinear: bool,
    skip: Map | None = None,
    skip_weight: Tensor | None = None,
    taps: Tensor | None = None,
    dskip: Tensor | None = None,
    ds_skip: Tensor | None = None,
    dgamma_skip: Tensor | None = None,
    affine_skip: Tensor | None = None,
    master: Tensor | None = None,
) -> Launch:
    """Compute dy, or the filter's adjoint of it, and the gradients of a thin skip's convolution.

    All from `skip` on is there or not there together.

    Args:
        dy: The gradient of the result, [F, H, W, O].
        out: Written in the storage type: dy [F, H, W, O], or if `bilinear` the filter's adjoint of
            it [F, H + 2, W + 2, O].
        tile: Patches of `rows` x `columns`, at least 16 pixels, dealt out to at most `splits`
            programs.
        bilinear: Whether `out` is the adjoint.
        skip: [F, H, W, C]; see `forward`.
        skip_weight: [F, K, O]; see `forward`. It is s times the master weight.
        taps: [F, H, W, 9, C] in the storage type, written: what a pixel of dy gives to each of the
            nine pixels that it sees.
        dskip: [F, programs, 9 C, O] float32, written: partial sums of skip_weight's gradient, one
            of each program.
        ds_skip: [F, C] float32, written: the gradient of s.
        dgamma_skip: [F, C] float32, rows apart, written: the gradient of the join's scale.
        affine_skip: [F, 3, C] float32: mean, 1 / standard deviation, s of the join's skip channels.
        master: [F, 3, 3, at least C, O] float32, rows apart, skip channels first.
    """
    fits, height, width, outputs = dy.y.shape
    rows, columns = tile.rows, tile.columns
    border = 2 if bilinear else 0
    alone = skip is None and not bilinear
    if alone:  # pixels do not care where they lie
        height, width, rows, columns = 1, height * width, 1, tile.pixels
    patches = triton.cdiv(height + border, rows) * triton.cdiv(width + border, columns)
    programs = patches if alone else min(patches, tile.splits)
    arguments: dict[str, Tensor | int | float | None] = {
        "du_ptr": dy.du,
        "y_ptr": dy.y,
        "pull_ptr": dy.pull,
        "out_ptr": out,
        **skip_arguments(skip, skip_weight),
        "taps_ptr": taps,
        "dskip_ptr": dskip,
        "ds_ptr": ds_skip,
        "dgamma_ptr": dgamma_skip,
        "parameters": 0,
        "join_ptr": affine_skip,
        "master_ptr": master,
        "master_row": 0,
        "master_channels": 0,
        "shares_ptr": None,
        "counters_ptr": None,
        "height": height,
        "width": width,
        "programs": programs,
    }
    if ds_skip is not None and dgamma_skip is not None and master is not None:
        shares = fits * programs * 9 * ds_skip.shape[1]
        arguments |= {
            "parameters": dgamma_skip.stride(0),
            "master_row": master.stride(0),
            "master_channels": master.shape[3],
            "shares_ptr": memory.share((shares,), torch.float32),
            "counters_ptr": memory.keep((fits,), torch.int32),
        }
    return Launch(
        name,
        _smooth_backward,
        (programs, fits, 1),
        arguments,
        {
            **skip_constants(outputs, skip, skip_weight),
            "BILINEAR": bilinear,
            "ROWS": rows,
            "COLUMNS": columns,
            "RIM": max(16, triton.next_power_of_2(2 * (rows + columns + 2))),
            "BLOCK_O": max(16, triton.next_power_of_2(outputs)),
        },
        warps=tile.warps,
        stages=tile.stages,
        flops=2 * skip_flops(dy.y, skip),
        bytes=size(*dy, out, skip_weight, taps, dskip, *(skip or ())[:2]),
        gemm=bilinear or skip is not None,
    )


@triton.jit
def _settle_skip(
    dskip, k, o, fit, program, programs, ds_ptr, dgamma_ptr, parameters, join_ptr, master_ptr,
    master_row, master_channels, shares_ptr, counters_ptr, OUT: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Take this program's share of ds = <dskip, master>; the last one adds them all, in order."""
    of_master = (k // SKIP * master_channels + k % SKIP)[:, None] * OUT + o[None, :]
    live = (k < 9 * SKIP)[:, None] & (o < OUT)[None, :]
    master_ptr += fit.to(tl.int64) * master_row
    share = tl.sum(dskip * tl.load(master_ptr + of_master, live, other=0.0), 1)
    shares_ptr += fit * programs * 9 * SKIP
    tl.store(shares_ptr + program * 9 * SKIP + k, share, k < 9 * SKIP)
    if last_to_arrive(counters_ptr + fit, programs):
        i, c = tl.arange(0, SHARES), tl.arange(0, triton.next_power_of_2(SKIP))
        ds = tl.zeros([c.shape[0]], tl.float32)
        for first in range(0, programs, SHARES):
            mask = ((first + i) < programs)[:, None] & (c < SKIP)[None, :]
            for tap in tl.static_range(9):
                at = ((first + i) * 9 + tap)[:, None] * SKIP + c[None, :]
                ds += tl.sum(tl.load(shares_ptr + at, mask, other=0.0, cache_modifier=".cg"), 0)
        inverse = tl.load(join_ptr + (fit * 3 + 1) * SKIP + c, c < SKIP, other=0.0)
        tl.store(ds_ptr + fit * SKIP + c, ds, c < SKIP)
        tl.store(dgamma_ptr + fit * parameters + c, ds * inverse, c < SKIP)


@triton.jit
def _rim(j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column of the j-th place about a patch, which begins at (0, 0)."""
    upper, lower = j < COLUMNS + 2, j < 2 * (COLUMNS + 2)
    side = j - 2 * (COLUMNS + 2)
    row = tl.where(upper, -1, tl.where(lower, ROWS, side // 2))
    column = tl.where(lower, j % (COLUMNS + 2) - 1, tl.where(side % 2 == 0, -1, COLUMNS))
    return row, column


@triton.jit(do_not_specialize=["parameters", "master_channels", "height", "width", "programs"])
def _smooth_backward(
    du_ptr, y_ptr, pull_ptr, out_ptr, skip_ptr, skip_affine_ptr, skip_weight_ptr, taps_ptr,
    dskip_ptr, ds_ptr, dgamma_ptr, parameters, join_ptr, master_ptr, master_row, master_channels,
    shares_ptr, counters_ptr, height, width, programs, OUT: tl.constexpr, SKIP: tl.constexpr,
    TAPS: tl.constexpr, SKIP_ROWS: tl.constexpr, ACT: tl.constexpr, BILINEAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RIM: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    EDGE: tl.constexpr = 1 if BILINEAR else 0  # of the result, beyond dy
    program, fit = tl.program_id(0), tl.program_id(1)
    o = tl.arange(0, BLOCK_O)
    live = (o < OUT)[None, :]
    base = fit.to(tl.int64)
    du_ptr += base * height * width * OUT
    y_ptr += base * height * width * OUT
    a, b, c = load_pull(pull_ptr + fit * 3 * OUT, o, OUT)
    out_ptr += base * (height + 2 * EDGE) * (width + 2 * EDGE) * OUT
    scale = None
    shift = None
    if skip_ptr is not None:
        skip_ptr += base * height * width * SKIP
        taps_ptr += base * height * width * 9 * SKIP
        k = tl.arange(0, TAPS)
        of_weight = k[:, None] * OUT + o[None, :]
        skip_weight_ptr += fit * SKIP_ROWS * OUT
        weight = tl.load(skip_weight_ptr + of_weight, (k < SKIP_ROWS)[:, None] & live, other=0.0)
        dskip = tl.zeros([TAPS, BLOCK_O], tl.float32)
        if skip_affine_ptr is not None:
            scale, shift = pending(skip_affine_ptr + fit * 4 * SKIP, k, SKIP)

    pixel = tl.arange(0, ROWS * COLUMNS)
    own_row, own_column = pixel // COLUMNS, pixel % COLUMNS
    if BILINEAR:
        rim = tl.arange(0, RIM)
        rim_row, rim_column = _rim(rim, ROWS, COLUMNS)
        of_own = weights(own_row, own_column, own_row, own_column, out_ptr.dtype.element_ty)
        of_rim = weights(own_row, own_column, rim_row, rim_column, out_ptr.dtype.element_ty)
    across = tl.cdiv(width + 2 * EDGE, COLUMNS)
    patches = across * tl.cdiv(height + 2 * EDGE, ROWS)
    for patch in range(program, patches, programs):  # neighbours at a time, which share pixels
        top, left = patch // across * ROWS - EDGE, patch % across * COLUMNS - EDGE
        row, column = top + own_row, left + own_column
        pixel = row * width + column
        exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        dy = pulled_gradient(du_ptr, y_ptr, a, b, c, pixel, exists, o, OUT)
        at = ((row + EDGE) * (width + 2 * EDGE) + column + EDGE)[:, None] * OUT + o[None, :]
        written = ((row < height + EDGE) & (column < width + EDGE))[:, None] & live
        if BILINEAR:
            rim_y, rim_x = top + rim_row, left + rim_column
            there = (rim_y >= 0) & (rim_y < height) & (rim_x >= 0) & (rim_x < width)
            there &= rim < 2 * (ROWS + COLUMNS + 2)
            about = pulled_gradient(du_ptr, y_ptr, a, b, c, rim_y * width + rim_x, there, o, OUT)
            out = dot(of_own, dy, tl.zeros([ROWS * COLUMNS, BLOCK_O], tl.float32))
            out = narrow(dot(of_rim, about, out), out_ptr.dtype.element_ty)
        else:
            out = dy
        tl.store(out_ptr + at, out, written)
        if skip_ptr is not None:
            value = around(skip_ptr, scale, shift, row, column, exists, k, height, width, SKIP, ACT)
            taps = dot(dy, tl.trans(weight), tl.zeros([ROWS * COLUMNS, TAPS], tl.float32))
            at = pixel[:, None] * 9 * SKIP + k[None, :]
            mask = exists[:, None] & (k < 9 * SKIP)[None, :]
            tl.store(taps_ptr + at, narrow(taps, taps_ptr.dtype.element_ty), mask)
            dskip = dot(tl.trans(value), dy, dskip)

    if skip_ptr is not None:
        dskip_ptr += (base * programs + program) * 9 * SKIP * OUT
        tl.store(dskip_ptr + of_weight, dskip, (k < 9 * SKIP)[:, None] & live)
        _settle_skip(
            dskip, k, o, fit, program, programs, ds_ptr, dgamma_ptr, parameters, join_ptr,
            master_ptr, master_row, master_channels, shares_ptr, counters_ptr, OUT, SKIP,
        )  # fmt: skip
