"""The join ahead of a convolution: its statistics, folded into the convolution's weights.

The join puts the deep map, enlarged twofold, behind the skip connection's map and normalises both.
The convolution that follows reflects at the border, and a normalisation follows it: whatever the
join adds to a channel is taken away again. Only its scale matters, s = gamma / sqrt(variance + EPS)
for each channel, and a scale can as well be applied to the weights, conv(s x, W) = conv(x, s W).
So nothing is enlarged, put together or normalised; one launch takes the statistics and prepares the
weights, for the deep map folded as in `flashdip.kernels.fused.geometry`.

Statistics are those of the enlarged map, taken on the small one. Doubling pixels does not change
them. Bilinear enlargement A leaves the mean, and the variance is that of centred x with A'A x / 4,
which is x smoothed by [3, 10, 3] / 16 along each axis, its border replicated.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused import norm
from flashdip.kernels.fused.device import EPS, activate, last_to_arrive, narrow
from flashdip.kernels.fused.launch import Allocate, Launch, Map, Tile, size
from flashdip.kernels.opset import Up

GROUP = norm.GROUP


@triton.jit
def pixels(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return row and column of a tile's pixels, and which exist: three times [ROWS * COLUMNS]."""
    across = tl.cdiv(width, COLUMNS)
    i = tl.arange(0, ROWS * COLUMNS)
    y = tile // across * ROWS + i // COLUMNS
    x = tile % across * COLUMNS + i % COLUMNS
    return y, x, (y < height) & (x < width)


@triton.jit
def pending(affine_ptr, fit, c, C: tl.constexpr):
    """Return scale and shift of a `Map` at channels c; of one without affine, 1 and 0."""
    scale, shift = tl.full(c.shape, 1.0, tl.float32), tl.zeros(c.shape, tl.float32)
    if affine_ptr is not None:
        scale = tl.load(affine_ptr + fit * 4 * C + c, c < C, other=0.0)
        shift = tl.load(affine_ptr + (fit * 4 + 1) * C + c, c < C, other=0.0)
    return scale, shift


@triton.jit
def value_of(raw_ptr, at, mask, scale, shift, ACT: tl.constexpr):
    """Load raw values and return those of the `Map`, rounded as they are stored."""
    raw = tl.load(raw_ptr + at, mask, other=0.0).to(tl.float32)
    u = raw * scale[None, :] + shift[None, :]
    return narrow(activate(u, ACT), raw_ptr.dtype.element_ty)


@triton.jit
def smoothed(
    raw_ptr, y, x, height, width, c, mask, scale, shift, C: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Return a `Map` smoothed by [3, 10, 3] / 16 along each axis, its border replicated."""
    near = tl.zeros(mask.shape, tl.float32)
    for up in tl.static_range(3):
        row = tl.minimum(tl.maximum(y + up - 1, 0), height - 1)
        for left in tl.static_range(3):
            column = tl.minimum(tl.maximum(x + left - 1, 0), width - 1)
            at = (row * width + column)[:, None] * C + c[None, :]
            share = (10.0 if up == 1 else 3.0) * (10.0 if left == 1 else 3.0) / 256.0
            near += share * value_of(raw_ptr, at, mask, scale, shift, ACT).to(tl.float32)
    return near


@triton.jit
def _settle(
    v, near, valid, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, C: tl.constexpr,
):  # fmt: skip
    """Take the mean of v and its variance with `near`; see `norm.finish_forward` for the rest.

    The product of centred v and `near` is the difference of two squares, of their half sum and
    their half difference. The means of v and `near` are the same: only the first is to be centred,
    and is merged from tiles as any map's.

    Returns:
        Whether this is the last program of these channels; if so, mean and variance.
    """
    live = c < C
    ones = valid.to(tl.float32)[:, None]
    half, apart = (v + near) * 0.5, (v - near) * 0.5 * ones
    n = tl.sum(ones + tl.zeros(v.shape, tl.float32), 0)
    mean = tl.sum(half * ones, 0) / tl.maximum(n, 1.0)
    off = (half - mean[None, :]) * ones
    squares = tl.sum(off * off - apart * apart, 0)
    groups = tl.cdiv(tiles, GROUP)
    own_ptr = parts_ptr + fit * tiles * 3 * C
    groups_ptr = parts_ptr + (fits * tiles + fit * groups) * 3 * C
    norm._store(own_ptr + tile * 3 * C, c, C, live, n, mean, squares)

    blocks = tl.cdiv(C, c.shape[0])
    counters_ptr += (fit * blocks + tl.min(c) // c.shape[0]) * (groups + 1)
    group = tile // GROUP
    members = tl.minimum(GROUP, tiles - group * GROUP)
    last = tile < 0
    if last_to_arrive(counters_ptr + 1 + group, members):
        n, mean, squares = norm._merge(own_ptr + group * GROUP * 3 * C, members, c, C, live)
        norm._store(groups_ptr + group * 3 * C, c, C, live, n, mean, squares)
        if last_to_arrive(counters_ptr, groups):
            n, mean, squares = norm._merge(groups_ptr, groups, c, C, live)
            squares /= tl.maximum(n, 1.0)
            last = tile >= 0
    return last, mean, squares


@triton.jit
def _statistics(
    program, raw_ptr, pending_ptr, value_ptr, affine_ptr, gamma_ptr, gamma_fit, parts_ptr,
    counters_ptr, height, width, C: tl.constexpr, ACT: tl.constexpr, BILINEAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the statistics of one of the joined maps, and write its value if asked for.

    Returns:
        Whether this is the last program of its block of channels, the channels, and if it is, their
        scales s.
    """
    fit, fits = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    blocks = tl.cdiv(C, BLOCK)
    tile = program // blocks
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    y, x, valid = pixels(tile, height, width, ROWS, COLUMNS)
    mask = valid[:, None] & live[None, :]
    where = (y * width + x)[:, None] * C + c[None, :]
    scale, shift = pending(pending_ptr, fit, c, C)
    base = fit.to(tl.int64) * height * width * C
    value = value_of(raw_ptr + base, where, mask, scale, shift, ACT)
    if value_ptr is not None:
        tl.store(value_ptr + base + where, value, mask)
    v = value.to(tl.float32)
    near = v
    if BILINEAR:
        near = smoothed(raw_ptr + base, y, x, height, width, c, mask, scale, shift, C, ACT)
    last, mean, variance = _settle(
        v, near, valid, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, C
    )
    s = tl.zeros(c.shape, tl.float32)
    if last:
        inverse = tl.rsqrt(variance + EPS)
        s = tl.load(gamma_ptr + fit * gamma_fit + c, live, other=0.0) * inverse
        at = fit * 3 * C + c
        tl.store(affine_ptr + at, mean, live)
        tl.store(affine_ptr + C + at, inverse, live)
        tl.store(affine_ptr + 2 * C + at, s, live)
    return last, c, s


@triton.jit
def _fold(
    folded_ptr, master_ptr, c, s, C: tl.constexpr, ALL: tl.constexpr, OUT: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Write s times the sums of taps that each group of outputs sees through each slot."""
    for first in range(0, OUT, OUTPUTS):
        o = first + tl.arange(0, OUTPUTS)
        mask = (c < C)[:, None] & (o < OUT)[None, :]
        at = c[:, None] * OUT + o[None, :]
        taps = ()
        for tap in tl.static_range(9):
            w = tl.load(master_ptr + tap * ALL * OUT + at, mask, other=0.0) * s[:, None]
            taps += (w,)  # type: ignore[assignment]
        for place in tl.static_range(16):  # group_y, group_x, slot_y, slot_x
            total = tl.zeros(mask.shape, tl.float32)
            for tap in tl.static_range(9):  # as in geometry.FOLDED: the slot is tap > group
                in_y = (tap // 3 > place // 8) == (place // 2 % 2)
                in_x = (tap % 3 > place // 4 % 2) == (place % 2)
                if in_y and in_x:
                    total += taps[tap]
            total = narrow(total, folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + place * C * OUT + at, total, mask)


@triton.jit
def _scale(
    skip_weight_ptr, master_ptr, c, s, C: tl.constexpr, ALL: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Write s times the weights of the skip channels, and zeros behind the rows of thin ones."""
    for first in range(0, OUT, OUTPUTS):
        o = first + tl.arange(0, OUTPUTS)
        mask = (c < C)[:, None] & (o < OUT)[None, :]
        at = c[:, None] * OUT + o[None, :]
        for tap in tl.static_range(9):
            w = tl.load(master_ptr + tap * ALL * OUT + at, mask, other=0.0) * s[:, None]
            w = narrow(w, skip_weight_ptr.dtype.element_ty)
            tl.store(skip_weight_ptr + tap * C * OUT + at, w, mask)
        for row in range(9 * C, ROWS):
            tl.store(skip_weight_ptr + row * OUT + o, tl.zeros(o.shape, tl.float32), o < OUT)


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    deep_ptr, deep_pending_ptr, value_ptr, deep_affine_ptr, deep_parts_ptr, deep_counters_ptr,
    skip_ptr, skip_pending_ptr, skip_affine_ptr, skip_parts_ptr, skip_counters_ptr,
    gamma_ptr, master_ptr, folded_ptr, skip_weight_ptr,
    height, width, gamma_fit, master_fit, folded_fit, skip_weight_fit,
    DEEP: tl.constexpr, SKIP: tl.constexpr, OUT: tl.constexpr, SKIP_ROWS: tl.constexpr,
    BILINEAR: tl.constexpr, DEEP_ACT: tl.constexpr, SKIP_ACT: tl.constexpr,
    ROWS: tl.constexpr, DEEP_COLUMNS: tl.constexpr, SKIP_COLUMNS: tl.constexpr,
    DEEP_BLOCK: tl.constexpr, SKIP_BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    fit = tl.program_id(1).to(tl.int64)
    deep_programs = tl.cdiv(height, ROWS) * tl.cdiv(width, DEEP_COLUMNS) * tl.cdiv(DEEP, DEEP_BLOCK)
    master_ptr += fit * master_fit
    if program < deep_programs:
        last, c, s = _statistics(
            program, deep_ptr, deep_pending_ptr, value_ptr, deep_affine_ptr, gamma_ptr + SKIP,
            gamma_fit, deep_parts_ptr, deep_counters_ptr, height, width, DEEP, DEEP_ACT, BILINEAR,
            ROWS, DEEP_COLUMNS, DEEP_BLOCK,
        )  # fmt: skip
        if last:
            folded_ptr += fit * folded_fit
            _fold(folded_ptr, master_ptr + SKIP * OUT, c, s, DEEP, SKIP + DEEP, OUT, OUTPUTS)
    elif SKIP > 0:
        last, skip_c, skip_s = _statistics(
            program - deep_programs, skip_ptr, skip_pending_ptr, None, skip_affine_ptr, gamma_ptr,
            gamma_fit, skip_parts_ptr, skip_counters_ptr, 2 * height, 2 * width, SKIP, SKIP_ACT,
            False, ROWS, SKIP_COLUMNS, SKIP_BLOCK,
        )  # fmt: skip
        if last:
            skip_weight_ptr += fit * skip_weight_fit
            _scale(
                skip_weight_ptr, master_ptr, skip_c, skip_s, SKIP, SKIP + DEEP, OUT, SKIP_ROWS,
                OUTPUTS,
            )  # fmt: skip


class Cut(NamedTuple):
    """How one of the joined maps is cut into the work of programs.

    Attributes:
        columns: Columns of pixels of a program; its rows are those of the launch's `Tile`.
        block: Channels of a program, a power of 2: fewer of them are made up for by columns.
        programs: Programs for the map.
        parts: Scratch; see `norm.scratch_shapes`. Like the rest, None of no map.
        counters: Likewise.
    """

    columns: int = 1
    block: int = 1
    programs: int = 0
    parts: Tensor | None = None
    counters: Tensor | None = None


def cut(x: Map | None, tile: Tile, allocate: Allocate) -> Cut:
    """Cut a map as large as x, `tile.outputs` channels at a time."""
    if x is None:
        return Cut()
    fits, height, width, channels = x.raw.shape
    block = min(triton.next_power_of_2(channels), tile.outputs)
    columns = tile.columns * tile.outputs // block
    tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, columns)
    parts, counters = norm.scratch_shapes(fits, tiles, channels, block)
    return Cut(
        columns,
        block,
        tiles * triton.cdiv(channels, block),
        allocate((parts,), torch.float32),
        allocate((counters,), torch.int32),
    )


def forward(
    name: str,
    deep: Map,
    skip: Map | None,
    gamma: Tensor,
    master: Tensor,
    up: Up,
    value: Tensor,
    deep_affine: Tensor,
    skip_affine: Tensor | None,
    folded: Tensor,
    skip_weight: Tensor | None,
    tile: Tile,
    allocate: Allocate,
) -> Launch:
    """Plan the statistics of a join and the weights that they are folded into.

    Args:
        name: Of the launch.
        deep: The map to be enlarged, [F, h, w, Cd].
        skip: The map ahead of it, [F, 2h, 2w, Cs], if any.
        gamma: The join's scale, [F, Cs + Cd] float32; its shift has no effect.
        master: The convolution's weights, [F, 3, 3, Cs + Cd, O] float32.
        up: How the deep map is enlarged.
        value: Written: the deep map's value, [F, h, w, Cd], in the storage type.
        deep_affine: Written: mean, inverse, s of the deep channels, [F, 3, Cd] float32, with
            inverse = 1 / sqrt(variance + EPS) and s = gamma inverse.
        skip_affine: Written: the same of the skip channels, [F, 3, Cs].
        folded: Written: s W of the deep channels, [F, 2, 2, 2, 2, Cd, O] in the storage type.
        skip_weight: Written: s W of the skip channels, in the storage type: [F, 3, 3, Cs, O], or
            [F, Kp, O] with rows (ky 3 + kx) Cs + c and zeros behind them.
        tile: Pixels of the deep map (`rows` x `columns`) and channels (`outputs`) of a program. The
            last program of a block of channels prepares their weights alone: let blocks be small.
        allocate: Where scratch comes from.
    """
    fits, height, width, channels = deep.raw.shape
    outputs = master.shape[-1]
    of_deep, of_skip = cut(deep, tile, allocate), cut(skip, tile, allocate)
    at_once = max(16, 128 * tile.warps // of_deep.block)  # 9 x 4 weights to a thread
    return Launch(
        name,
        _forward_kernel,
        (of_deep.programs + of_skip.programs, fits, 1),
        {
            "deep_ptr": deep.raw,
            "deep_pending_ptr": deep.affine,
            "value_ptr": value,
            "deep_affine_ptr": deep_affine,
            "deep_parts_ptr": of_deep.parts,
            "deep_counters_ptr": of_deep.counters,
            "skip_ptr": None if skip is None else skip.raw,
            "skip_pending_ptr": None if skip is None else skip.affine,
            "skip_affine_ptr": skip_affine,
            "skip_parts_ptr": of_skip.parts,
            "skip_counters_ptr": of_skip.counters,
            "gamma_ptr": gamma,
            "master_ptr": master,
            "folded_ptr": folded,
            "skip_weight_ptr": skip_weight,
            "height": height,
            "width": width,
            "gamma_fit": gamma.stride(0),
            "master_fit": master.stride(0),
            "folded_fit": folded.stride(0),
            "skip_weight_fit": 0 if skip_weight is None else skip_weight.stride(0),
        },
        {
            "DEEP": channels,
            "SKIP": 0 if skip is None else skip.raw.shape[-1],
            "OUT": outputs,
            "SKIP_ROWS": 0 if skip_weight is None else skip_weight[0].numel() // outputs,
            "BILINEAR": up == "bilinear",
            "DEEP_ACT": deep.act,
            "SKIP_ACT": "none" if skip is None else skip.act,
            "ROWS": tile.rows,
            "DEEP_COLUMNS": of_deep.columns,
            "SKIP_COLUMNS": of_skip.columns,
            "DEEP_BLOCK": of_deep.block,
            "SKIP_BLOCK": of_skip.block,
            "OUTPUTS": min(triton.next_power_of_2(outputs), at_once),
        },
        tile.warps,
        tile.stages,
        bytes=size(deep.raw, skip and skip.raw, master, value, folded, skip_weight),
    )
