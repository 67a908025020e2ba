"""The join by itself, backward: the gradients of both maps that were put together.

The gradient of the joined map is pending, dy = a du + b y + c. The skip connection's map takes its
channels of it as they are; the deep map's pixel what the enlargement's adjoint gathers for it: of
the four pixels that it became, or of the 4 x 4 to which it gave a share. The sums of du and of y
are gathered, and a, b, c applied to them. The gradient then passes the map's activation, and is
summed for the normalisation before it.
"""

import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import narrow, slope
from flashdip.kernels.fused.join import Cut, cut, pending, pixels
from flashdip.kernels.fused.launch import Allocate, Gradient, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_backward
from flashdip.kernels.opset import Up


def backward(
    name: str,
    dy: Gradient,
    deep: Map,
    deep_norm: Norm | None,
    deep_pull: Tensor | None,
    deep_du: Tensor | None,
    skip: Map | None,
    skip_norm: Norm | None,
    skip_pull: Tensor | None,
    skip_du: Tensor | None,
    up: Up,
    tile: Tile,
    allocate: Allocate,
) -> Launch:
    """Plan the backward pass of `concat.forward`.

    Args:
        name: Of the launch.
        dy: The gradient of the joined map, [F, 2h, 2w, Cs + Cd].
        deep: The map that was enlarged, [F, h, w, Cd].
        deep_norm: The normalisation that `deep.affine` stands for. None, like `deep_pull`, where
            there is none, or others have yet to add to the gradient.
        deep_pull: [F, 3, Cd] float32, written; see `Gradient`.
        deep_du: [F, h, w, Cd] in the storage type, written: the gradient before the activation, or
            without `deep_norm` that of the map's value. None: not wanted.
        skip: The map ahead of it, [F, 2h, 2w, Cs], if any.
        skip_norm: As for the deep map, like all that follows.
        skip_pull: Written.
        skip_du: Written.
        up: How the deep map was enlarged.
        tile: Pixels (`rows` x `columns`) and channels (`outputs`) of a program.
        allocate: Where scratch comes from.
    """
    fits, height, width, channels = deep.raw.shape
    of_deep = cut(None if deep_du is None else deep, tile, allocate)
    of_skip = cut(None if skip_du is None else skip, tile, allocate)
    return Launch(
        name,
        _backward,
        (of_deep.programs + of_skip.programs, fits, 1),
        {
            "du_ptr": dy.du,
            "y_ptr": dy.y,
            "dy_pull_ptr": dy.pull,
            "deep_programs": of_deep.programs,
            "height": height,
            "width": width,
            **_arguments("deep", deep, deep_norm, deep_pull, deep_du, of_deep),
            **_arguments("skip", skip, skip_norm, skip_pull, skip_du, of_skip),
        },
        {
            "DEEP": channels,
            "SKIP": dy.y.shape[3] - channels,
            "BILINEAR": up == "bilinear",
            "DEEP_ACT": deep.act,
            "SKIP_ACT": "none" if skip is None else skip.act,
            "ROWS": tile.rows,
            "DEEP_COLUMNS": of_deep.columns,
            "SKIP_COLUMNS": of_skip.columns,
            "DEEP_BLOCK": of_deep.block,
            "SKIP_BLOCK": of_skip.block,
        },
        tile.warps,
        tile.stages,
        bytes=size(*dy, deep.raw, deep_du, skip and skip.raw, skip_du),
    )


def _arguments(
    prefix: str, x: Map | None, norm: Norm | None, pull: Tensor | None, du: Tensor | None, of: Cut
) -> dict[str, Tensor | int | None]:
    """Return what the kernel is given for one of the joined maps."""
    arguments = {
        "raw_ptr": None if x is None else x.raw,
        "affine_ptr": None if x is None else x.affine,
        "out_ptr": du,
        "pull_ptr": pull,
        "dgamma_ptr": None if norm is None else norm.dgamma,
        "dbeta_ptr": None if norm is None else norm.dbeta,
        "parameters": 0 if norm is None else norm.dgamma.stride(0),
        "parts_ptr": of.parts,
        "counters_ptr": of.counters,
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
    mask = valid[:, None] & (c < C)[None, :]
    raw = tl.zeros([pixel.shape[0], c.shape[0]], tl.float32)
    if pull_ptr is not None:
        raw = tl.load(raw_ptr + at, mask, other=0.0).to(tl.float32)
        scale, shift = pending(affine_ptr, fit, c, C)
        g *= slope(raw * scale[None, :] + shift[None, :], ACT)
    du = narrow(g, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, du, mask)
    if pull_ptr is not None:
        finish_backward(
            du.to(tl.float32), raw, valid, c, tile, tiles, fit, tl.num_programs(1), count,
            parts_ptr, counters_ptr, affine_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, C,
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
    program, du_ptr, y_ptr, dy_pull_ptr, fit, height, width, raw_ptr, affine_ptr, out_ptr, pull_ptr,
    dgamma_ptr, dbeta_ptr, parameters, parts_ptr, counters_ptr, C: tl.constexpr, DEEP: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave the gradient of a tile of the skip connection's map, [height, width, C]."""
    blocks = tl.cdiv(C, BLOCK)
    tile, c = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    y, x, valid = pixels(tile, height, width, ROWS, COLUMNS)
    pixel, live = y * width + x, c < C
    at, mask = pixel[:, None] * (C + DEEP) + c[None, :], valid[:, None] & live[None, :]
    du = tl.load(du_ptr + at, mask, other=0.0).to(tl.float32)
    joined = tl.load(y_ptr + at, mask, other=0.0).to(tl.float32)
    g = _behind(du, joined, 1.0, dy_pull_ptr, c, live, C + DEEP)
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    _leave(
        g, raw_ptr, affine_ptr, out_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, parts_ptr,
        counters_ptr, fit, tile, tiles, pixel, height * width, c, valid, C, ACT,
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
    SKIP_ACT: tl.constexpr, ROWS: tl.constexpr, DEEP_COLUMNS: tl.constexpr,
    SKIP_COLUMNS: tl.constexpr, DEEP_BLOCK: tl.constexpr, SKIP_BLOCK: tl.constexpr,
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
                ROWS, DEEP_COLUMNS, DEEP_BLOCK,
            )  # fmt: skip
    else:
        if skip_out_ptr is not None:
            _to_skip(
                program - deep_programs, du_ptr, y_ptr, dy_pull_ptr, fit, 2 * height, 2 * width,
                skip_raw_ptr, skip_affine_ptr, skip_out_ptr, skip_pull_ptr, skip_dgamma_ptr,
                skip_dbeta_ptr, skip_parameters, skip_parts_ptr, skip_counters_ptr, SKIP, DEEP,
                SKIP_ACT, ROWS, SKIP_COLUMNS, SKIP_BLOCK,
            )  # fmt: skip
