"""wgrad: the gradient of a convolution's weight; one program's work.

A program has a block of the weight at one slot of one group, and a range of the group's pixels (a
split). It gathers the input as the forward pass does and sums value(x)^T dy over its pixels. Each
split has a slice of partial sums of its own: whoever reads them adds the slices.

A folded weight is the join's scale s times sums of the master weight's taps (see `geometry`), that
of a skip connection s times the taps themselves. The gradient of s is the inner product of such a
weight's gradient with what s multiplies.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.device import activate, dot, exist, last_to_arrive, narrow
from flashdip.kernels.fused.geometry import members, placed, source
from flashdip.kernels.fused.norm import load_gradient

SHARES = tl.constexpr(32)  # added at a time


@triton.jit
def _gain(
    dweight_ptr, master_ptr, taps, group_y, group_x, slot_y, slot_x, i, live_i, begin,
    OUT: tl.constexpr, KIND: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Return what a block of the scaled weight's gradient says about the scale of channels i.

    The block begins at output `begin`. All of it beside as much of the master weight would not fit
    into registers: it is read back, a few outputs at a time.
    """
    FEW: tl.constexpr = min(BLOCK_O, 32)
    # The taps that are summed at this slot: geometry.FOLDED.
    first_y, first_x = slot_y * (1 + group_y), slot_x * (1 + group_x)
    last_y = first_y + tl.where(group_y == slot_y, 1, 2)
    last_x = first_x + tl.where(group_x == slot_x, 1, 2)
    if KIND == "conv":  # the one tap
        last_y, last_x = first_y + 1, first_x + 1
    gain = tl.zeros([BLOCK_I], tl.float32)
    tl.debug_barrier()  # all warps have stored
    for done in range(0, BLOCK_O, FEW):
        o = begin + done + tl.arange(0, FEW)
        at = i[:, None] * OUT + o[None, :]
        live = live_i[:, None] & exist(o, OUT, FEW)[None, :]
        fold = tl.zeros([BLOCK_I, FEW], tl.float32)
        for tap_y in range(first_y, last_y):
            for tap_x in range(first_x, last_x):
                tap_ptr = master_ptr + (tap_y * 3 + tap_x) * taps
                fold += tl.load(tap_ptr + at, live, other=0.0)
        gain += tl.sum(fold * tl.load(dweight_ptr + at, live, other=0.0), 1)
    return gain


@triton.jit
def wgrad(
    pid, fit, H, W, x_ptr, affine_ptr, du_ptr, y_ptr, pull_ptr, dweight_ptr, splits,
    master_ptr, masters, taps, join_ptr, ds_ptr, dgamma_ptr, parameters, shares_ptr, counters_ptr,
    IN: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
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
        du_ptr: The gradient of the convolution's result; with `y_ptr` and `pull_ptr` see
            `norm.load_gradient`.
        dweight_ptr: [F, splits, groups, groups, K, K, IN, OUT] float32, written; without groups
            where there is one.
        splits: Ranges of pixels.
        master_ptr: [F, 3, 3, IN, OUT] float32, fits `masters` and taps `taps` elements apart; like
            all that follows None where `ds_ptr` is.
        join_ptr: [F, 3, IN] float32: mean, 1 / standard deviation, scale.
        ds_ptr: [F, IN] float32, written: the gradient of the scale.
        dgamma_ptr: Of the first fit, [IN] float32, written; the next fit's is `parameters` on.
        shares_ptr: Scratch, [F, programs / blocks of IN, IN] float32.
        counters_ptr: Scratch, [F, blocks of IN] int32, zero.
        ROWS: Rows of the tile of pixels that one product sums over.
        COLUMNS: Its columns.
    """
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    SLOTS: tl.constexpr = GROUPS * GROUPS * K * K
    BLOCKS_I: tl.constexpr = (IN + BLOCK_I - 1) // BLOCK_I
    BLOCKS_O: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    block, share = pid % BLOCKS_I, pid // BLOCKS_I
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    o = share % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    slot = share // BLOCKS_O % SLOTS
    split = share // (BLOCKS_O * SLOTS)
    slot_x, slot_y, group = slot % K, slot // K % K, slot // (K * K)
    group_y, group_x = group // GROUPS, group % GROUPS
    live_i = exist(i, IN, BLOCK_I)

    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    down, across = members(H, KIND, K, S), members(W, KIND, K, S)
    far = fit.to(tl.int64)
    x_ptr += far * H * W * IN
    du_ptr += far * (GROUPS * down) * (GROUPS * across) * OUT
    if y_ptr is not None:
        y_ptr += far * (GROUPS * down) * (GROUPS * across) * OUT
        pull_ptr += fit * 3 * OUT
    if affine_ptr is not None:
        affine_ptr += fit * 4 * IN + i
        scale = tl.load(affine_ptr, live_i, other=0.0)[:, None]
        shift = tl.load(affine_ptr + IN, live_i, other=0.0)[:, None]
    pixel = tl.arange(0, ROWS * COLUMNS)
    tiles_x = tl.cdiv(across, COLUMNS)
    tiles = tl.cdiv(down, ROWS) * tiles_x
    total = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    for tile in tl.range(
        tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES
    ):  # fmt: skip
        m_y = tile // tiles_x * ROWS + pixel // COLUMNS
        m_x = tile % tiles_x * COLUMNS + pixel % COLUMNS
        row, row_inside = source(group_y, m_y, slot_y, H, KIND, S, BEFORE, PAD)
        column, column_inside = source(group_x, m_x, slot_x, W, KIND, S, BEFORE, PAD)
        inside = row_inside & column_inside
        at = (row * W + column)[None, :] * IN + i[:, None]
        x = tl.load(x_ptr + at, inside[None, :] & live_i[:, None], other=0.0)
        if affine_ptr is not None:
            value = activate(x.to(tl.float32) * scale + shift, ACT)
            x = narrow(tl.where(inside[None, :], value, 0.0), DTYPE)
        row, column = placed(group_y, m_y, H, KIND), placed(group_x, m_x, W, KIND)
        dy = load_gradient(
            du_ptr, y_ptr, pull_ptr, row * (GROUPS * across) + column,
            (m_y < down) & (m_x < across), o, OUT,
        )  # fmt: skip
        total = dot(x, dy, total)

    dweight_ptr += ((far * splits + split) * SLOTS + slot) * IN * OUT
    at = i[:, None] * OUT + o[None, :]
    tl.store(dweight_ptr + at, total, live_i[:, None] & exist(o, OUT, BLOCK_O)[None, :])

    if ds_ptr is not None:
        gain = _gain(
            dweight_ptr, master_ptr + far * masters, taps, group_y, group_x, slot_y, slot_x, i,
            live_i, share % BLOCKS_O * BLOCK_O, OUT, KIND, BLOCK_I, BLOCK_O,
        )  # fmt: skip
        expected = splits * SLOTS * BLOCKS_O
        shares_ptr += far * expected * IN + i
        tl.store(shares_ptr + share * IN, gain, live_i)
        if last_to_arrive(counters_ptr + fit * BLOCKS_I + block, expected):
            ds = tl.zeros([BLOCK_I], tl.float32)
            for first in range(0, expected, SHARES):
                n = (first + tl.arange(0, SHARES))[:, None]
                own = tl.load(
                    shares_ptr[None, :] + n * IN, (n < expected) & live_i[None, :], other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                ds += tl.sum(own, 0)
            inverse = tl.load(join_ptr + fit * 3 * IN + IN + i, live_i, other=0.0)
            tl.store(ds_ptr + fit * IN + i, ds, live_i)
            tl.store(dgamma_ptr + far * parameters + i, ds * inverse, live_i)
