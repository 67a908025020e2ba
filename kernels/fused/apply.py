"""What a convolution does on the way, by itself: the value before it, the statistics behind it.

Where matrix units wait for the arithmetic in front of them, it can be faster to store a map as it
is read, normalised and activated, and to read that plainly nine times: NVIDIA's ResNet-50 for
MLPerf (mlcommons/training_results_v3.0) does so on some GPUs and not on others. `Tiles.stores` and
`Tiles.counts` say for which maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import activate, exist, narrow
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_forward, scratch_shapes
from flashdip.kernels.fused.patches import pending


def store(name: str, x: Map, value: Tensor, tile: Tile) -> Launch:
    """Store the value of a map.

    Args:
        name: Of the launch.
        x: [F, H, W, C], with an affine.
        value: [F, H, W, C] in the storage type, written.
        tile: `pixels` of x and `outputs` channels a program.
    """
    fits, height, width, channels = x.raw.shape
    pixels = height * width
    return Launch(
        name,
        _store_value,
        (triton.cdiv(pixels, tile.pixels) * triton.cdiv(channels, tile.outputs), fits, 1),
        {"raw_ptr": x.raw, "affine_ptr": x.affine, "value_ptr": value, "pixels": pixels},
        {"C": channels, "ACT": x.act, "PIXELS": tile.pixels, "BLOCK": tile.outputs},
        warps=tile.warps,
        stages=tile.stages,
        bytes=size(x.raw, x.affine, value),
    )


def count(
    name: str, y: Tensor, norm: Norm, affine: Tensor, tile: Tile, memory: Allocator
) -> Launch:
    """Take the statistics of a convolution's result.

    Args:
        name: Of the launch.
        y: [F, H, W, C] in the storage type.
        norm: The normalisation of y.
        affine: [F, 4, C] float32, written; see `flashdip.kernels.fused.norm`.
        tile: `pixels` of y and `outputs` channels a program.
        memory: Where scratch comes from.
    """
    fits, height, width, channels = y.shape
    pixels = height * width
    tiles = triton.cdiv(pixels, tile.pixels)
    parts, counters = scratch_shapes(fits, tiles, channels, tile.outputs)
    return Launch(
        name,
        _count,
        (tiles * triton.cdiv(channels, tile.outputs), fits, 1),
        {
            "y_ptr": y,
            "gamma_ptr": norm.gamma,
            "beta_ptr": norm.beta,
            "affine_ptr": affine,
            "parameters": norm.gamma.stride(0),
            "parts_ptr": memory.share((parts,), torch.float32),
            "counters_ptr": memory.keep((counters,), torch.int32),
            "pixels": pixels,
        },
        {"C": channels, "PIXELS": tile.pixels, "BLOCK": tile.outputs},
        warps=tile.warps,
        stages=tile.stages,
        bytes=size(y, affine, norm.gamma, norm.beta),
    )


@triton.jit(do_not_specialize=["pixels"])
def _store_value(
    raw_ptr, affine_ptr, value_ptr, pixels, C: tl.constexpr, ACT: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    pid, fit = tl.program_id(0), tl.program_id(1)
    pixel = pid // BLOCKS * PIXELS + tl.arange(0, PIXELS)
    c = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    scale, shift = pending(affine_ptr, fit, c, C)
    base = fit.to(tl.int64) * pixels * C
    at = pixel[:, None] * C + c[None, :]
    mask = (pixel < pixels)[:, None] & exist(c, C, BLOCK)[None, :]
    raw = tl.load(raw_ptr + base + at, mask, other=0.0).to(tl.float32)
    value = activate(raw * scale[None, :] + shift[None, :], ACT)
    tl.store(value_ptr + base + at, narrow(value, value_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["pixels", "parameters"])
def _count(
    y_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, parts_ptr, counters_ptr, pixels,
    C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    pid, fit, fits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tile = pid // BLOCKS
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    c = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    mask = valid[:, None] & exist(c, C, BLOCK)[None, :]
    at = fit.to(tl.int64) * pixels * C + pixel[:, None] * C + c[None, :]
    finish_forward(
        tl.load(y_ptr + at, mask, other=0.0).to(tl.float32), valid, c, tile,
        tl.cdiv(pixels, PIXELS), fit, fits, parts_ptr, counters_ptr, gamma_ptr, beta_ptr,
        affine_ptr, parameters, C,
    )  # fmt: skip
