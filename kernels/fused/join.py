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

import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused import norm
from flashdip.kernels.fused.device import EPS, exist, narrow
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Tile, size
from flashdip.kernels.fused.patches import corners, cut, pending, row_of, smooth
from flashdip.kernels.opset import Up


@triton.jit
def _moments(
    raw_ptr, value_ptr, y, x, height, width, c, live, scale, shift, C: tl.constexpr,
    ACT: tl.constexpr, SMOOTH: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the number of pixels of patches, their mean, and the squares about it.

    If SMOOTH, the squares are the products of centred v and of what it is smoothed to, `near`.
    Their means over a whole map are the same, and the products of a part are the squares of
    (v + near) / 2 less those of (v - near) / 2: only the former need a centre, and are merged as
    any map's.

    A lane takes its patch about the patch's first value: nothing cancels where the mean is far
    from 0.
    """
    tl.static_assert(SMOOTH or HIGH * WIDE == 1)
    n = tl.zeros([y.shape[0], 1], tl.float32)
    total = tl.zeros([y.shape[0], c.shape[0]], tl.float32)
    products = tl.zeros([y.shape[0], c.shape[0]], tl.float32)
    if SMOOTH:
        _, before = row_of(
            raw_ptr, y - 1, x, height, width, c, live, scale, shift, C, ACT, WIDE, SMOOTH
        )
    values, here = row_of(raw_ptr, y, x, height, width, c, live, scale, shift, C, ACT, WIDE, SMOOTH)
    origin = values[0]
    for i in tl.static_range(HIGH):
        if SMOOTH:
            ahead, after = row_of(
                raw_ptr, y + (i + 1), x, height, width, c, live, scale, shift, C, ACT, WIDE, SMOOTH
            )
        for j in tl.static_range(WIDE):
            valid = ((y + i < height) & (x + j < width))[:, None]
            if value_ptr is not None:
                at = ((y + i) * width + x + j)[:, None] * C + c[None, :]
                value = narrow(values[j], value_ptr.dtype.element_ty)
                tl.store(value_ptr + at, value, valid & live[None, :])
            near = smooth(before[j], here[j], after[j]) if SMOOTH else values[j]
            v = tl.where(valid, values[j] - origin, 0.0)
            near = tl.where(valid, near - origin, 0.0)
            n += valid.to(tl.float32)
            total += v + near
            products += v * near
        if SMOOTH:
            before, values, here = here, ahead, after
    total *= 0.5
    off = total / tl.maximum(n, 1.0)
    products -= total * off
    pixels = tl.sum(n)
    means = origin + off
    mean = tl.sum(n * means, 0) / tl.maximum(pixels, 1.0)
    off = means - mean[None, :]
    return pixels, mean, tl.sum(products + n * off * off, 0)


@triton.jit
def _statistics(
    program, raw_ptr, pending_ptr, value_ptr, affine_ptr, gamma_ptr, gamma_fit, parts_ptr,
    counters_ptr, height, width, C: tl.constexpr, ACT: tl.constexpr, SMOOTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the statistics of one of the joined maps, and write its value if asked for.

    Returns:
        Whether this is the last program of its block of channels, the channels, and if it is, their
        scales s.
    """
    fit = tl.program_id(1)
    tiles = tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    blocks = tl.cdiv(C, BLOCK)
    tile = program // blocks
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = exist(c, C, BLOCK)
    y, x = corners(tile, height, width, ROWS, COLUMNS, HIGH, WIDE)
    scale, shift = pending(pending_ptr, fit, c, C)
    base = fit.to(tl.int64) * height * width * C
    if value_ptr is not None:
        value_ptr += base
    pixels, mean, squares = _moments(
        raw_ptr + base, value_ptr, y, x, height, width, c, live, scale, shift, C, ACT, SMOOTH, HIGH,
        WIDE,
    )  # fmt: skip
    last, pixels, mean, squares, needed = norm.collect(
        pixels, mean, squares, c, tile, tiles, fit, tl.num_programs(1), parts_ptr, counters_ptr,
        (gamma_ptr + fit * gamma_fit + c,), C, True,
    )  # fmt: skip
    s = needed[0]
    if last:
        inverse = tl.rsqrt(squares / tl.maximum(pixels, 1.0) + EPS)
        s *= inverse
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
    for first in tl.static_range(0, OUT, OUTPUTS):
        o = first + tl.arange(0, OUTPUTS)
        mask = (c < C)[:, None] & (o < OUT)[None, :]
        at = c[:, None] * OUT + o[None, :]
        taps = ()
        for tap in tl.static_range(9):
            w = tl.load(master_ptr + tap * ALL * OUT + at, mask, other=0.0)
            taps += (w,)  # type: ignore[assignment]
        for place in tl.static_range(16):  # group_y, group_x, slot_y, slot_x
            total = tl.zeros(mask.shape, tl.float32)
            for tap in tl.static_range(9):  # as in geometry.FOLDED: the slot is tap > group
                in_y = (tap // 3 > place // 8) == (place // 2 % 2)
                in_x = (tap % 3 > place // 4 % 2) == (place % 2)
                if in_y and in_x:
                    total += taps[tap]
            total = narrow(total * s[:, None], folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + place * C * OUT + at, total, mask)


@triton.jit
def _scale(
    skip_weight_ptr, master_ptr, c, s, C: tl.constexpr, ALL: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Write s times the weights of the skip channels, and zeros behind the rows of thin ones."""
    for first in tl.static_range(0, OUT, OUTPUTS):
        o = first + tl.arange(0, OUTPUTS)
        mask = (c < C)[:, None] & (o < OUT)[None, :]
        at = c[:, None] * OUT + o[None, :]
        for tap in tl.static_range(9):
            w = tl.load(master_ptr + tap * ALL * OUT + at, mask, other=0.0) * s[:, None]
            w = narrow(w, skip_weight_ptr.dtype.element_ty)
            tl.store(skip_weight_ptr + tap * C * OUT + at, w, mask)
        for row in tl.static_range(9 * C, ROWS):
            tl.store(skip_weight_ptr + row * OUT + o, tl.zeros(o.shape, tl.float32), o < OUT)


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    deep_ptr, deep_pending_ptr, value_ptr, deep_affine_ptr, deep_parts_ptr, deep_counters_ptr,
    skip_ptr, skip_pending_ptr, skip_affine_ptr, skip_parts_ptr, skip_counters_ptr,
    gamma_ptr, master_ptr, folded_ptr, skip_weight_ptr,
    height, width, gamma_fit, master_fit, folded_fit, skip_weight_fit,
    DEEP: tl.constexpr, SKIP: tl.constexpr, OUT: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    BILINEAR: tl.constexpr, DEEP_ACT: tl.constexpr, SKIP_ACT: tl.constexpr,
    DEEP_ROWS: tl.constexpr, DEEP_COLUMNS: tl.constexpr, DEEP_HIGH: tl.constexpr,
    DEEP_WIDE: tl.constexpr, DEEP_BLOCK: tl.constexpr, SKIP_ROWS: tl.constexpr,
    SKIP_COLUMNS: tl.constexpr, SKIP_HIGH: tl.constexpr, SKIP_WIDE: tl.constexpr,
    SKIP_BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    fit = tl.program_id(1).to(tl.int64)
    deep_tiles = tl.cdiv(height, DEEP_ROWS) * tl.cdiv(width, DEEP_COLUMNS)
    deep_programs = deep_tiles * tl.cdiv(DEEP, DEEP_BLOCK)
    master_ptr += fit * master_fit
    if program < deep_programs:
        last, c, s = _statistics(
            program, deep_ptr, deep_pending_ptr, value_ptr, deep_affine_ptr, gamma_ptr + SKIP,
            gamma_fit, deep_parts_ptr, deep_counters_ptr, height, width, DEEP, DEEP_ACT, BILINEAR,
            DEEP_ROWS, DEEP_COLUMNS, DEEP_HIGH, DEEP_WIDE, DEEP_BLOCK,
        )  # fmt: skip
        if last:
            folded_ptr += fit * folded_fit
            _fold(folded_ptr, master_ptr + SKIP * OUT, c, s, DEEP, SKIP + DEEP, OUT, OUTPUTS)
    elif SKIP > 0:
        last, skip_c, skip_s = _statistics(
            program - deep_programs, skip_ptr, skip_pending_ptr, None, skip_affine_ptr, gamma_ptr,
            gamma_fit, skip_parts_ptr, skip_counters_ptr, 2 * height, 2 * width, SKIP, SKIP_ACT,
            False, SKIP_ROWS, SKIP_COLUMNS, SKIP_HIGH, SKIP_WIDE, SKIP_BLOCK,
        )  # fmt: skip
        if last:
            skip_weight_ptr += fit * skip_weight_fit
            _scale(
                skip_weight_ptr, master_ptr, skip_c, skip_s, SKIP, SKIP + DEEP, OUT, WEIGHT_ROWS,
                OUTPUTS,
            )  # fmt: skip


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
    memory: Allocator,
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
        memory: Where scratch comes from.
    """
    fits, height, width, channels = deep.raw.shape
    outputs = master.shape[-1]
    of_deep = cut(deep, tile, up == "bilinear", memory)
    of_skip = cut(skip, tile, False, memory)
    at_once = max(16, 256 * tile.warps // of_deep.block)  # 9 x 8 weights to a thread
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
            "WEIGHT_ROWS": 0 if skip_weight is None else skip_weight[0].numel() // outputs,
            "BILINEAR": up == "bilinear",
            "DEEP_ACT": deep.act,
            "SKIP_ACT": "none" if skip is None else skip.act,
            **{f"DEEP_{name}": number for name, number in of_deep.constants.items()},
            **{f"SKIP_{name}": number for name, number in of_skip.constants.items()},
            "OUTPUTS": min(triton.next_power_of_2(outputs), at_once),
        },
        tile.warps,
        tile.stages,
        bytes=size(deep.raw, skip and skip.raw, master, value, folded, skip_weight),
    )
