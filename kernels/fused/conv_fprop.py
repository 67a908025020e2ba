"""fprop: a tile of a convolution's result; one program's work.

It sums over slots and blocks of input channels; pixels are gathered straight from the map, border
and all, so nothing is padded or unfolded in memory. All slots of one block of channels follow each
other: they read nearly the same pixels.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.conv_split import add_up, hand_in
from flashdip.kernels.fused.device import FEW, activate, dot, halves, narrow, whole
from flashdip.kernels.fused.geometry import members, placed, source
from flashdip.kernels.fused.norm import finish_moments

TAPS = tl.constexpr(16)  # of a thin skip: 9, made a power of 2


@triton.jit
def _sum(
    accumulator, x_ptr, x_affine_ptr, weight_ptr, group_y, group_x, m_y, m_x, c, begin, end, H, W,
    IN: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BEFORE: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Add the products of steps begin .. end - 1, [pixels, channels c]; pointers are the fit's."""
    SLOTS: tl.constexpr = K * K
    weight_tile = weight_ptr + (tl.arange(0, INPUTS) * OUT)[:, None] + c[None, :]
    for step in range(begin, end):
        slot, first = step % SLOTS, 0
        if IN > INPUTS:
            first = step // SLOTS * INPUTS
        i = first + tl.arange(0, INPUTS)
        live = i < IN
        if IN % INPUTS == 0:
            live = tl.full([INPUTS], True, tl.int1)
        row, row_inside = source(group_y, m_y, slot // K, H, KIND, S, BEFORE, PAD)
        column, column_inside = source(group_x, m_x, slot % K, W, KIND, S, BEFORE, PAD)
        inside = row_inside & column_inside
        at = (x_ptr + i)[None, :] + ((row * W + column) * IN)[:, None]
        x = tl.load(at, inside[:, None] & live[None, :], other=0.0)
        if x_affine_ptr is not None:
            scale = tl.load(x_affine_ptr + i, live, other=0.0)
            shift = tl.load(x_affine_ptr + IN + i, live, other=0.0)
            value = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], ACT)
            if PAD == "zero":
                value = tl.where(inside[:, None], value, 0.0)
            x = narrow(value, x.dtype)
        at = weight_tile + (slot * IN + first) * OUT
        weight = tl.load(at, live[:, None] & (c < OUT)[None, :], other=0.0)
        accumulator = dot(x, weight, accumulator)
    return accumulator


@triton.jit
def _add_skip(
    accumulator, skip_ptr, skip_affine_ptr, weight_ptr, row, column, c, taps, H, W,
    SKIP: tl.constexpr, OUT: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Add conv3x3 of a map [H, W, SKIP] at the pixels (row, column), the first `taps` of it."""
    tap = tl.arange(0, TAPS)
    i = tl.arange(0, triton.next_power_of_2(SKIP))
    row, row_inside = source(0, row[:, None], (tap // 3)[None, :], H, "conv", 1, 1, PAD)
    column, column_inside = source(0, column[:, None], (tap % 3)[None, :], W, "conv", 1, 1, PAD)
    inside = (row_inside & column_inside & (tap < taps)[None, :])[:, :, None]
    live = i < SKIP
    at = skip_ptr + ((row * W + column) * SKIP)[:, :, None] + i[None, None, :]
    x = tl.load(at, inside & live[None, None, :], other=0.0)
    if skip_affine_ptr is not None:
        scale = tl.load(skip_affine_ptr + i, live, other=0.0)[None, None, :]
        shift = tl.load(skip_affine_ptr + SKIP + i, live, other=0.0)[None, None, :]
        value = activate(x.to(tl.float32) * scale + shift, ACT)
        x = narrow(tl.where(inside, value, 0.0), x.dtype)
    x = tl.reshape(x, [row.shape[0], TAPS * i.shape[0]])
    rows = tl.reshape(tap[:, None] * SKIP + i[None, :], [TAPS * i.shape[0]])
    live = tl.reshape((tap < 9)[:, None] & live[None, :], [TAPS * i.shape[0]])
    at = weight_ptr + rows[:, None] * OUT + c[None, :]
    weight = tl.load(at, live[:, None] & (c < OUT)[None, :], other=0.0)
    return dot(x, weight, accumulator)


@triton.jit
def fprop(
    pid, fit, fits, H, W, x_ptr, x_affine_ptr, weight_ptr, weights, y_ptr, add_ptr,
    skip_ptr, skip_affine_ptr, skip_weight_ptr, splits, parts_ptr, arrivals_ptr,
    gamma_ptr, beta_ptr, parameters, affine_ptr, statistics_ptr, counters_ptr,
    IN: tl.constexpr, OUT: tl.constexpr, SKIP: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
    SKIP_ACT: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Do the work of program `pid` of a fit; `conv.Convolution` says what the arguments are."""
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    BLOCKS: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    STEPS: tl.constexpr = (IN + INPUTS - 1) // INPUTS * K * K
    members_y, members_x = members(H, KIND, K, S), members(W, KIND, K, S)
    tiles = tl.cdiv(members_y * members_x, PIXELS) * GROUPS * GROUPS

    # Programs that read the same pixels are neighbours.
    job, split = pid // splits, pid % splits
    tile, block = job // BLOCKS, job % BLOCKS
    place, group = tile // (GROUPS * GROUPS), tile % (GROUPS * GROUPS)
    group_y, group_x = group // GROUPS, group % GROUPS
    pixel = place * PIXELS + tl.arange(0, PIXELS)
    m_y, m_x = pixel // members_x, pixel % members_x
    c = block * OUTPUTS + tl.arange(0, OUTPUTS)

    far = fit.to(tl.int64)
    accumulator = tl.zeros([PIXELS, OUTPUTS], tl.float32)
    if skip_ptr is not None:
        row, column = placed(group_y, m_y, H, KIND), placed(group_x, m_x, W, KIND)
        if skip_affine_ptr is not None:
            skip_affine_ptr += fit * 4 * SKIP
        accumulator = _add_skip(
            accumulator, skip_ptr + far * 4 * H * W * SKIP, skip_affine_ptr,
            skip_weight_ptr + far * ((9 * SKIP + 15) // 16 * 16 * OUT), row, column, c,
            tl.where(split == 0, 9, 0), 2 * H, 2 * W, SKIP, OUT, PAD, SKIP_ACT,
        )  # fmt: skip
    if x_affine_ptr is not None:
        x_affine_ptr += fit * 4 * IN
    accumulator = _sum(
        accumulator, x_ptr + far * H * W * IN, x_affine_ptr,
        weight_ptr + far * weights + group * (K * K * IN * OUT), group_y, group_x, m_y, m_x, c,
        split * STEPS // splits, (split + 1) * STEPS // splits, H, W,
        IN, OUT, KIND, K, S, BEFORE, PAD, ACT, INPUTS,
    )  # fmt: skip

    complete = True
    if parts_ptr is not None:
        own_job = fit * tiles * BLOCKS + job
        complete = hand_in(accumulator, own_job, split, splits, parts_ptr, arrivals_ptr)
    if complete:
        total = accumulator
        if parts_ptr is not None:
            total = add_up(total, own_job, splits, parts_ptr)
        valid, at = pixel < members_y * members_x, pixel
        if GROUPS > 1:
            at = placed(group_y, m_y, H, KIND) * (GROUPS * members_x)
            at += placed(group_x, m_x, W, KIND)
        offset = far * (GROUPS * GROUPS * OUT) * members_y * members_x
        if add_ptr is not None:
            add_ptr += offset
        mean, squares = _stored(
            total, y_ptr + offset, add_ptr, at, valid, block * OUTPUTS, OUT, OUTPUTS
        )
        if affine_ptr is not None:
            finish_moments(
                tl.sum(valid.to(tl.float32), 0), mean, squares, c, tile, tiles, fit, fits,
                statistics_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr, parameters, OUT,
            )  # fmt: skip


@triton.jit
def _stored(
    total, y_ptr, add_ptr, at, valid, first, OUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store y at BLOCK channels of the pixels; return its mean and the squares about it.

    Of more than FEW channels one half follows the other.
    """
    if BLOCK > FEW:
        HALF: tl.constexpr = BLOCK // 2
        lower, upper = halves(total)
        mean, squares = _stored(lower, y_ptr, add_ptr, at, valid, first, OUT, HALF)
        more, more_squares = _stored(upper, y_ptr, add_ptr, at, valid, first + HALF, OUT, HALF)
        return whole(mean, more), whole(squares, more_squares)
    c = first + tl.arange(0, BLOCK)
    at = (at * OUT)[:, None] + c[None, :]
    mask = valid[:, None] & (c < OUT)[None, :]
    if add_ptr is not None:
        total += tl.load(add_ptr + at, mask, other=0.0).to(tl.float32)
    y = narrow(total, y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask)
    y, ones = y.to(tl.float32), valid.to(tl.float32)
    mean = tl.sum(y * ones[:, None], 0) / tl.maximum(tl.sum(ones, 0), 1.0)
    off = (y - mean[None, :]) * ones[:, None]
    return mean, tl.sum(off * off, 0)
