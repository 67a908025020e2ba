"""dgrad: the gradient of a convolution's input, gathered; one program's work.

A program computes a tile of pixels of the input times a block of its channels. It sums over groups
of outputs, slots and blocks of output channels; which output pixels see an input pixel through a
slot is said by `geometry.targets`. Away from the border it is one, at a constant distance from the
one that sees the tile's corner. At the border a second row or column may see it, through the
reflection: that is a further term of the sum, for the whole tile at once. So nothing ever comes
between the load of dy and its product.

With stride 2 a slot reaches pixels of one parity only. So parities are taken apart and a program
sums over its own slots: 9 products for every 4 pixels with 3x3, as CUTLASS's strided dgrad does.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.conv_wgrad import exist, load_gradient
from flashdip.kernels.fused.device import dot, narrow, slope
from flashdip.kernels.fused.geometry import members, placed, targets
from flashdip.kernels.fused.norm import finish_backward


@triton.constexpr_function
def _edge(KIND, K, BEFORE):
    """Return how many rows at either end may be seen through padding."""
    if KIND == "conv":
        return max(BEFORE, K - 1 - BEFORE) + 1 if K > 1 else 0
    return 1 if KIND == "nearest" else 2


@triton.jit
def _terms(
    first, low, high, KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """Count the terms of the sum along one axis.

    A term is a way, a pair (group, slot), to see a row. The first terms are all ways in order. At
    the ends some ways show a second row, through the reflection: the first few of them at the low
    end, the last few at the high end. These are the terms that follow.

    Args:
        first: First slot that reaches the parity of the rows.
        low: Whether the tile reaches the low end.
        high: Whether it reaches the high end.

    Returns:
        The number of ways, of terms at the low end, and of terms altogether.
    """
    if KIND == "conv":
        ways = tl.cdiv(K - first, S)
        front, back = tl.cdiv(BEFORE - first, S), ways - tl.cdiv(BEFORE + 1 - first, S)
    elif KIND == "nearest":
        ways, front, back = 4, 1, 1
    else:
        ways, front, back = 4, 2, 2
    front = tl.where(low & (PAD == "reflection"), front, 0)
    back = tl.where(high & (PAD == "reflection"), back, 0)
    return ways, front, ways + front + back


@triton.jit
def _seen(
    term, ways, front, terms, row, first, side, KIND: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Return a term's group and slot, and the output rows that see `row` by it, -1 for none."""
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    further = tl.where(term < ways + front, term - ways, term + ways - terms)
    way = tl.where(term < ways, term, further)
    slots = tl.maximum(ways // GROUPS, 1)  # none is possible where K < S
    group, slot = way // slots, first + way % slots * S
    main, sees, extra, sees_too = targets(group, row, slot, side, KIND, K, S, BEFORE, PAD)
    out = placed(group, tl.where(way == term, main, extra), side, KIND)
    return group, slot, tl.where(tl.where(way == term, sees, sees_too), out, -1)


@triton.jit
def _sum(
    total, wanted, dy_ptr, weight_ptr, top, left, first_y, first_x, low_y, low_x, high_y, high_x,
    c, H, W, INSIDE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add to `total` [pixels, channels c] what a tile gets from the outputs that see it.

    Args:
        wanted: Whether to add anything.
        dy_ptr: The fit's, like `weight_ptr`.
        top: Row of the tile's first pixel.
        left: Its column.
        first_y: For this and what follows see `_terms`.
        INSIDE: Whether the tile reaches no end.
    """
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    BLOCKS: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    ways_y, front_y, terms_y = _terms(first_y, low_y, high_y, KIND, K, S, BEFORE, PAD)
    ways_x, front_x, terms_x = _terms(first_x, low_x, high_x, KIND, K, S, BEFORE, PAD)
    wide = GROUPS * members(W, KIND, K, S)
    y, x = tl.arange(0, ROWS * COLUMNS) // COLUMNS, tl.arange(0, ROWS * COLUMNS) % COLUMNS
    lanes = tl.arange(0, BLOCK_O)
    row, column = top, left
    # Inside, the flags add nothing, but keep the number of steps from the compiler, which would
    # unroll the loop.
    steps = tl.where(wanted, terms_y * terms_x * BLOCKS, 0)
    if INSIDE:
        front_y, terms_y, front_x, terms_x = 0, ways_y, 0, ways_x
        constant = (y * wide + x) * (GROUPS * OUT)
    else:
        row, column, constant = top + y * S, left + x * S, 0 * y
    terms_x = tl.maximum(terms_x, 1)
    for step in tl.range(0, steps, num_stages=STAGES):
        first, term = step % BLOCKS * BLOCK_O, step // BLOCKS
        group_y, slot_y, out_y = _seen(
            term // terms_x, ways_y, front_y, terms_y, row, first_y, H, KIND, K, S, BEFORE, PAD,
        )  # fmt: skip
        group_x, slot_x, out_x = _seen(
            term % terms_x, ways_x, front_x, terms_x, column, first_x, W, KIND, K, S, BEFORE, PAD,
        )  # fmt: skip
        live = exist(first + lanes, OUT, BLOCK_O)
        at = constant + ((out_y * wide + out_x) * OUT + first)
        mask = live[None, :]
        if not INSIDE:
            mask = mask & ((out_y >= 0) & (out_x >= 0))[:, None]
        dy = tl.load(dy_ptr + at[:, None] + lanes[None, :], mask, other=0.0)
        slot = ((group_y * GROUPS + group_x) * K + slot_y) * K + slot_x
        weight = tl.load(
            weight_ptr + slot * IN * OUT + first + c[None, :] * OUT + lanes[:, None],
            exist(c, IN, BLOCK_I)[None, :] & live[:, None], other=0.0,
        )  # fmt: skip
        total = dot(dy, weight, total)
    return total


@triton.jit
def dgrad(
    pid, fit, fits, H, W, x_ptr, affine_ptr, weight_ptr, weights, dy_ptr, dx_ptr,
    side_du_ptr, side_y_ptr, side_pull_ptr, side_weight_ptr, side_weights,
    parts_ptr, counters_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters,
    IN: tl.constexpr, OUT: tl.constexpr, SIDE: tl.constexpr, ACT: tl.constexpr,
    KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr,
    PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dx at a tile of pixels and a block of channels, and what the norm before x needs.

    Args:
        pid: Which block of channels of which tile.
        fit: Which of the `fits` fits.
        H: Rows of the input.
        W: Its columns.
        x_ptr: [F, H, W, IN].
        affine_ptr: [F, 4, IN] float32, or None: then dx is the gradient of x itself, and all that
            the norm needs is None.
        weight_ptr: [F, groups, groups, K, K, IN, OUT], fits `weights` elements apart; without
            groups where there is one.
        dy_ptr: The gradient of the convolution's result.
        dx_ptr: [F, H, W, IN], written.
        side_du_ptr: Of a 1x1 convolution of the same x, [F, H, W, SIDE], or None; with `side_y_ptr`
            and `side_pull_ptr` see `load_gradient`.
        side_weight_ptr: [F, IN, SIDE], fits `side_weights` elements apart.
        parts_ptr: For this and all that follows see `norm.finish_backward`.
        ROWS: Rows of a tile of pixels.
        COLUMNS: Its columns.
        BLOCK_I: Channels of x in a block.
        BLOCK_O: Channels of dy in one product.
    """
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    EDGE: tl.constexpr = _edge(KIND, K, BEFORE)
    blocks = tl.cdiv(IN, BLOCK_I)
    down, across = tl.cdiv(tl.cdiv(H, S), ROWS), tl.cdiv(tl.cdiv(W, S), COLUMNS)
    tile, tiles = pid // blocks, S * S * down * across
    c = pid % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    parity, place = tile // (down * across), tile % (down * across)
    odd_y, odd_x = parity // S, parity % S
    top = place // across * (ROWS * S) + odd_y
    left = place % across * (COLUMNS * S) + odd_x
    pixel = tl.arange(0, ROWS * COLUMNS)
    first_y, first_x = (odd_y + BEFORE) % S, (odd_x + BEFORE) % S

    far = fit.to(tl.int64)
    dy_ptr += far * (GROUPS * members(H, KIND, K, S)) * (GROUPS * members(W, KIND, K, S)) * OUT
    weight_ptr += far * weights
    low_y, high_y = top < EDGE, top + (ROWS - 1) * S >= H - EDGE
    low_x, high_x = left < EDGE, left + (COLUMNS - 1) * S >= W - EDGE
    inside = not (low_y | high_y | low_x | high_x)
    # Two loops, one of them empty: in two branches each would have shared memory of its own.
    g = tl.zeros([ROWS * COLUMNS, BLOCK_I], tl.float32)
    g = _sum(
        g, inside, dy_ptr, weight_ptr, top, left, first_y, first_x, low_y, low_x, high_y,
        high_x, c, H, W, True, IN, OUT, KIND, K, S, BEFORE, PAD, ROWS, COLUMNS, BLOCK_I, BLOCK_O,
        STAGES,
    )  # fmt: skip
    g = _sum(
        g, not inside, dy_ptr, weight_ptr, top, left, first_y, first_x, low_y, low_x, high_y,
        high_x, c, H, W, False, IN, OUT, KIND, K, S, BEFORE, PAD, ROWS, COLUMNS, BLOCK_I, BLOCK_O,
        STAGES,
    )  # fmt: skip

    row, column = top + pixel // COLUMNS * S, left + pixel % COLUMNS * S
    valid, live = (row < H) & (column < W), exist(c, IN, BLOCK_I)
    pixel = row * W + column
    if side_du_ptr is not None:
        BLOCK_S: tl.constexpr = max(16, triton.next_power_of_2(SIDE))
        s = tl.arange(0, BLOCK_S)
        dy = load_gradient(
            side_du_ptr + far * H * W * SIDE, side_y_ptr + far * H * W * SIDE,
            side_pull_ptr + fit * 3 * SIDE, pixel, valid, s, SIDE, BLOCK_S,
        )  # fmt: skip
        weight = tl.load(
            side_weight_ptr + far * side_weights + c[None, :] * SIDE + s[:, None],
            live[None, :] & exist(s, SIDE, BLOCK_S)[:, None], other=0.0,
        )  # fmt: skip
        g = dot(dy, weight, g)

    x_ptr += far * H * W * IN
    dx_ptr += far * H * W * IN
    at = pixel[:, None] * IN + c[None, :]
    mask = valid[:, None] & live[None, :]
    if affine_ptr is None:
        tl.store(dx_ptr + at, narrow(g, DTYPE), mask)
    else:
        own = affine_ptr + fit * 4 * IN + c
        scale = tl.load(own, live, other=0.0)[None, :]
        shift = tl.load(own + IN, live, other=0.0)[None, :]
        raw = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        du = narrow(g * slope(raw * scale + shift, ACT), DTYPE)
        tl.store(dx_ptr + at, du, mask)
        finish_backward(
            du.to(tl.float32), raw, valid, c, tile, tiles, fit, fits, H * W, parts_ptr,
            counters_ptr, affine_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, IN,
        )  # fmt: skip
