"""The filter behind a bilinear join; its adjoint is in `smooth_backward`.

Bilinear enlargement is doubling followed by [1, 2, 1] / 4 along each axis. That filter changes
places with the convolution (`flashdip.kernels.fused.geometry`, "bilinear"): forward it makes the
join's result of what the folded convolution left, backward its adjoint makes the gradient that the
folded convolution needs.

Memory bounds both, so the matrix units, idle otherwise, do the filtering: the pixels of a patch are
a product of a constant matrix, the filter's weights between any two places, and the pixels that
they see. A program loads each of these once, and the weights 1, 2 and 4 sixteenths are exact in
every storage type. What else a join needs at full resolution is done on the way: the convolution
of a skip so thin that its nine taps are one product more.

The matrix units are idle most of the time. At every patch, results pass through shared memory once
so that whole lines are written, and backward dy does because it is made in registers and is a
factor. That costs less than the memory's time, which it overlaps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import activate, dot, narrow
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_moments, scratch_shapes


def forward(
    name: str,
    p: Tensor,
    y: Tensor,
    norm: Norm,
    affine: Tensor,
    tile: Tile,
    memory: Allocator,
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
        tile: Patches of `rows` x `columns`, at least 16 pixels, `outputs` channels at a time, dealt
            out to at most `splits` programs.
        skip: [F, H, W, C], to be convolved 3x3, padded by reflection.
        skip_weight: [F, K, O] in the storage type: row (3 ky + kx) C + c, zero from 9 C to K.
        add: [F, H, W, O] in the storage type.
    """
    fits, height, width, outputs = y.shape
    block = min(tile.outputs, max(16, triton.next_power_of_2(outputs)))
    patches = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    programs = min(patches, tile.splits)
    parts, counters = scratch_shapes(fits, programs, outputs, block)
    return Launch(
        name,
        _smooth_forward,
        (programs * triton.cdiv(outputs, block), fits, 1),
        {
            "p_ptr": p,
            "y_ptr": y,
            "add_ptr": add,
            **skip_arguments(skip, skip_weight),
            "gamma_ptr": norm.gamma,
            "beta_ptr": norm.beta,
            "affine_ptr": affine,
            "parameters": norm.gamma.stride(0),
            "parts_ptr": memory.share((parts,), torch.float32),
            "counters_ptr": memory.keep((counters,), torch.int32),
            "height": height,
            "width": width,
            "programs": programs,
        },
        {
            **skip_constants(outputs, skip, skip_weight),
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "SEEN": max(16, triton.next_power_of_2((tile.rows + 2) * (tile.columns + 2))),
            "BLOCK_O": block,
        },
        warps=tile.warps,
        stages=tile.stages,
        flops=skip_flops(y, skip),
        bytes=size(p, y, affine, add, skip_weight, *(skip or ())[:2]),
        gemm=True,
    )


def skip_arguments(
    skip: Map | None, weight: Tensor | None
) -> dict[str, Tensor | int | float | None]:
    """Return what a kernel is given of a thin skip; see `forward`."""
    return {
        "skip_ptr": None if skip is None else skip.raw,
        "skip_affine_ptr": None if skip is None else skip.affine,
        "skip_weight_ptr": weight,
    }


def skip_constants(outputs: int, skip: Map | None, weight: Tensor | None) -> dict[str, int | str]:
    """Return what is compiled into a kernel for a thin skip."""
    return {
        "OUT": outputs,
        "SKIP": 0 if skip is None else skip.raw.shape[-1],
        "TAPS": 0 if weight is None else triton.next_power_of_2(weight.shape[1]),
        "SKIP_ROWS": 0 if weight is None else weight.shape[1],
        "ACT": "none" if skip is None else skip.act,
    }


def skip_flops(y: Tensor, skip: Map | None) -> int:
    """Return the operations of a thin skip's convolution."""
    return 0 if skip is None else 2 * 9 * skip.raw.shape[-1] * y.numel()


@triton.jit
def weights(row, column, seen_row, seen_column, DTYPE: tl.constexpr):
    """Return the filter's weights between pixels and those they see, [pixels, seen]."""
    down = tl.maximum(2 - tl.abs(row[:, None] - seen_row[None, :]), 0)
    across = tl.maximum(2 - tl.abs(column[:, None] - seen_column[None, :]), 0)
    return narrow((down * across).to(tl.float32) * 0.0625, DTYPE)


@triton.jit
def _reflected(i, side):
    # Minima and maxima: the compiler follows which columns are constant through them, and loads the
    # channels of a tap together.
    i = tl.maximum(i, -i)
    return tl.minimum(i, 2 * (side - 1) - i)


@triton.jit
def around(
    skip_ptr, scale, shift, row, column, exists, k, height, width, SKIP: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Return the values about the pixels (row, column), one row of the product's left factor each.

    Args:
        skip_ptr: Of the fit, [height, width, SKIP].
        scale: For each of the factor's columns, or None where the map is the value, as `shift`.
        k: The factor's columns: (3 ky + kx) SKIP + c; 0 where there is no such tap.
    """
    tap, c, live = k // SKIP, k % SKIP, k < 9 * SKIP
    y = _reflected(row[:, None] + (tap // 3 - 1)[None, :], height)
    x = _reflected(column[:, None] + (tap % 3 - 1)[None, :], width)
    at = (y * width + x) * SKIP + c[None, :]
    value = tl.load(skip_ptr + at, exists[:, None] & live[None, :], other=0.0)
    if scale is not None:
        u = value.to(tl.float32) * scale[None, :] + shift[None, :]
        value = narrow(activate(u, ACT), skip_ptr.dtype.element_ty)
    return value


@triton.jit
def pending(affine_ptr, k, SKIP: tl.constexpr):
    """Return the scale and shift of `around` for the columns k, out of [4, SKIP]."""
    scale = tl.load(affine_ptr + k % SKIP, k < 9 * SKIP, other=0.0)
    shift = tl.load(affine_ptr + SKIP + k % SKIP, k < 9 * SKIP, other=0.0)
    return scale, shift


@triton.jit(do_not_specialize=["parameters", "height", "width", "programs"])
def _smooth_forward(
    p_ptr, y_ptr, add_ptr, skip_ptr, skip_affine_ptr, skip_weight_ptr, gamma_ptr, beta_ptr,
    affine_ptr, parameters, parts_ptr, counters_ptr, height, width, programs, OUT: tl.constexpr,
    SKIP: tl.constexpr, TAPS: tl.constexpr, SKIP_ROWS: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEEN: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(OUT, BLOCK_O)
    block, program = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    fit = tl.program_id(1)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    live = (o < OUT)[None, :]

    base = fit.to(tl.int64)
    p_ptr += base * (height + 2) * (width + 2) * OUT
    y_ptr += base * height * width * OUT
    if add_ptr is not None:
        add_ptr += base * height * width * OUT
    scale = None
    shift = None
    if skip_ptr is not None:
        skip_ptr += base * height * width * SKIP
        k = tl.arange(0, TAPS)
        of_weight = skip_weight_ptr + (fit * SKIP_ROWS + k)[:, None] * OUT + o[None, :]
        weight = tl.load(of_weight, (k < SKIP_ROWS)[:, None] & live, other=0.0)
        if skip_affine_ptr is not None:
            scale, shift = pending(skip_affine_ptr + fit * 4 * SKIP, k, SKIP)

    pixel, seen = tl.arange(0, ROWS * COLUMNS), tl.arange(0, SEEN)
    own_row, own_column = pixel // COLUMNS, pixel % COLUMNS
    seen_row, seen_column = seen // (COLUMNS + 2), seen % (COLUMNS + 2)
    smoothing = weights(own_row + 1, own_column + 1, seen_row, seen_column, p_ptr.dtype.element_ty)
    count = tl.zeros([ROWS * COLUMNS], tl.float32)  # of a place in the patch, so far
    mean = tl.zeros([ROWS * COLUMNS, BLOCK_O], tl.float32)
    squares = tl.zeros([ROWS * COLUMNS, BLOCK_O], tl.float32)
    across = tl.cdiv(width, COLUMNS)
    patches = across * tl.cdiv(height, ROWS)
    for patch in range(program, patches, programs):  # neighbours at a time, which share pixels
        top, left = patch // across * ROWS, patch % across * COLUMNS
        row, column = top + seen_row, left + seen_column
        there = (seen_row < ROWS + 2) & (row < height + 2) & (column < width + 2)
        at = (row * (width + 2) + column)[:, None] * OUT + o[None, :]
        p = tl.load(p_ptr + at, there[:, None] & live, other=0.0)
        y = dot(smoothing, p, tl.zeros([ROWS * COLUMNS, BLOCK_O], tl.float32))
        row, column = top + own_row, left + own_column
        exists = (row < height) & (column < width)
        if skip_ptr is not None:
            value = around(skip_ptr, scale, shift, row, column, exists, k, height, width, SKIP, ACT)
            y = dot(value, weight, y)
        at = (row * width + column)[:, None] * OUT + o[None, :]
        mask = exists[:, None] & live
        if add_ptr is not None:
            y += tl.load(add_ptr + at, mask, other=0.0).to(tl.float32)
        stored = narrow(y, y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, stored, mask)
        stored = stored.to(tl.float32)
        ones = exists.to(tl.float32)
        count += ones
        off = (stored - mean) * ones[:, None]  # Welford (1962)
        mean += off * (1.0 / tl.maximum(count, 1.0))[:, None]
        squares += off * (stored - mean)

    pixels = tl.sum(count, 0)
    centre = tl.sum(mean * count[:, None], 0) / pixels
    off = mean - centre[None, :]
    squares = tl.sum(squares + count[:, None] * off * off, 0)
    finish_moments(
        pixels, centre, squares, o, program, programs, fit, tl.num_programs(1), parts_ptr,
        counters_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, OUT,
    )  # fmt: skip
