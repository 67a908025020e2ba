"""wgrad: the gradient of a convolution's weight; one program's work.

The weight of a group is a matrix: a row for each slot and input channel, slot by slot, a column for
each output channel. A program has a block of one group's matrix, and a range of the group's pixels
(a split). It gathers the input as the forward pass does and sums value(x)^T dy over its pixels.
Each split has a slice of partial sums of its own: whoever reads them adds the slices.

A folded weight is the join's scale s times sums of the master weight's taps (see `geometry`), that
of a skip connection s times the taps themselves. The gradient of s is the inner product of such a
weight's gradient with what s multiplies.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.device import activate, dot, exist, last_to_arrive, narrow
from flashdip.kernels.fused.geometry import members, placed, source

SHARES = tl.constexpr(32)  # added at a time


@triton.jit
def _gain(
    dweight_ptr, master_ptr, taps, group_y, group_x, slot_y, slot_x, r, i, live_r, begin,
    OUT: tl.constexpr, KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Return what a block of the scaled weight's gradient says about the scale, for each row.

    The block begins at output `begin`. All of it beside as much of the master weight would not fit
    into registers: it is read back, a few outputs at a time.
    """
    FEW: tl.constexpr = min(BLOCK_O, 32)
    TAPS: tl.constexpr = 1 if KIND == "conv" else 2  # at most, along an axis, summed at a slot
    # They are geometry.FOLDED.
    first_y, first_x = slot_y * (1 + group_y), slot_x * (1 + group_x)
    taps_y = tl.where(group_y == slot_y, 1, 2) + tl.zeros_like(r)
    taps_x = tl.where(group_x == slot_x, 1, 2) + tl.zeros_like(r)
    gain = tl.zeros([BLOCK_R], tl.float32)
    tl.debug_barrier()  # all warps have stored
    for done in range(0, BLOCK_O, FEW):
        o = begin + done + tl.arange(0, FEW)
        live = live_r[:, None] & exist(o, OUT, FEW)[None, :]
        fold = tl.zeros([BLOCK_R, FEW], tl.float32)
        for tap_y in tl.static_range(TAPS):
            for tap_x in tl.static_range(TAPS):
                tap = (first_y + tap_y) * 3 + first_x + tap_x
                at = (tap * taps + i * OUT)[:, None] + o[None, :]
                summed = (tap_y < taps_y) & (tap_x < taps_x)
                fold += tl.load(master_ptr + at, live & summed[:, None], other=0.0)
        at = r[:, None] * OUT + o[None, :]
        gain += tl.sum(fold * tl.load(dweight_ptr + at, live, other=0.0), 1)
    return gain


@triton.jit
def wgrad(
    pid, fit, H, W, x_ptr, affine_ptr, du_ptr, y_ptr, pull_ptr, dweight_ptr, splits,
    master_ptr, masters, taps, join_ptr, ds_ptr, dgamma_ptr, parameters, shares_ptr, counters_ptr,
    IN: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write a block of one split's slice of the partial sums.

    Args:
        pid: Which block of which split; blocks of a split, which read the same pixels, follow each
            other.
        fit: Which fit.
        H: Rows of the input.
        W: Its columns.
        x_ptr: [F, H, W, IN].
        affine_ptr: [F, 4, IN] float32, or None where x is the value.
        du_ptr: The gradient of the convolution's result. With `y_ptr` and `pull_ptr` it is
            a du + b y + c, with a, b, c the rows of `pull_ptr` [F, 3, OUT]: then three sums are
            taken, with du, y and 1, so that what was loaded goes to the matrix units untouched.
        dweight_ptr: [F, splits, groups, groups, K, K, IN, OUT] float32, written; without groups
            where there is one.
        splits: Ranges of pixels.
        master_ptr: [F, 3, 3, IN, OUT] float32, fits `masters` and taps `taps` elements apart; like
            all that follows None where `ds_ptr` is.
        join_ptr: [F, 3, IN] float32: mean, 1 / standard deviation, scale.
        ds_ptr: [F, IN] float32, written: the gradient of the scale.
        dgamma_ptr: Of the first fit, [IN] float32, written; the next fit's is `parameters` on.
        shares_ptr: Scratch, [F, programs / blocks of rows, K, K, IN] float32.
        counters_ptr: Scratch, [F] int32, zero.
        ROWS: Rows of the tile of pixels that one product sums over.
        COLUMNS: Its columns.
        BLOCK_R: Rows of a block of the weight.
        BLOCK_O: Its columns.
    """
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    MATRIX: tl.constexpr = K * K * IN  # rows of a group's weight
    BLOCKS_R: tl.constexpr = (MATRIX + BLOCK_R - 1) // BLOCK_R
    BLOCKS_O: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    block, share = pid % BLOCKS_R, pid // BLOCKS_R
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    o = share % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    group, split = share // BLOCKS_O % (GROUPS * GROUPS), share // (BLOCKS_O * GROUPS * GROUPS)
    group_y, group_x = group // GROUPS, group % GROUPS
    live_r = exist(r, MATRIX, BLOCK_R)
    if IN % BLOCK_R == 0:
        slot, i = block * BLOCK_R // IN, block * BLOCK_R % IN + tl.arange(0, BLOCK_R)
        slot_y, slot_x = slot // K, slot % K
        seen_y, seen_x = slot_y, slot_x
    else:
        slot, i = r // IN, r % IN
        slot_y, slot_x = slot // K, slot % K
        seen_y, seen_x = slot_y[:, None], slot_x[:, None]

    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    down, across = members(H, KIND, K, S), members(W, KIND, K, S)
    far = fit.to(tl.int64)
    x_ptr += far * H * W * IN
    du_ptr += far * (GROUPS * down) * (GROUPS * across) * OUT
    if y_ptr is not None:
        y_ptr += far * (GROUPS * down) * (GROUPS * across) * OUT
    if affine_ptr is not None:
        affine_ptr += fit * 4 * IN + i
        scale = tl.load(affine_ptr, live_r, other=0.0)[:, None]
        shift = tl.load(affine_ptr + IN, live_r, other=0.0)[:, None]
    pixel = tl.arange(0, ROWS * COLUMNS)
    tiles_x = tl.cdiv(across, COLUMNS)
    tiles = tl.cdiv(down, ROWS) * tiles_x
    total = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    along, plain, beyond = tl.zeros_like(total), tl.zeros_like(total), 0
    ones = narrow(tl.full([ROWS * COLUMNS, BLOCK_O], 1.0, tl.float32), DTYPE)
    for tile in tl.range(
        tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES
    ):  # fmt: skip
        top, left = tile // tiles_x * ROWS, tile % tiles_x * COLUMNS
        m_y, m_x = top + pixel // COLUMNS, left + pixel % COLUMNS
        valid = (m_y < down) & (m_x < across)
        row, row_inside = source(group_y, m_y[None, :], seen_y, H, KIND, S, BEFORE, PAD)
        column, column_inside = source(group_x, m_x[None, :], seen_x, W, KIND, S, BEFORE, PAD)
        inside = row_inside & column_inside
        at = (row * W + column) * IN + i[:, None]
        if y_ptr is not None and PAD == "zero":
            inside &= valid[None, :]
        there = inside & live_r[:, None]
        if y_ptr is not None:
            there &= valid[None, :]
        x = tl.load(x_ptr + at, there, other=0.0)
        if affine_ptr is not None:
            value = activate(x.to(tl.float32) * scale + shift, ACT)
            x = narrow(tl.where(inside, value, 0.0), DTYPE)
        row, column = placed(group_y, m_y, H, KIND), placed(group_x, m_x, W, KIND)
        at = (row * (GROUPS * across) + column)[:, None] * OUT + o[None, :]
        live = valid[:, None] & exist(o, OUT, BLOCK_O)[None, :]
        total = dot(x, tl.load(du_ptr + at, live, other=0.0), total)
        if y_ptr is not None:
            along = dot(x, tl.load(y_ptr + at, live, other=0.0), along)
            plain = dot(x, ones, plain)
            beyond += ROWS * COLUMNS
            beyond -= tl.minimum(down - top, ROWS) * tl.minimum(across - left, COLUMNS)
    if y_ptr is not None:
        # What pixels beyond the map count for, raw 0; padded by zeros the value is 0 there.
        if affine_ptr is not None and PAD == "reflection":
            nothing = narrow(activate(shift, ACT), DTYPE).to(tl.float32)
            plain -= nothing * beyond
        pull_ptr += fit * 3 * OUT + o
        live_o = exist(o, OUT, BLOCK_O)
        total *= tl.load(pull_ptr, live_o, other=0.0)[None, :]
        total += along * tl.load(pull_ptr + OUT, live_o, other=0.0)[None, :]
        total += plain * tl.load(pull_ptr + 2 * OUT, live_o, other=0.0)[None, :]

    dweight_ptr += ((far * splits + split) * (GROUPS * GROUPS) + group) * MATRIX * OUT
    at = r[:, None] * OUT + o[None, :]
    tl.store(dweight_ptr + at, total, live_r[:, None] & exist(o, OUT, BLOCK_O)[None, :])

    if ds_ptr is not None:
        gain = _gain(
            dweight_ptr, master_ptr + far * masters, taps, group_y, group_x, slot_y, slot_x, r, i,
            live_r, share % BLOCKS_O * BLOCK_O, OUT, KIND, BLOCK_R, BLOCK_O,
        )  # fmt: skip
        shares_ptr += far * splits * (GROUPS * GROUPS * BLOCKS_O * MATRIX)
        tl.store(shares_ptr + share * MATRIX + r, gain, live_r)
        programs = splits * (GROUPS * GROUPS * BLOCKS_O * BLOCKS_R)
        if last_to_arrive(counters_ptr + fit, programs):
            _finish(
                shares_ptr, splits * (GROUPS * GROUPS * BLOCKS_O * K * K), join_ptr + fit * 3 * IN,
                ds_ptr + fit * IN, dgamma_ptr + far * parameters, IN,
            )  # fmt: skip


@triton.jit
def _finish(shares_ptr, count, join_ptr, ds_ptr, dgamma_ptr, IN: tl.constexpr):
    """Add up `count` shares, each [IN], of the scale's gradient; pointers are the fit's."""
    BLOCK: tl.constexpr = min(triton.next_power_of_2(IN), 128)
    for begin in range(0, IN, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        live = i < IN
        ds = tl.zeros([BLOCK], tl.float32)
        for first in range(0, count, SHARES):
            n = (first + tl.arange(0, SHARES))[:, None]
            own = tl.load(
                shares_ptr + n * IN + i[None, :], (n < count) & live[None, :], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            ds += tl.sum(own, 0)
        inverse = tl.load(join_ptr + IN + i, live, other=0.0)
        tl.store(ds_ptr + i, ds, live)
        tl.store(dgamma_ptr + i, ds * inverse, live)
