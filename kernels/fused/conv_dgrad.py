"""dgrad: the gradient of a convolution's input, gathered; one program's work.

A program computes a tile of pixels of the input times a block of its channels. It sums over groups
of outputs, slots and blocks of output channels; which output pixels see an input pixel through a
slot is said by `geometry.targets`. Away from the border it is one, at a constant distance from the
one that sees the first pixel there is. At the border a second row or column may see it, through the
reflection: that is a further term of the sum, for the whole tile at once. So nothing ever comes
between the load of dy and its product.

Pixels near the border are a ring with tiles of their own, which take longer and therefore come
first. In the ring as inside it a tile is so many pixels in a row, line after line: only the last
one of each is not full, whatever the size of the map.

With stride 2 a slot reaches pixels of one parity only. So parities are taken apart and a program
sums over its own slots: 9 products for every 4 pixels with 3x3, as CUTLASS's strided dgrad does.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.conv_split import add_up, hand_in
from flashdip.kernels.fused.device import FEW, dot, exist, halves, narrow, slope, whole
from flashdip.kernels.fused.geometry import Geometry, members, placed, targets
from flashdip.kernels.fused.norm import finish_sums, load_gradient


def tiles(geometry: Geometry, height: int, width: int, pixels: int) -> int:
    """Return how many tiles of `pixels` pixels cover an input, ring and inside of all parities."""
    stride = geometry.stride
    low, high = _ring(_edge(geometry.kind, geometry.size, geometry.before), stride)
    down, across = triton.cdiv(height, stride), triton.cdiv(width, stride)
    inside = max(down - low - high, 0) * max(across - low - high, 0)
    ring = down * across - inside
    return int(stride**2 * (triton.cdiv(ring, pixels) + triton.cdiv(inside, pixels)))


@triton.constexpr_function
def _edge(KIND, K, BEFORE):
    """Return how many rows at either end may be seen through padding."""
    if KIND == "conv":
        return max(BEFORE, K - 1 - BEFORE) + 1 if K > 1 else 0
    return 1 if KIND == "nearest" else 2


@triton.constexpr_function
def _ring(EDGE, S):
    """Return how wide the ring is, in rows of one parity, at the low and at the high end."""
    return (EDGE + S - 1) // S, (EDGE + 2 * (S - 1)) // S


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
    if KIND == "conv":
        # As `targets` does, but with all that is the same for the whole tile computed once: the
        # padded row is the row itself, or mirrored at one end, where the outermost row is not.
        low = term < ways + front
        mirror = tl.where(low, 0, 2 * (side - 1))
        outermost = tl.where(way == term, -1, tl.where(low, 0, side - 1))
        padded = tl.where(way == term, 1, -1) * row
        padded += tl.where(way == term, 0, mirror) + BEFORE - slot
        out = padded // S
        there = (padded >= 0) & (out < members(side, KIND, K, S)) & (row != outermost)
        return group, slot, tl.where(there & (padded % S == 0), out, -1)
    main, sees, extra, sees_too = targets(group, row, slot, side, KIND, K, S, BEFORE, PAD)
    out = placed(group, tl.where(way == term, main, extra), side, KIND)
    return group, slot, tl.where(tl.where(way == term, sees, sees_too), out, -1)


@triton.jit
def _sum(
    total, split, splits, wanted, dy_ptr, weight_ptr, y, x, top, left, first_y, first_x, low_y,
    low_x, high_y, high_x, c, H, W, INSIDE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add to `total` [pixels, channels c] what a tile gets from the outputs that see it.

    Args:
        split: Which of `splits` shares of the sum to add.
        wanted: Whether to add anything.
        dy_ptr: The fit's, like `weight_ptr`.
        y: Rows of the pixels, among those of their parity, from the one at `top`.
        x: Their columns, likewise.
        top: A row of that parity; if INSIDE, inside the ring.
        left: A column.
        first_y: For this and what follows see `_terms`.
        INSIDE: Whether the tile lies inside the ring.
    """
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    BLOCKS: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    ways_y, front_y, terms_y = _terms(first_y, low_y, high_y, KIND, K, S, BEFORE, PAD)
    ways_x, front_x, terms_x = _terms(first_x, low_x, high_x, KIND, K, S, BEFORE, PAD)
    wide = GROUPS * members(W, KIND, K, S)
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
    for step in tl.range(
        steps * split // splits, steps * (split + 1) // splits, num_stages=STAGES,
        disable_licm=not INSIDE,
    ):  # fmt: skip
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
def _in_hole(begin, top, left, hole_y, hole_x, PIXELS: tl.constexpr):
    """Return rows and columns of PIXELS pixels in the ring's hole; of the last one beyond it."""
    index = tl.minimum(begin + tl.arange(0, PIXELS), hole_y * hole_x - 1)
    return top + index // hole_x, left + index % hole_x


@triton.jit
def _in_ring(begin, down, across, top, left, hole_y, hole_x, PIXELS: tl.constexpr):
    """Return rows and columns of PIXELS pixels in the ring; of the last one beyond it.

    First come the lines at both ends, then what is left of the others.
    """
    ends = (down - hole_y) * across
    index = tl.minimum(begin + tl.arange(0, PIXELS), down * across - hole_y * hole_x - 1)
    line, beside = index // across, tl.maximum(index - ends, 0)
    sides = tl.maximum(across - hole_x, 1)
    column = beside % sides
    y = tl.where(index < ends, tl.where(line < top, line, line + hole_y), top + beside // sides)
    column = tl.where(column < left, column, column + hole_x)
    return y, tl.where(index < ends, index % across, column)


@triton.jit
def _activated(
    g, x_ptr, dx_ptr, affine_ptr, pixel, valid, first, ACT: tl.constexpr, IN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store du at BLOCK channels of the pixels; return its sum and that of du xhat.

    Of more than FEW channels one half follows the other.
    """
    if BLOCK > FEW:
        HALF: tl.constexpr = BLOCK // 2
        lower, upper = halves(g)
        plain, along = _activated(
            lower, x_ptr, dx_ptr, affine_ptr, pixel, valid, first, ACT, IN, HALF
        )
        more, more_along = _activated(
            upper, x_ptr, dx_ptr, affine_ptr, pixel, valid, first + HALF, ACT, IN, HALF
        )
        return whole(plain, more), whole(along, more_along)
    c = first + tl.arange(0, BLOCK)
    live = exist(c, IN, BLOCK)
    at = pixel[:, None] * IN + c[None, :]
    mask = valid[:, None] & live[None, :]
    scale, shift, mean, inverse = (
        tl.load(affine_ptr + c, live, other=0.0),
        tl.load(affine_ptr + IN + c, live, other=0.0),
        tl.load(affine_ptr + 2 * IN + c, live, other=0.0),
        tl.load(affine_ptr + 3 * IN + c, live, other=0.0),
    )
    raw = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    du = narrow(g * slope(raw * scale[None, :] + shift[None, :], ACT), dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + at, du, mask)
    du = tl.where(valid[:, None], du.to(tl.float32), 0.0)
    return tl.sum(du, 0), tl.sum(du * (raw - mean[None, :]), 0) * inverse


@triton.jit
def dgrad(
    pid, fit, fits, H, W, x_ptr, affine_ptr, weight_ptr, weights, dy_ptr, dx_ptr,
    side_du_ptr, side_y_ptr, side_pull_ptr, side_weight_ptr, side_weights, add_ptr,
    splits, shares_ptr, arrivals_ptr, parts_ptr, counters_ptr, pull_ptr, dgamma_ptr, dbeta_ptr,
    parameters, IN: tl.constexpr, OUT: tl.constexpr, SIDE: tl.constexpr, ACT: tl.constexpr,
    KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr,
    PAD: tl.constexpr, PIXELS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write dx at a tile of pixels and a block of channels, and what the norm before x needs.

    Args:
        pid: Which split of which block of channels of which tile.
        fit: Which of the `fits` fits.
        H: Rows of the input.
        W: Its columns.
        x_ptr: [F, H, W, IN].
        affine_ptr: [F, 4, IN] float32, or None where x is the value.
        weight_ptr: [F, groups, groups, K, K, IN, OUT], fits `weights` elements apart; without
            groups where there is one.
        dy_ptr: The gradient of the convolution's result.
        dx_ptr: [F, H, W, IN], written.
        side_du_ptr: Of a 1x1 convolution of the same x, [F, H, W, SIDE], or None; with `side_y_ptr`
            and `side_pull_ptr` see `norm.load_gradient`.
        side_weight_ptr: [F, IN, SIDE], fits `side_weights` elements apart.
        add_ptr: [F, H, W, IN], added to the gradient of x's value; or None.
        splits: Programs that share a sum; see `conv_split`, also for the next two, which are None
            where each sum has but one.
        parts_ptr: For this and all that follows see `norm.finish_sums`; None where dx is the
            gradient of x's value.
        PIXELS: Of a tile.
        BLOCK_I: Channels of x in a block.
        BLOCK_O: Channels of dy in one product.
    """
    GROUPS: tl.constexpr = 1 if KIND == "conv" else 2
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    EDGE: tl.constexpr = _edge(KIND, K, BEFORE)
    # In the ring a thread keeps where each pixel lies that it loads from: fewer channels, fewer
    # pixels. A large tile has no registers for more, save with four warps to a product of a folded
    # kind.
    FULL: tl.constexpr = PIXELS * BLOCK_I < 16384 or (KIND != "conv" and BLOCK_O >= 64)
    LESS_O: tl.constexpr = BLOCK_O if FULL else max(16, BLOCK_O // 2)
    LOW: tl.constexpr = _ring(EDGE, S)[0]
    HIGH: tl.constexpr = _ring(EDGE, S)[1]
    blocks = tl.cdiv(IN, BLOCK_I)
    down, across = tl.cdiv(H, S), tl.cdiv(W, S)
    # Rows (columns) of one parity: those before, inside and behind the ring's hole.
    top, left = tl.minimum(down, LOW), tl.minimum(across, LOW)
    hole_y, hole_x = tl.maximum(down - LOW - HIGH, 0), tl.maximum(across - LOW - HIGH, 0)
    right = across - left - hole_x
    ends, hole = (down - hole_y) * across, hole_y * hole_x
    ring = down * across - hole
    ring_tiles, hole_tiles = tl.cdiv(ring, PIXELS), tl.cdiv(hole, PIXELS)
    tiles = S * S * (ring_tiles + hole_tiles)

    job, split = pid // splits, pid % splits
    tile, c = job // blocks, job % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = tile >= S * S * ring_tiles
    place = tl.where(inside, tile - S * S * ring_tiles, tile)
    sharing = tl.maximum(tl.where(inside, hole_tiles, ring_tiles), 1)  # tiles of a parity
    parity, begin = place // sharing, place % sharing * PIXELS
    odd_y, odd_x = parity // S, parity % S
    low_y, high_y, low_x, high_x = False, False, False, False
    if not inside:
        last = tl.minimum(begin + PIXELS, ring) - 1
        low_y, high_y = begin < top * across, (begin < ends) & (last >= top * across)
        one = (begin // across == last // across) & (last < ends)  # line
        low_x = (not one) | (begin % across < left)
        high_x = (not one) | (last % across >= across - right)
        if hole_y == 0:
            low_y, high_y = True, True
        if hole_x == 0:
            low_x, high_x = True, True

    far = fit.to(tl.int64)
    dy_ptr += far * (GROUPS * members(H, KIND, K, S)) * (GROUPS * members(W, KIND, K, S)) * OUT
    weight_ptr += far * weights
    first_y, first_x = (odd_y + BEFORE) % S, (odd_x + BEFORE) % S
    # Two loops, one of them empty: in two branches each would have shared memory of its own. Where
    # the pixels lie is found for each, and once more: kept over a loop it would take registers.
    g = tl.zeros([PIXELS, BLOCK_I], tl.float32)
    y, x = tl.zeros([PIXELS], tl.int32), tl.zeros([PIXELS], tl.int32)
    if inside:
        y, x = _in_hole(begin, top, left, hole_y, hole_x, PIXELS)
    g = _sum(
        g, split, splits, inside, dy_ptr, weight_ptr, y - top, x - left, top * S + odd_y,
        left * S + odd_x, first_y, first_x, low_y, low_x, high_y, high_x, c, H, W, True, IN, OUT,
        KIND, K, S, BEFORE, PAD, BLOCK_I, BLOCK_O, STAGES,
    )  # fmt: skip
    y, x = tl.zeros([PIXELS], tl.int32), tl.zeros([PIXELS], tl.int32)
    if not inside:
        y, x = _in_ring(begin, down, across, top, left, hole_y, hole_x, PIXELS)
    g = _sum(
        g, split, splits, not inside, dy_ptr, weight_ptr, y, x, odd_y, odd_x, first_y, first_x,
        low_y, low_x, high_y, high_x, c, H, W, False, IN, OUT, KIND, K, S, BEFORE, PAD, BLOCK_I,
        LESS_O, STAGES,
    )  # fmt: skip

    complete = True
    if shares_ptr is not None:
        own_job = fit * tiles * blocks + job
        complete = hand_in(g, own_job, split, splits, shares_ptr, arrivals_ptr)
    if complete:
        if shares_ptr is not None:
            g = add_up(g, own_job, splits, shares_ptr)
        if inside:
            y, x = _in_hole(begin, top, left, hole_y, hole_x, PIXELS)
            pixel = (y * S + odd_y) * W + x * S + odd_x
        else:
            y, x = _in_ring(begin, down, across, top, left, hole_y, hole_x, PIXELS)
            there = (y * S + odd_y < H) & (x * S + odd_x < W)
            pixel = tl.where(there, (y * S + odd_y) * W + x * S + odd_x, -1)
        valid = (pixel >= 0) & (begin + tl.arange(0, PIXELS) < tl.where(inside, hole, ring))
        live = exist(c, IN, BLOCK_I)
        if side_du_ptr is not None:
            BLOCK_S: tl.constexpr = max(16, triton.next_power_of_2(SIDE))
            s = tl.arange(0, BLOCK_S)
            dy = load_gradient(
                side_du_ptr + far * H * W * SIDE, side_y_ptr + far * H * W * SIDE,
                side_pull_ptr + fit * 3 * SIDE, pixel, valid, s, SIDE,
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
        if add_ptr is not None:
            g += tl.load(add_ptr + far * H * W * IN + at, mask, other=0.0).to(tl.float32)
        if pull_ptr is None:
            tl.store(dx_ptr + at, narrow(g, DTYPE), mask)
        else:
            own_ptr = affine_ptr + fit * 4 * IN
            lane = job % blocks * BLOCK_I
            plain, along = _activated(
                g, x_ptr, dx_ptr, own_ptr, pixel, valid, lane, ACT, IN, BLOCK_I
            )
            finish_sums(
                plain, along, c, tile, tiles, fit, fits, H * W, parts_ptr, counters_ptr, affine_ptr,
                pull_ptr, dgamma_ptr, dbeta_ptr, parameters, IN,
            )  # fmt: skip
