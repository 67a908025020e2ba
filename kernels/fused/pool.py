"""Halving by the average of 2x2 pixels, between a convolution and its normalisation.

The convolution is computed at full resolution first. What it leaves behind is its average; the full
result is not needed again, for all four pixels of a square have the same gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import narrow
from flashdip.kernels.fused.launch import Allocate, Gradient, Launch, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_forward, load_gradient, scratch_shapes


def forward(
    name: str, x: Tensor, y: Tensor, norm: Norm, affine: Tensor, tile: Tile, allocate: Allocate
) -> Launch:
    """Average squares of pixels, and take the statistics.

    Args:
        x: [F, 2 H, 2 W, C] in the storage type.
        y: [F, H, W, C] in the storage type, written.
        norm: The normalisation of y.
        affine: [F, 4, C] float32, written; see `flashdip.kernels.fused.norm`.
        tile: `pixels` of y and `outputs` channels a program.
    """
    fits, height, width, channels = y.shape
    tiles = triton.cdiv(height * width, tile.pixels)
    parts, counters = scratch_shapes(fits, tiles, channels, tile.outputs)
    return Launch(
        name,
        _forward,
        (tiles * triton.cdiv(channels, tile.outputs), fits, 1),
        {
            "x_ptr": x,
            "y_ptr": y,
            "gamma_ptr": norm.gamma,
            "beta_ptr": norm.beta,
            "affine_ptr": affine,
            "parameters": norm.gamma.stride(0),
            "parts_ptr": allocate((parts,), torch.float32),
            "counters_ptr": allocate((counters,), torch.int32),
            "height": height,
            "width": width,
        },
        {"C": channels, "PIXELS": tile.pixels, "BLOCK": tile.outputs},
        warps=tile.warps,
        stages=tile.stages,
        bytes=size(x, y, affine, norm.gamma, norm.beta),
    )


def backward(name: str, dy: Gradient, out: Tensor, tile: Tile) -> Launch:
    """Compute the gradient of what was averaged.

    Args:
        dy: The gradient of the averages, [F, H, W, C].
        out: [F, 2 H, 2 W, C] in the storage type, written.
        tile: `pixels` of dy and `outputs` channels a program.
    """
    fits, height, width, channels = dy.y.shape
    tiles = triton.cdiv(height * width, tile.pixels)
    return Launch(
        name,
        _backward,
        (tiles * triton.cdiv(channels, tile.outputs), fits, 1),
        {
            "du_ptr": dy.du,
            "y_ptr": dy.y,
            "pull_ptr": dy.pull,
            "out_ptr": out,
            "height": height,
            "width": width,
        },
        {"C": channels, "PIXELS": tile.pixels, "BLOCK": tile.outputs},
        warps=tile.warps,
        stages=tile.stages,
        bytes=size(*dy, out),
    )


@triton.jit
def _place(height, width, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's tile, its pixels, which exist, its channels, and the squares' corners.

    A corner is where the first of a pixel's four lies in the large map, in pixels.
    """
    blocks = tl.cdiv(C, BLOCK)
    tile = tl.program_id(0) // blocks
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    corner = pixel // width * (4 * width) + pixel % width * 2
    return tile, pixel, pixel < height * width, c, corner


@triton.jit(do_not_specialize=["parameters", "height", "width"])
def _forward(
    x_ptr, y_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, parts_ptr, counters_ptr, height,
    width, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    tile, pixel, exists, c, corner = _place(height, width, C, PIXELS, BLOCK)
    mask = exists[:, None] & (c < C)[None, :]
    base = fit.to(tl.int64) * height * width * C
    total = tl.zeros([PIXELS, BLOCK], tl.float32)
    for other in tl.static_range(4):
        at = (corner + other // 2 * (2 * width) + other % 2)[:, None] * C + c[None, :]
        total += tl.load(x_ptr + 4 * base + at, mask, other=0.0).to(tl.float32)
    y = narrow(total * 0.25, y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + pixel[:, None] * C + c[None, :], y, mask)
    finish_forward(
        y.to(tl.float32), exists, c, tile, tl.cdiv(height * width, PIXELS), fit,
        tl.num_programs(1), parts_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["height", "width"])
def _backward(
    du_ptr, y_ptr, pull_ptr, out_ptr, height, width, C: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    _, pixel, exists, c, corner = _place(height, width, C, PIXELS, BLOCK)
    mask = exists[:, None] & (c < C)[None, :]
    base = fit.to(tl.int64) * height * width * C
    pull_ptr += fit * 3 * C
    dy = load_gradient(du_ptr + base, y_ptr + base, pull_ptr, pixel, exists, c, C)
    share = narrow(dy.to(tl.float32) * 0.25, out_ptr.dtype.element_ty)
    for other in tl.static_range(4):
        at = (corner + other // 2 * (2 * width) + other % 2)[:, None] * C + c[None, :]
        tl.store(out_ptr + 4 * base + at, share, mask)
