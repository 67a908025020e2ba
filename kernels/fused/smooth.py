"""The filter behind a bilinear join, and gradients made of `Gradient`.

Bilinear enlargement is doubling followed by [1, 2, 1] / 4 along each axis. That filter changes
places with the convolution (`flashdip.kernels.fused.geometry`, "bilinear"): forward it makes the
join's result of what the folded convolution left, backward its adjoint makes the gradient that the
folded convolution needs.

A program walks down a strip of columns and keeps the last three rows, filtered along the row, in
registers: a pixel is loaded three times, from the L1 cache but for the first, instead of nine
times. What else a join needs at full resolution is done on the way: the convolution of a skip so
thin that its nine taps are one product, and both gradients of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import activate, dot, last_to_arrive, narrow
from flashdip.kernels.fused.geometry import source
from flashdip.kernels.fused.launch import Allocate, Gradient, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_moments, scratch_shapes
from flashdip.kernels.fused.pointwise import load_gradient

SHARES = tl.constexpr(32)  # added at a time


def forward(
    name: str,
    p: Tensor,
    y: Tensor,
    norm: Norm,
    affine: Tensor,
    tile: Tile,
    allocate: Allocate,
    *,
    skip: Map | None = None,
    skip_weight: Tensor | None = None,
    add: Tensor | None = None,
) -> Launch:
    """Filter a map, add what else the join convolves, and take the statistics.

    Args:
        p: [F, H + 2, W + 2, O] in the storage type.
        y: [F, H, W, O] in the storage type, written: the filtered p, plus the convolution of
            `skip`, plus `add`.
        norm: The normalisation of y.
        affine: [F, 4, O] float32, written; see `flashdip.kernels.fused.norm`.
        tile: `rows` down a strip of `columns`, `outputs` channels at a time.
        skip: [F, H, W, C], to be convolved 3x3, padded by reflection.
        skip_weight: [F, K, O] in the storage type: row (3 ky + kx) C + c, zero from 9 C to K.
        add: [F, H, W, O] in the storage type.
    """
    fits, height, width, outputs = y.shape
    block = min(tile.outputs, max(16, triton.next_power_of_2(outputs)))
    columns = tile.columns if skip is None else max(16, tile.columns)
    tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, columns)
    parts, counters = scratch_shapes(fits, tiles, outputs, block)
    return Launch(
        name,
        _forward,
        (tiles * triton.cdiv(outputs, block), fits, 1),
        {
            "p_ptr": p,
            "y_ptr": y,
            "add_ptr": add,
            **_of_skip(skip, skip_weight),
            "gamma_ptr": norm.gamma,
            "beta_ptr": norm.beta,
            "affine_ptr": affine,
            "parameters": norm.gamma.stride(0),
            "parts_ptr": allocate((parts,), torch.float32),
            "counters_ptr": allocate((counters,), torch.int32),
            "height": height,
            "width": width,
            "rows": tile.rows,
        },
        {
            **_constants(outputs, skip, skip_weight),
            "COLUMNS": columns,
            "BLOCK_O": block,
        },
        warps=tile.warps,
        stages=tile.stages,
        flops=_flops(y, skip),
        bytes=size(p, y, affine, add, skip_weight, *(skip or ())[:2]),
        gemm=skip is not None,
    )


def backward(
    name: str,
    dy: Gradient,
    out: Tensor,
    tile: Tile,
    allocate: Allocate,
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
        tile: `rows` down a strip of `columns`.
        bilinear: Whether `out` is the adjoint.
        skip: [F, H, W, C]; see `forward`.
        skip_weight: [F, K, O]; see `forward`. It is s times the master weight.
        taps: [F, H, W, 9, C] in the storage type, written: what a pixel of dy gives to each of the
            nine pixels that it sees.
        dskip: [F, programs, K, O] float32, written: partial sums of skip_weight's gradient, one of
            each program.
        ds_skip: [F, C] float32, written: the gradient of s.
        dgamma_skip: [F, C] float32, rows apart, written: the gradient of the join's scale.
        affine_skip: [F, 3, C] float32: mean, 1 / standard deviation, s of the join's skip channels.
        master: [F, 3, 3, at least C, O] float32, rows apart, skip channels first.
    """
    fits, height, width, outputs = dy.y.shape
    rows, columns = tile.rows, tile.columns
    if skip is not None:
        columns = max(16, columns)
    elif not bilinear:  # pixels do not care where they lie
        height, width, rows, columns = 1, height * width, 1, tile.pixels
    border = 2 if bilinear else 0
    units = triton.cdiv(height + border, rows) * triton.cdiv(width + border, columns)
    programs = units if dskip is None else dskip.shape[1]
    arguments: dict[str, Tensor | int | float | None] = {
        "du_ptr": dy.du,
        "y_ptr": dy.y,
        "pull_ptr": dy.pull,
        "out_ptr": out,
        **_of_skip(skip, skip_weight),
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
        "rows": rows,
        "programs": programs,
    }
    if ds_skip is not None and dgamma_skip is not None and master is not None:
        shares = fits * programs * 9 * ds_skip.shape[1]
        arguments |= {
            "parameters": dgamma_skip.stride(0),
            "master_row": master.stride(0),
            "master_channels": master.shape[3],
            "shares_ptr": allocate((shares,), torch.float32),
            "counters_ptr": allocate((fits,), torch.int32),
        }
    return Launch(
        name,
        _backward,
        (programs, fits, 1),
        arguments,
        {
            **_constants(outputs, skip, skip_weight),
            "BILINEAR": bilinear,
            "COLUMNS": columns,
            "BLOCK_O": max(16, triton.next_power_of_2(outputs)),
        },
        warps=tile.warps,
        stages=tile.stages,
        flops=2 * _flops(dy.y, skip),
        bytes=size(*dy, out, skip_weight, taps, dskip, *(skip or ())[:2]),
        gemm=skip is not None,
    )


def _of_skip(skip: Map | None, weight: Tensor | None) -> dict[str, Tensor | int | float | None]:
    return {
        "skip_ptr": None if skip is None else skip.raw,
        "skip_affine_ptr": None if skip is None else skip.affine,
        "skip_weight_ptr": weight,
    }


def _constants(outputs: int, skip: Map | None, weight: Tensor | None) -> dict[str, int | str]:
    return {
        "OUT": outputs,
        "SKIP": 0 if skip is None else skip.raw.shape[-1],
        "TAPS": 0 if weight is None else triton.next_power_of_2(weight.shape[1]),
        "SKIP_ROWS": 0 if weight is None else weight.shape[1],
        "ACT": "none" if skip is None else skip.act,
    }


def _flops(y: Tensor, skip: Map | None) -> int:
    """Return the operations of a thin skip's convolution."""
    return 0 if skip is None else 2 * 9 * skip.raw.shape[-1] * y.numel()


@triton.jit
def _along(p_ptr, row, column, height, width, o, live, OUT: tl.constexpr):
    """Filter a row of p [height, width, OUT] by [1, 2, 1], from `column` on; 0 below the map."""
    p_ptr += (row * width + column)[:, None] * OUT + o[None, :]
    live = live & (row < height)[:, None]
    left = tl.load(p_ptr, live, other=0.0).to(tl.float32)
    centre = tl.load(p_ptr + OUT, live, other=0.0).to(tl.float32)
    right = tl.load(p_ptr + 2 * OUT, live, other=0.0).to(tl.float32)
    return left + 2 * centre + right


@triton.jit
def _around(
    skip_ptr, affine_ptr, row, column, exists, k, height, width, SKIP: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Return the values about the pixels (row, column), one row of the product's left factor each.

    Args:
        skip_ptr: Of the fit, [height, width, SKIP].
        affine_ptr: Of the fit, [4, SKIP], or None.
        k: The factor's columns: (3 ky + kx) SKIP + c; 0 where there is no such tap.
    """
    tap, c, live = k // SKIP, k % SKIP, k < 9 * SKIP
    y, _ = source(0, row[:, None], (tap // 3)[None, :], height, "conv", 1, 1, "reflection")
    x, _ = source(0, column[:, None], (tap % 3)[None, :], width, "conv", 1, 1, "reflection")
    at = (y * width + x) * SKIP + c[None, :]
    value = tl.load(skip_ptr + at, exists[:, None] & live[None, :], other=0.0)
    if affine_ptr is not None:
        scale = tl.load(affine_ptr + c, live, other=0.0)[None, :]
        shift = tl.load(affine_ptr + SKIP + c, live, other=0.0)[None, :]
        u = value.to(tl.float32) * scale + shift
        value = narrow(activate(u, ACT), skip_ptr.dtype.element_ty)
    return value


@triton.jit(do_not_specialize=["parameters", "height", "width", "rows"])
def _forward(
    p_ptr, y_ptr, add_ptr, skip_ptr, skip_affine_ptr, skip_weight_ptr, gamma_ptr, beta_ptr,
    affine_ptr, parameters, parts_ptr, counters_ptr, height, width, rows, OUT: tl.constexpr,
    SKIP: tl.constexpr, TAPS: tl.constexpr, SKIP_ROWS: tl.constexpr, ACT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(OUT, BLOCK_O)
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    fit = tl.program_id(1)
    across = tl.cdiv(width, COLUMNS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    top = tile // across * rows
    first = top + tl.zeros_like(column)
    count = tl.minimum(rows, height - top)
    exists = column < width
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    live = exists[:, None] & (o < OUT)[None, :]

    base = fit.to(tl.int64)
    p_ptr += base * (height + 2) * (width + 2) * OUT
    y_ptr += base * height * width * OUT
    if add_ptr is not None:
        add_ptr += base * height * width * OUT
    if skip_ptr is not None:
        skip_ptr += base * height * width * SKIP
        if skip_affine_ptr is not None:
            skip_affine_ptr += fit * 4 * SKIP
        k = tl.arange(0, TAPS)
        of_weight = skip_weight_ptr + (fit * SKIP_ROWS + k)[:, None] * OUT + o[None, :]
        live_weight = (k < SKIP_ROWS)[:, None] & (o < OUT)[None, :]
        weight = tl.load(of_weight, live_weight, other=0.0)

    above = _along(p_ptr, first, column, height + 2, width + 2, o, live, OUT)
    middle = _along(p_ptr, first + 1, column, height + 2, width + 2, o, live, OUT)
    below = _along(p_ptr, first + 2, column, height + 2, width + 2, o, live, OUT)
    mean = tl.zeros([COLUMNS, BLOCK_O], tl.float32)  # of the rows so far, and squares about it
    squares = tl.zeros([COLUMNS, BLOCK_O], tl.float32)
    for done in range(0, count):
        row = first + done
        ahead = _along(p_ptr, row + 3, column, height + 2, width + 2, o, live, OUT)
        y = (above + 2 * middle + below) * 0.0625
        above, middle, below = middle, below, ahead
        at = (row * width + column)[:, None] * OUT + o[None, :]
        if add_ptr is not None:
            y += tl.load(add_ptr + at, live, other=0.0).to(tl.float32)
        if skip_ptr is not None:
            value = _around(
                skip_ptr, skip_affine_ptr, row, column, exists, k, height, width, SKIP, ACT
            )
            y = dot(value, weight, y)
        stored = narrow(y, y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, stored, live)
        stored = stored.to(tl.float32)
        off = stored - mean  # Welford (1962)
        mean += off * (1.0 / (done + 1))
        squares += off * (stored - mean)

    ones = exists.to(tl.float32)
    strips = tl.sum(ones, 0)
    centre = tl.sum(mean * ones[:, None], 0) / strips
    off = mean - centre[None, :]
    squares = tl.sum((squares + count * off * off) * ones[:, None], 0)
    finish_moments(
        count * strips, centre, squares, o, tile, across * tl.cdiv(height, rows), fit,
        tl.num_programs(1), parts_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters,
        OUT,
    )  # fmt: skip


@triton.jit
def _along_gradient(
    du_ptr, y_ptr, pull_ptr, row, column, height, width, o, OUT: tl.constexpr
):  # fmt: skip
    """Return a row of dy [height, width, OUT], and it filtered by [1, 2, 1] up to `column`."""
    pixel, inside = row * width + column, (row >= 0) & (row < height)
    here = inside & (column < width)
    left = inside & (column >= 1) & (column < width + 1)
    farther = inside & (column >= 2) & (column < width + 2)
    dy = load_gradient(du_ptr, y_ptr, pull_ptr, pixel, here, o, OUT)
    total = dy.to(tl.float32)
    total += 2 * load_gradient(du_ptr, y_ptr, pull_ptr, pixel - 1, left, o, OUT).to(tl.float32)
    total += load_gradient(du_ptr, y_ptr, pull_ptr, pixel - 2, farther, o, OUT).to(tl.float32)
    return dy, total


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


@triton.jit(
    do_not_specialize=["parameters", "master_channels", "height", "width", "rows", "programs"]
)
def _backward(
    du_ptr, y_ptr, pull_ptr, out_ptr, skip_ptr, skip_affine_ptr, skip_weight_ptr, taps_ptr,
    dskip_ptr, ds_ptr, dgamma_ptr, parameters, join_ptr, master_ptr, master_row, master_channels,
    shares_ptr, counters_ptr, height, width, rows, programs, OUT: tl.constexpr, SKIP: tl.constexpr,
    TAPS: tl.constexpr, SKIP_ROWS: tl.constexpr, ACT: tl.constexpr, BILINEAR: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    BORDER: tl.constexpr = 2 if BILINEAR else 0
    program, fit = tl.program_id(0), tl.program_id(1)
    o = tl.arange(0, BLOCK_O)
    base = fit.to(tl.int64)
    du_ptr += base * height * width * OUT
    y_ptr += base * height * width * OUT
    pull_ptr += fit * 3 * OUT
    out_ptr += base * (height + BORDER) * (width + BORDER) * OUT
    if skip_ptr is not None:
        skip_ptr += base * height * width * SKIP
        taps_ptr += base * height * width * 9 * SKIP
        if skip_affine_ptr is not None:
            skip_affine_ptr += fit * 4 * SKIP
        k = tl.arange(0, TAPS)
        of_weight = k[:, None] * OUT + o[None, :]
        live_weight = (k < SKIP_ROWS)[:, None] & (o < OUT)[None, :]
        skip_weight_ptr += fit * SKIP_ROWS * OUT
        weight = tl.load(skip_weight_ptr + of_weight, live_weight, other=0.0)
        dskip = tl.zeros([TAPS, BLOCK_O], tl.float32)

    across = tl.cdiv(width + BORDER, COLUMNS)
    units = across * tl.cdiv(height + BORDER, rows)
    for unit in range(program * units // programs, (program + 1) * units // programs):
        column = unit % across * COLUMNS + tl.arange(0, COLUMNS)
        top = unit // across * rows
        first = top + tl.zeros_like(column)
        live_out = (column < width + BORDER)[:, None] & (o < OUT)[None, :]
        if BILINEAR:
            _, above = _along_gradient(
                du_ptr, y_ptr, pull_ptr, first - 2, column, height, width, o, OUT
            )
            _, middle = _along_gradient(
                du_ptr, y_ptr, pull_ptr, first - 1, column, height, width, o, OUT
            )
        for done in range(0, tl.minimum(rows, height + BORDER - top)):
            row = first + done
            exists = (column < width) & (row < height)
            if BILINEAR:
                dy, below = _along_gradient(
                    du_ptr, y_ptr, pull_ptr, row, column, height, width, o, OUT
                )
                out = narrow((above + 2 * middle + below) * 0.0625, out_ptr.dtype.element_ty)
                above, middle = middle, below
            else:
                pixel = row * width + column
                dy = load_gradient(du_ptr, y_ptr, pull_ptr, pixel, exists, o, OUT)
                out = dy
            at = (row * (width + BORDER) + column)[:, None] * OUT + o[None, :]
            tl.store(out_ptr + at, out, live_out)
            if skip_ptr is not None:
                taps = dot(dy, tl.trans(weight), tl.zeros([COLUMNS, TAPS], tl.float32))
                at = (row * width + column)[:, None] * 9 * SKIP + k[None, :]
                live = exists[:, None] & (k < 9 * SKIP)[None, :]
                tl.store(taps_ptr + at, narrow(taps, taps_ptr.dtype.element_ty), live)
                value = _around(
                    skip_ptr, skip_affine_ptr, row, column, exists, k, height, width, SKIP, ACT
                )
                dskip = dot(tl.trans(value), dy, dskip)

    if skip_ptr is not None:
        dskip_ptr += (base * programs + program) * SKIP_ROWS * OUT
        tl.store(dskip_ptr + of_weight, dskip, live_weight)
        _settle_skip(
            dskip, k, o, fit, program, programs, ds_ptr, dgamma_ptr, parameters, join_ptr,
            master_ptr, master_row, master_channels, shares_ptr, counters_ptr, OUT, SKIP,
        )  # fmt: skip
