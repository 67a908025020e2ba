"""Batch normalisation over (H, W) around a convolution: statistics forward, sums backward.

A convolution's programs hold their tile of results in registers. Each stores a tile's statistics;
the last program to arrive puts them together in a fixed order and writes what the consumers need:

    forward:   affine [F, 4, C]: scale, shift, mean, 1 / standard deviation;  u = y scale + shift
    backward:  pull [F, 3, C]: a, b, c with dy = a du + b y + c, from the sums of du and du xhat

With thousands of tiles a single last program would be busy for long, so tiles are put together in
groups of GROUP first, by the last of each group. Variances are merged as in Chan, Golub and LeVeque
(1979): nothing cancels where the mean is far from 0.
"""

import triton
import triton.language as tl

from flashdip.kernels.fused.device import EPS, exist, last_to_arrive, narrow

GROUP = tl.constexpr(32)


def scratch_shapes(fits: int, tiles: int, channels: int, block: int) -> tuple[int, int]:
    """Return how many float32 values and how many zeroed int32 counters a launch needs.

    Args:
        fits: Number of fits, F.
        tiles: Tiles of pixels per fit.
        channels: Channels, C.
        block: Channels a program holds.
    """
    groups = triton.cdiv(tiles, GROUP.value)
    counters = fits * triton.cdiv(channels, block) * (groups + 1)
    return fits * (tiles + groups) * 3 * channels, counters


@triton.jit
def collect(
    pixels, first, second, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, needed_ptrs,
    C: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Hand in what a program took of its tile; the last program has that of all tiles.

    Args:
        pixels: How many this program saw, float32.
        first: Their mean if MEANS, else a sum, [channels] float32.
        second: The sum of their squared distances from the mean if MEANS, else another sum.
        c: The channels, consecutive from a multiple of their number, [channels]; those from C on do
            not count.
        tile: Which of the `tiles` tiles of this fit.
        fit: Which of the `fits` fits.
        parts_ptr: Scratch, float32; see `scratch_shapes`.
        counters_ptr: Scratch, int32, zero.
        needed_ptrs: What the last program will need: a tuple of pointers, [channels] each, loaded
            on the way.

    Returns:
        Whether this is the last program of these channels; if so, `pixels`, `first`, `second` of
        all tiles, and what is needed.
    """
    groups = tl.cdiv(tiles, GROUP)
    group = tile // GROUP
    members = tl.minimum(GROUP, tiles - group * GROUP)
    tiles_ptr = parts_ptr + fit * tiles * 3 * C
    groups_ptr = parts_ptr + (fits * tiles + fit * groups) * 3 * C
    begin = tl.min(c, 0)
    counters_ptr += (fit * tl.cdiv(C, c.shape[0]) + begin // c.shape[0]) * (groups + 1)
    _hand_in(tiles_ptr + tile * 3 * C, pixels, first, second, c, C)
    last = tile < 0
    needed = ()
    for _ in tl.static_range(len(needed_ptrs)):
        needed += (tl.zeros([c.shape[0]], tl.float32),)  # type: ignore[assignment]
    if last_to_arrive(counters_ptr + 1 + group, members):
        needed = ()
        for i in tl.static_range(len(needed_ptrs)):
            needed += (tl.load(needed_ptrs[i], c < C, other=0.0),)  # type: ignore[assignment]
        pixels, first, second = _together(
            tiles_ptr + group * GROUP * 3 * C, members, begin, c, C, MEANS
        )
        last = groups == 1
        if groups > 1:
            _hand_in(groups_ptr + group * 3 * C, pixels, first, second, c, C)
            last = last_to_arrive(counters_ptr, groups)
            if last:
                pixels, first, second = pixels * 0, first * 0, second * 0
                for done in range(0, groups, GROUP):
                    more, more_first, more_second = _together(
                        groups_ptr + done * 3 * C, groups - done, begin, c, C, MEANS
                    )
                    if MEANS:
                        share = more / (pixels + more)
                        off = more_first - first
                        first += share * off
                        second += more_second + pixels * share * off * off
                    else:
                        first += more_first
                        second += more_second
                    pixels += more
    return last, pixels, first, second, needed


@triton.jit
def _hand_in(part_ptr, pixels, first, second, c, C: tl.constexpr):
    tl.store(part_ptr + c, pixels, c < C)
    tl.store(part_ptr + C + c, first, c < C)
    tl.store(part_ptr + 2 * C + c, second, c < C)


@triton.jit
def _together(parts_ptr, count, begin, c, C: tl.constexpr, MEANS: tl.constexpr):
    """Put parts together, each [3, C], the first `count` of them but GROUP at most.

    All are loaded at once: this is when everybody waits for one program.
    """
    i = tl.arange(0, GROUP)
    at = parts_ptr + i[:, None] * 3 * C + c[None, :]
    mask = (i < count)[:, None] & (c < C)[None, :]
    n = tl.load(parts_ptr + i * 3 * C + begin, i < count, other=0.0, cache_modifier=".cg")
    first = tl.load(at + C, mask, other=0.0, cache_modifier=".cg")
    second = tl.load(at + 2 * C, mask, other=0.0, cache_modifier=".cg")
    pixels = tl.sum(n, 0)
    if MEANS:
        mean = tl.sum(n[:, None] * first, 0) / tl.maximum(pixels, 1.0)
        off = first - mean[None, :]
        return pixels, mean, tl.sum(second + n[:, None] * off * off, 0)
    else:
        return pixels, tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def moments(y, valid):
    """Return the number of valid pixels of y [pixels, channels], their mean, and squares about it.

    Args:
        y: float32.
        valid: Which of the pixels exist, [pixels].
    """
    ones = valid.to(tl.float32)
    pixels = tl.sum(ones, 0)
    mean = tl.sum(y * ones[:, None], 0) / tl.maximum(pixels, 1.0)
    off = (y - mean[None, :]) * ones[:, None]
    return pixels, mean, tl.sum(off * off, 0)


@triton.jit
def finish_forward(
    y, valid, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr,
    parameters, C: tl.constexpr,
):  # fmt: skip
    """Take the statistics of y; the last program of all writes the affine.

    Args:
        y: A tile of the convolution's result as it is stored, [pixels, channels] float32.
        valid: Which of the pixels exist, [pixels].
        c: The channels; this and all that is not named here as in `collect`.
        gamma_ptr: Of the first fit, [C] float32.
        beta_ptr: Of the first fit, [C] float32.
        affine_ptr: [F, 4, C] float32, written.
        parameters: Distance in elements from one fit's gamma to the next one's.
    """
    pixels, mean, squares = moments(y, valid)
    finish_moments(
        pixels, mean, squares, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, gamma_ptr,
        beta_ptr, affine_ptr, parameters, C,
    )  # fmt: skip


@triton.jit
def finish_moments(
    pixels, mean, squares, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, gamma_ptr, beta_ptr,
    affine_ptr, parameters, C: tl.constexpr,
):  # fmt: skip
    """Merge the statistics that each program took; the last program writes the affine.

    Args:
        pixels: How many this program saw, float32.
        mean: Their mean, [channels] float32.
        squares: The sum of their squared distances from it.
        c: The channels; the rest as in `finish_forward`.
    """
    live = c < C
    at = fit * parameters + c
    last, pixels, mean, squares, needed = collect(
        pixels, mean, squares, c, tile, tiles, fit, fits, parts_ptr, counters_ptr,
        (gamma_ptr + at, beta_ptr + at), C, True,
    )  # fmt: skip
    if last:
        gamma, beta = needed
        inverse = tl.rsqrt(squares / tl.maximum(pixels, 1.0) + EPS)
        scale = gamma * inverse
        at = fit * 4 * C + c
        tl.store(affine_ptr + at, scale, live)
        tl.store(affine_ptr + C + at, beta - mean * scale, live)
        tl.store(affine_ptr + 2 * C + at, mean, live)
        tl.store(affine_ptr + 3 * C + at, inverse, live)


@triton.jit
def finish_sums(
    plain, along, c, tile, tiles, fit, fits, pixels, parts_ptr, counters_ptr, affine_ptr, pull_ptr,
    dgamma_ptr, dbeta_ptr, parameters, C: tl.constexpr,
):  # fmt: skip
    """Add up what each program summed; the last program writes the pull and the gradients.

    Args:
        plain: This program's sum of the gradient du before the activation, [channels] float32.
        along: Its sum of du xhat.
        c: The channels; this and all that is not named here as in `collect`.
        tile: Which of the `tiles` programs of this fit.
        pixels: Number of pixels of a fit's map.
        affine_ptr: [F, 4, C] float32, read.
        pull_ptr: [F, 3, C] float32, written.
        dgamma_ptr: Of the first fit, [C] float32, written; the next fit's is `parameters` on.
        dbeta_ptr: Likewise.
    """
    live = c < C
    of_affine = affine_ptr + fit * 4 * C + c
    last, _, plain, along, needed = collect(
        tl.full([], 0.0, tl.float32), plain, along, c, tile, tiles, fit, fits, parts_ptr,
        counters_ptr, (of_affine, of_affine + 2 * C, of_affine + 3 * C), C, False,
    )  # fmt: skip
    if last:
        scale, mean, inverse = needed
        tl.store(dgamma_ptr + fit * parameters + c, along, live)
        tl.store(dbeta_ptr + fit * parameters + c, plain, live)
        slope = -scale * inverse * along / pixels
        at = fit * 3 * C + c
        tl.store(pull_ptr + at, scale, live)
        tl.store(pull_ptr + C + at, slope, live)
        tl.store(pull_ptr + 2 * C + at, -scale * plain / pixels - slope * mean, live)


@triton.jit
def load_gradient(du_ptr, y_ptr, pull_ptr, pixel, exists, o, OUT: tl.constexpr):
    """Return dy as it would be stored, [pixels, channels], 0 where there is none.

    Args:
        du_ptr: Of the fit, [pixels, OUT]; `y_ptr` likewise, or None: then dy lies at `du_ptr`.
        pull_ptr: Of the fit, [3, OUT] float32: a, b, c with dy = a du + b y + c.
        pixel: Which pixels.
        exists: Whether they do.
        o: The channels, consecutive from a multiple of their number.
    """
    if y_ptr is not None:
        a, b, c = load_pull(pull_ptr, o, OUT)
        return pulled_gradient(du_ptr, y_ptr, a, b, c, pixel, exists, o, OUT)
    live = exist(o, OUT, o.shape[0])
    at, mask = pixel[:, None] * OUT + o[None, :], exists[:, None] & live[None, :]
    return tl.load(du_ptr + at, mask, other=0.0)


@triton.jit
def load_pull(pull_ptr, o, OUT: tl.constexpr):
    """Return a, b and c at the channels o; see `load_gradient`."""
    live = exist(o, OUT, o.shape[0])
    a = tl.load(pull_ptr + o, live, other=0.0)
    b = tl.load(pull_ptr + OUT + o, live, other=0.0)
    c = tl.load(pull_ptr + 2 * OUT + o, live, other=0.0)
    return a, b, c


@triton.jit
def pulled_gradient(du_ptr, y_ptr, a, b, c, pixel, exists, o, OUT: tl.constexpr):
    """Return dy where a, b and c are there already; see `load_gradient`."""
    live = exist(o, OUT, o.shape[0])
    at, mask = pixel[:, None] * OUT + o[None, :], exists[:, None] & live[None, :]
    du = tl.load(du_ptr + at, mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask, other=0.0).to(tl.float32)
    dy = tl.where(mask, a[None, :] * du + b[None, :] * y + c[None, :], 0.0)
    return narrow(dy, du_ptr.dtype.element_ty)
