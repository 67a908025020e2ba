"""Halving by pooling, between a convolution and its normalisation.

The convolution is computed at full resolution first. What it leaves behind is what the pooling made
of it: averages of 2x2 pixels or Lanczos-weighted ones, separable filters as in
`flashdip.kernels.resample`, or the largest of 2x2 pixels. The full result is not needed again:
filters are linear, and which of four pixels is the largest one is kept.

The way back is a gather: a pixel's gradient is the weighted sum of those of a short run of rows and
columns of the halved map, as in `flashdip.kernels.fused.resample`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels import resample
from flashdip.kernels.fused.device import narrow
from flashdip.kernels.fused.launch import Allocator, Gradient, Launch, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_forward, load_gradient, scratch_shapes
from flashdip.kernels.fused.resample import before, copied, runs
from flashdip.kernels.opset import Down


def forward(
    name: str,
    x: Tensor,
    y: Tensor,
    down: Down,
    largest: Tensor | None,
    norm: Norm,
    affine: Tensor,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Pool, and take the statistics.

    Args:
        x: [F, 2 H, 2 W, C] in the storage type.
        y: [F, H, W, C] in the storage type, written.
        down: How; not by "stride".
        largest: Which of its four pixels the largest is, 0 .. 3 line by line, the first of equal
            ones, [F, H, W, C] uint8, written; with "max" only.
        norm: The normalisation of y.
        affine: [F, 4, C] float32, written; see `flashdip.kernels.fused.norm`.
        tile: `pixels` of y and `outputs` channels a program.
        memory: Where scratch comes from.
    """
    fits, height, width, channels = y.shape
    tiles = triton.cdiv(height * width, tile.pixels)
    parts, counters = scratch_shapes(fits, tiles, channels, tile.outputs)
    taps = torch.tensor(resample.taps(_filter(down), 2))
    return Launch(
        name,
        _forward,
        (tiles * triton.cdiv(channels, tile.outputs), fits, 1),
        {
            "x_ptr": x,
            "y_ptr": y,
            "largest_ptr": largest,
            "taps_ptr": copied(taps, memory),
            "gamma_ptr": norm.gamma,
            "beta_ptr": norm.beta,
            "affine_ptr": affine,
            "parameters": norm.gamma.stride(0),
            "parts_ptr": memory.share((parts,), torch.float32),
            "counters_ptr": memory.keep((counters,), torch.int32),
            "height": height,
            "width": width,
        },
        {
            "TAPS": len(taps),
            "BEFORE": before(_filter(down), 2),
            "C": channels,
            "PIXELS": tile.pixels,
            "BLOCK": tile.outputs,
        },
        warps=tile.warps,
        stages=tile.stages,
        bytes=size(x, y, largest, affine, norm.gamma, norm.beta),
    )


def backward(
    name: str,
    dy: Gradient,
    out: Tensor,
    down: Down,
    largest: Tensor | None,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Compute the gradient of what was pooled.

    Args:
        dy: The gradient of the pooled map, [F, H, W, C].
        out: [F, 2 H, 2 W, C] in the storage type, written.
        down: How; see `forward`, as for what follows.
        largest: Read.
        tile: `pixels` of out and `outputs` channels a program.
        memory: Where scratch comes from.
    """
    fits, height, width, channels = out.shape
    tiles = triton.cdiv(height * width, tile.pixels)
    first_y, weight_y = runs(_filter(down), 2, height)
    first_x, weight_x = runs(_filter(down), 2, width)
    return Launch(
        name,
        _backward,
        (tiles * triton.cdiv(channels, tile.outputs), fits, 1),
        {
            "du_ptr": dy.du,
            "y_ptr": dy.y,
            "pull_ptr": dy.pull,
            "out_ptr": out,
            "largest_ptr": largest,
            "first_y_ptr": copied(first_y, memory),
            "weight_y_ptr": copied(weight_y, memory),
            "first_x_ptr": copied(first_x, memory),
            "weight_x_ptr": copied(weight_x, memory),
            "height": height,
            "width": width,
        },
        {
            "RUN_Y": weight_y.shape[1],
            "RUN_X": weight_x.shape[1],
            "C": channels,
            "PIXELS": tile.pixels,
            "BLOCK": tile.outputs,
        },
        warps=tile.warps,
        stages=tile.stages,
        bytes=size(*dy, out, largest),
    )


def _filter(down: Down) -> resample.Kernel:
    """Return which pixels are pooled, and how they are weighted but for the largest."""
    return down if down in ("lanczos2", "lanczos3") else "box"


@triton.jit
def _place(height, width, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tile, its pixels, their rows and columns, which exist, its channels."""
    blocks = tl.cdiv(C, BLOCK)
    tile = tl.program_id(0) // blocks
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return tile, pixel, pixel // width, pixel % width, pixel < height * width, c


@triton.jit(do_not_specialize=["parameters", "height", "width"])
def _forward(
    x_ptr, y_ptr, largest_ptr, taps_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, parts_ptr,
    counters_ptr, height, width, TAPS: tl.constexpr, BEFORE: tl.constexpr, C: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    tile, pixel, row, column, exists, c = _place(height, width, C, PIXELS, BLOCK)
    mask = exists[:, None] & (c < C)[None, :]
    own = pixel[:, None] * C + c[None, :]
    base = fit.to(tl.int64) * height * width * C
    total = tl.zeros([PIXELS, BLOCK], tl.float32)
    largest = tl.zeros([PIXELS, BLOCK], tl.int32)
    for t in range(TAPS):
        y = tl.minimum(tl.maximum(2 * row + t - BEFORE, 0), 2 * height - 1)
        for s in tl.static_range(TAPS):
            x = tl.minimum(tl.maximum(2 * column + s - BEFORE, 0), 2 * width - 1)
            at = (y * (2 * width) + x)[:, None] * C + c[None, :]
            value = tl.load(x_ptr + 4 * base + at, mask, other=0.0).to(tl.float32)
            if largest_ptr is not None:
                place = 2 * t + s
                larger = (value > total) | (place == 0)
                largest = tl.where(larger, place, largest)
                total = tl.where(larger, value, total)
            else:
                total += tl.load(taps_ptr + t) * tl.load(taps_ptr + s) * value
    if largest_ptr is not None:
        tl.store(largest_ptr + base + own, largest.to(tl.uint8), mask)
    y = narrow(total, y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + own, y, mask)
    finish_forward(
        y.to(tl.float32), exists, c, tile, tl.cdiv(height * width, PIXELS), fit,
        tl.num_programs(1), parts_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["height", "width"])
def _backward(
    du_ptr, y_ptr, pull_ptr, out_ptr, largest_ptr, first_y_ptr, weight_y_ptr, first_x_ptr,
    weight_x_ptr, height, width, RUN_Y: tl.constexpr, RUN_X: tl.constexpr, C: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    _, pixel, y, x, exists, c = _place(height, width, C, PIXELS, BLOCK)
    mask = exists[:, None] & (c < C)[None, :]
    high, wide = height // 2, width // 2
    base = fit.to(tl.int64) * high * wide * C
    pull_ptr += fit * 3 * C
    first_y = tl.load(first_y_ptr + y, exists, other=0)
    first_x = tl.load(first_x_ptr + x, exists, other=0)
    total = tl.zeros([PIXELS, BLOCK], tl.float32)
    for t in range(RUN_Y):
        row = tl.minimum(first_y + t, high - 1)
        of_row = tl.load(weight_y_ptr + y * RUN_Y + t, exists, other=0.0)
        for s in tl.static_range(RUN_X):
            seen = row * wide + tl.minimum(first_x + s, wide - 1)
            dy = load_gradient(du_ptr + base, y_ptr + base, pull_ptr, seen, exists, c, C)
            if largest_ptr is not None:
                at = seen[:, None] * C + c[None, :]
                largest = tl.load(largest_ptr + base + at, mask, other=0).to(tl.int32)
                total += tl.where(largest == (y % 2 * 2 + x % 2)[:, None], dy.to(tl.float32), 0.0)
            else:
                weight = of_row * tl.load(weight_x_ptr + x * RUN_X + s, exists, other=0.0)
                total += weight[:, None] * dy.to(tl.float32)
    at = pixel[:, None] * C + c[None, :]
    tl.store(out_ptr + 4 * base + at, narrow(total, out_ptr.dtype.element_ty), mask)
