"""The join by itself: a map enlarged twofold, put behind the skip connection's, and its statistics.

Where a join cannot be folded into the convolution behind it (`flashdip.kernels.fused.join`), for
its padding is zero or its kernel not 3x3, the joined map is written once, raw. Its normalisation
stays pending, as that of a convolution's result: whatever reads it is an ordinary convolution.

A program has a tile of the deep map's pixels and a block of the joined channels, and writes the
four pixels that each becomes. Bilinear enlargement gives a pixel 3/4 of the one it lies in and 1/4
of the nearest other one, along each axis; beyond the border the outermost is repeated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import activate, narrow
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_moments, scratch_shapes
from flashdip.kernels.fused.patches import pending
from flashdip.kernels.opset import Up


def forward(
    name: str,
    deep: Map,
    skip: Map | None,
    up: Up,
    y: Tensor,
    norm: Norm,
    affine: Tensor,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Enlarge, concatenate, and take the statistics.

    Args:
        name: Of the launch.
        deep: The map to be enlarged, [F, h, w, Cd].
        skip: The map ahead of it, [F, 2h, 2w, Cs], if any.
        up: How the deep map is enlarged.
        y: [F, 2h, 2w, Cs + Cd] in the storage type, written.
        norm: The normalisation of y.
        affine: [F, 4, Cs + Cd] float32, written; see `flashdip.kernels.fused.norm`.
        tile: Pixels of the deep map (`rows` x `columns`) and joined channels (`outputs`) of a
            program.
        memory: Where scratch comes from.
    """
    fits, height, width, channels = deep.raw.shape
    joined = y.shape[3]
    tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    parts, counters = scratch_shapes(fits, tiles, joined, tile.outputs)
    return Launch(
        name,
        _forward,
        (tiles * triton.cdiv(joined, tile.outputs), fits, 1),
        {
            "deep_ptr": deep.raw,
            "deep_affine_ptr": deep.affine,
            "skip_ptr": None if skip is None else skip.raw,
            "skip_affine_ptr": None if skip is None else skip.affine,
            "y_ptr": y,
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
            "DEEP": channels,
            "SKIP": joined - channels,
            "BILINEAR": up == "bilinear",
            "DEEP_ACT": deep.act,
            "SKIP_ACT": "none" if skip is None else skip.act,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "BLOCK": tile.outputs,
        },
        tile.warps,
        tile.stages,
        bytes=size(deep.raw, skip and skip.raw, y, affine, norm.gamma, norm.beta),
    )


@triton.jit
def pixels(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column of a tile's pixels, and which exist: three times [ROWS * COLUMNS]."""
    across = tl.cdiv(width, COLUMNS)
    i = tl.arange(0, ROWS * COLUMNS)
    y = tile // across * ROWS + i // COLUMNS
    x = tile % across * COLUMNS + i % COLUMNS
    return y, x, (y < height) & (x < width)


@triton.jit
def _value(raw_ptr, at, mask, scale, shift, ACT: tl.constexpr):
    """Return the value of a `Map` as it is stored, in float32."""
    raw = tl.load(raw_ptr + at, mask, other=0.0).to(tl.float32)
    value = activate(raw * scale[None, :] + shift[None, :], ACT)
    return narrow(value, raw_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _along(
    raw_ptr, row, x, width, c, mask, scale, shift, C: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """Return the two pixels that a `Map`'s pixel x becomes along a row, enlarged bilinearly."""
    left, right = tl.maximum(x - 1, 0), tl.minimum(x + 1, width - 1)
    at = (row * width)[:, None] * C + c[None, :]
    before = _value(raw_ptr, at + left[:, None] * C, mask, scale, shift, ACT)
    own = _value(raw_ptr, at + x[:, None] * C, mask, scale, shift, ACT)
    after = _value(raw_ptr, at + right[:, None] * C, mask, scale, shift, ACT)
    return 0.25 * before + 0.75 * own, 0.75 * own + 0.25 * after


@triton.jit(do_not_specialize=["parameters", "height", "width"])
def _forward(
    deep_ptr, deep_affine_ptr, skip_ptr, skip_affine_ptr, y_ptr, gamma_ptr, beta_ptr, affine_ptr,
    parameters, parts_ptr, counters_ptr, height, width, DEEP: tl.constexpr, SKIP: tl.constexpr,
    BILINEAR: tl.constexpr, DEEP_ACT: tl.constexpr, SKIP_ACT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = SKIP + DEEP
    fit, fits = tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(C, BLOCK)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    c = block * BLOCK + tl.arange(0, BLOCK)
    y, x, valid = pixels(tile, height, width, ROWS, COLUMNS)
    mask = valid[:, None] & (c < C)[None, :]
    base = fit.to(tl.int64) * height * width

    # Channels that are not of a map have no scale and no shift: its value is 0 there.
    own = tl.where(c < SKIP, DEEP, c - SKIP)
    scale, shift = pending(deep_affine_ptr, fit, own, DEEP)
    live = valid[:, None] & (own < DEEP)[None, :]
    deep_ptr += base * DEEP
    if BILINEAR:
        above, below = tl.maximum(y - 1, 0), tl.minimum(y + 1, height - 1)
        a = _along(deep_ptr, above, x, width, c - SKIP, live, scale, shift, DEEP, DEEP_ACT)
        b = _along(deep_ptr, y, x, width, c - SKIP, live, scale, shift, DEEP, DEEP_ACT)
        d = _along(deep_ptr, below, x, width, c - SKIP, live, scale, shift, DEEP, DEEP_ACT)
        four = (
            0.25 * a[0] + 0.75 * b[0], 0.25 * a[1] + 0.75 * b[1],
            0.75 * b[0] + 0.25 * d[0], 0.75 * b[1] + 0.25 * d[1],
        )  # fmt: skip
    else:
        at = (y * width + x)[:, None] * DEEP + (c - SKIP)[None, :]
        value = _value(deep_ptr, at, live, scale, shift, DEEP_ACT)
        four = (value, value, value, value)

    if skip_ptr is not None:
        skip_ptr += 4 * base * SKIP
        scale, shift = pending(skip_affine_ptr, fit, c, SKIP)
    live = valid[:, None] & (c < SKIP)[None, :]
    y_ptr += 4 * base * C
    stored, total = (), tl.zeros([ROWS * COLUMNS, BLOCK], tl.float32)
    for place in tl.static_range(4):
        pixel = ((2 * y + place // 2) * (2 * width) + 2 * x + place % 2)[:, None]
        value = four[place]
        if skip_ptr is not None:
            at = pixel * SKIP + c[None, :]
            if block * BLOCK < SKIP:
                value += _value(skip_ptr, at, live, scale, shift, SKIP_ACT)
        value = narrow(value, y_ptr.dtype.element_ty)
        tl.store(y_ptr + pixel * C + c[None, :], value, mask)
        stored += (value.to(tl.float32),)  # type: ignore[assignment]
        total += stored[place]

    ones = valid.to(tl.float32)
    count = 4 * tl.sum(ones, 0)
    mean = tl.sum(total * ones[:, None], 0) / tl.maximum(count, 1.0)
    squares = tl.zeros([ROWS * COLUMNS, BLOCK], tl.float32)
    for place in tl.static_range(4):
        off = stored[place] - mean[None, :]
        squares += off * off
    finish_moments(
        count, mean, tl.sum(squares * ones[:, None], 0), c, tile,
        tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS), fit, fits, parts_ptr, counters_ptr,
        gamma_ptr, beta_ptr, affine_ptr, parameters, C,
    )  # fmt: skip
