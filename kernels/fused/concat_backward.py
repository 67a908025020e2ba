"""The join by itself, backward: the gradients of both maps that were put together.

The gradient of the joined map is pending, dy = a du + b y + c. The skip connection's map takes its
channels of it as they are; the deep map's pixel what the enlargement's adjoint gathers for it: of
the four pixels that it became, or of the 4 x 4 to which it gave a share. The sums of du and of y
are gathered, and a, b, c applied to them. The gradient then passes the map's activation, and is
summed for the normalisation before it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.concat import pixels
from flashdip.kernels.fused.device import narrow, slope
from flashdip.kernels.fused.launch import Allocator, Gradient, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_sums, scratch_shapes
from flashdip.kernels.fused.patches import pending
from flashdip.kernels.opset import Up


class Target(NamedTuple):
    """One of the maps that were put together, and where its gradient goes.

    Attributes:
        map: The map, [F, H, W, C].
        norm: The normalisation that its affine stands for. None, like `pull`, where there is none,
            or others have yet to add to the gradient.
        pull: [F, 3, C] float32, written; see `Gradient`.
        du: [F, H, W, C] in the storage type, written: the gradient before the activation, or
            without `norm` that of the map's value. None: not wanted.
    """

    map: Map
    norm: Norm | None
    pull: Tensor | None
    du: Tensor | None


def backward(
    name: str,
    dy: Gradient,
    deep: Target,
    skip: Target | None,
    up: Up,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Plan the backward pass of `concat.forward`.

    Args:
        name: Of the launch.
        dy: The gradient of the joined map, [F, 2h, 2w, Cs + Cd].
        deep: The map that was enlarged, [F, h, w, Cd].
        skip: The map ahead of it, [F, 2h, 2w, Cs], if any.
        up: How the deep map was enlarged.
        tile: Pixels (`rows` x `columns`) and channels (`outputs`) of a program.
        memory: Where scratch comes from.
    """
    height, width, channels = deep.map.raw.shape[1:]
    deep_block, skip_block = (_block(target, tile) for target in (deep, skip))
    skip_pixels = tile.pixels * tile.outputs // skip_block
    deep_tiles = skip_tiles = deep_programs = skip_programs = 0
    if deep.du is not None:
        deep_tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
        deep_programs = deep_tiles * triton.cdiv(channels, deep_block)
    if skip is not None and skip.du is not None:
        skip_tiles = triton.cdiv(4 * height * width, skip_pixels)
        skip_programs = skip_tiles * triton.cdiv(skip.du.shape[3], skip_block)
    return Launch(
        name,
        _backward,
        (deep_programs + skip_programs, deep.map.raw.shape[0], 1),
        {
            "du_ptr": dy.du,
            "y_ptr": dy.y,
            "dy_pull_ptr": dy.pull,
            "deep_programs": deep_programs,
            "height": height,
            "width": width,
            **_arguments("deep", deep, deep_tiles, deep_block, memory),
            **_arguments("skip", skip, skip_tiles, skip_block, memory),
        },
        {
            "DEEP": channels,
            "SKIP": dy.y.shape[3] - channels,
            "BILINEAR": up == "bilinear",
            "DEEP_ACT": deep.map.act,
            "SKIP_ACT": "none" if skip is None else skip.map.act,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEEP_BLOCK": deep_block,
            "SKIP_BLOCK": skip_block,
            "SKIP_PIXELS": skip_pixels,
        },
        tile.warps,
        tile.stages,
        bytes=size(*dy, *(t for of in (deep, skip) if of for t in (of.map.raw, of.pull, of.du))),
    )


def _block(target: Target | None, tile: Tile) -> int:
    """Return how many channels a program takes: fewer are made up for by pixels."""
    if target is None:
        return tile.outputs
    return min(int(triton.next_power_of_2(target.map.raw.shape[3])), tile.outputs)


def _arguments(
    prefix: str, target: Target | None, tiles: int, block: int, memory: Allocator
) -> dict[str, Tensor | int | None]:
    """Return what the kernel is given for one of the joined maps."""
    names = (
        "raw_ptr", "affine_ptr", "out_ptr", "pull_ptr", "dgamma_ptr", "dbeta_ptr", "parameters",
        "parts_ptr", "counters_ptr",
    )  # fmt: skip
    arguments: dict[str, Tensor | int | None] = dict.fromkeys(names)
    if target is not None:
        x, norm, pull, du = target
        arguments |= {"raw_ptr": x.raw, "affine_ptr": x.affine, "out_ptr": du}
        if norm is not None:
            fits, *_, channels = x.raw.shape
            parts, counters = scratch_shapes(fits, tiles, channels, block)
            arguments |= {
                "pull_ptr": pull,
                "dgamma_ptr": norm.dgamma,
                "dbeta_ptr": norm.dbeta,
                "parameters": norm.dgamma.stride(0),
                "parts_ptr": memory.share((parts,), torch.float32),
                "counters_ptr": memory.keep((counters,), torch.int32),
            }
    return {f"{prefix}_{name}": argument for name, argument in arguments.items()}


@triton.jit
def _share(at, tap, side, BILINEAR: tl.constexpr):
    """Return a row of the enlarged map that row `at` gave a share to, and the share.

    Through taps 0 .. 3, of doubled rows 0 and 1; the share of a row that does not exist is 0.
    """
    row, share = 2 * at + tap, tl.full(at.shape, 1.0, tl.float32)
    if BILINEAR:
        row -= 1
        lies = tl.minimum(tl.maximum(0.5 * row - 0.25, 0.0), side - 1.0)  # between small rows
        share = tl.where((row >= 0) & (row < 2 * side), 1.0 - tl.abs(at - lies), 0.0)
    return row, share


@triton.jit
def _gathered(
    du_ptr, y_ptr, pull_ptr, y, x, height, width, c, valid, live, ALL: tl.constexpr,
    BILINEAR: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a deep map's pixels y, x at the joined channels c."""
    TAPS: tl.constexpr = 4 if BILINEAR else 2
    du = tl.zeros([y.shape[0], c.shape[0]], tl.float32)
    joined = tl.zeros([y.shape[0], c.shape[0]], tl.float32)
    for up in range(TAPS):
        row, of_row = _share(y, up, height, BILINEAR)
        for left in tl.static_range(TAPS):
            column, of_column = _share(x, left, width, BILINEAR)
            share = of_row * of_column
            mask = (valid & (share > 0))[:, None] & live[None, :]
            at = (row * (2 * width) + column)[:, None] * ALL + c[None, :]
            du += share[:, None] * tl.load(du_ptr + at, mask, other=0.0).to(tl.float32)
            joined += share[:, None] * tl.load(y_ptr + at, mask, other=0.0).to(tl.float32)
    return _behind(du, joined, 4.0, pull_ptr, c, live, ALL)  # all shares of a pixel are 4


@triton.jit
def _behind(du, y, ones, pull_ptr, c, live, ALL: tl.constexpr):
    """Return a du + b y + c ones at the joined channels c."""
    pull_ptr += c
    a = tl.load(pull_ptr, live, other=0.0)[None, :]
    b = tl.load(pull_ptr + ALL, live, other=0.0)[None, :]
    return a * du + b * y + ones * tl.load(pull_ptr + 2 * ALL, live, other=0.0)[None, :]


@triton.jit
def _leave(
    g, raw_ptr, affine_ptr, out_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, parts_ptr,
    counters_ptr, fit, tile, tiles, pixel, count, c, valid, C: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Take the gradient of a map's value through its activation, if the norm before it is there."""
    at = fit.to(tl.int64) * count * C + pixel[:, None] * C + c[None, :]
    live = c < C
    mask = valid[:, None] & live[None, :]
    raw = tl.zeros([pixel.shape[0], c.shape[0]], tl.float32)
    if pull_ptr is not None:
        raw = tl.load(raw_ptr + at, mask, other=0.0).to(tl.float32)
        scale, shift = pending(affine_ptr, fit, c, C)
        g *= slope(raw * scale[None, :] + shift[None, :], ACT)
    du = narrow(tl.where(mask, g, 0.0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, du, mask)
    if pull_ptr is not None:
        mean = tl.load(affine_ptr + (fit * 4 + 2) * C + c, live, other=0.0)
        inverse = tl.load(affine_ptr + (fit * 4 + 3) * C + c, live, other=0.0)
        du = du.to(tl.float32)
        finish_sums(
            tl.sum(du, 0), tl.sum(du * (raw - mean[None, :]), 0) * inverse, c, tile, tiles, fit,
            tl.num_programs(1), count, parts_ptr, counters_ptr, affine_ptr, pull_ptr, dgamma_ptr,
            dbeta_ptr, parameters, C,
        )  # fmt: skip


@triton.jit
def _to_deep(
    program, du_ptr, y_ptr, dy_pull_ptr, fit, height, width, raw_ptr, affine_ptr, out_ptr, pull_ptr,
    dgamma_ptr, dbeta_ptr, parameters, parts_ptr, counters_ptr, C: tl.constexpr, SKIP: tl.constexpr,
    BILINEAR: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave the gradient of a tile of the deep map, [height, width, C]."""
    blocks = tl.cdiv(C, BLOCK)
    tile, c = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    y, x, valid = pixels(tile, height, width, ROWS, COLUMNS)
    g = _gathered(
        du_ptr, y_ptr, dy_pull_ptr, y, x, height, width, SKIP + c, valid, c < C, SKIP + C, BILINEAR
    )
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    _leave(
        g, raw_ptr, affine_ptr, out_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, parts_ptr,
        counters_ptr, fit, tile, tiles, y * width + x, height * width, c, valid, C, ACT,
    )  # fmt: skip


@triton.jit
def _to_skip(
    program, du_ptr, y_ptr, dy_pull_ptr, fit, count, raw_ptr, affine_ptr, out_ptr, pull_ptr,
    dgamma_ptr, dbeta_ptr, parameters, parts_ptr, counters_ptr, C: tl.constexpr, DEEP: tl.constexpr,
    ACT: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave the gradient of a range of the skip connection's map, [count, C]."""
    blocks = tl.cdiv(C, BLOCK)
    tile, c = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    pixel, live = tile * PIXELS + tl.arange(0, PIXELS), c < C
    valid = pixel < count
    at, mask = pixel[:, None] * (C + DEEP) + c[None, :], valid[:, None] & live[None, :]
    du = tl.load(du_ptr + at, mask, other=0.0).to(tl.float32)
    joined = tl.load(y_ptr + at, mask, other=0.0).to(tl.float32)
    g = _behind(du, joined, 1.0, dy_pull_ptr, c, live, C + DEEP)
    _leave(
        g, raw_ptr, affine_ptr, out_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, parts_ptr,
        counters_ptr, fit, tile, tl.cdiv(count, PIXELS), pixel, count, c, valid, C, ACT,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["deep_programs", "height", "width", "deep_parameters", "skip_parameters"]
)
def _backward(
    du_ptr, y_ptr, dy_pull_ptr, deep_programs, height, width,
    deep_raw_ptr, deep_affine_ptr, deep_out_ptr, deep_pull_ptr, deep_dgamma_ptr, deep_dbeta_ptr,
    deep_parameters, deep_parts_ptr, deep_counters_ptr,
    skip_raw_ptr, skip_affine_ptr, skip_out_ptr, skip_pull_ptr, skip_dgamma_ptr, skip_dbeta_ptr,
    skip_parameters, skip_parts_ptr, skip_counters_ptr,
    DEEP: tl.constexpr, SKIP: tl.constexpr, BILINEAR: tl.constexpr, DEEP_ACT: tl.constexpr,
    SKIP_ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEEP_BLOCK: tl.constexpr, SKIP_BLOCK: tl.constexpr, SKIP_PIXELS: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = SKIP + DEEP
    program, fit = tl.program_id(0), tl.program_id(1)
    base = fit.to(tl.int64) * height * width * 4 * ALL
    du_ptr += base
    y_ptr += base
    dy_pull_ptr += fit * 3 * ALL
    if program < deep_programs:
        if deep_out_ptr is not None:
            _to_deep(
                program, du_ptr, y_ptr, dy_pull_ptr, fit, height, width, deep_raw_ptr,
                deep_affine_ptr, deep_out_ptr, deep_pull_ptr, deep_dgamma_ptr, deep_dbeta_ptr,
                deep_parameters, deep_parts_ptr, deep_counters_ptr, DEEP, SKIP, BILINEAR, DEEP_ACT,
                ROWS, COLUMNS, DEEP_BLOCK,
            )  # fmt: skip
    else:
        if skip_out_ptr is not None:
            _to_skip(
                program - deep_programs, du_ptr, y_ptr, dy_pull_ptr, fit, 4 * height * width,
                skip_raw_ptr, skip_affine_ptr, skip_out_ptr, skip_pull_ptr, skip_dgamma_ptr,
                skip_dbeta_ptr, skip_parameters, skip_parts_ptr, skip_counters_ptr, SKIP, DEEP,
                SKIP_ACT, SKIP_PIXELS, SKIP_BLOCK,
            )  # fmt: skip
