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

from flashdip.kernels.fused.device import EPS, last_to_arrive

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
def _merge(parts_ptr, count, c, C: tl.constexpr, live):
    """Merge `count` statistics (pixels, mean, squares about it), each [3, C], at channels c."""
    i = tl.arange(0, GROUP)
    pixels = tl.zeros([c.shape[0]], tl.float32)
    total = tl.zeros([c.shape[0]], tl.float32)
    for first in range(0, count, GROUP):
        at = parts_ptr + (first + i)[:, None] * 3 * C + c[None, :]
        mask = ((first + i) < count)[:, None] & live[None, :]
        n = tl.load(at, mask, other=0.0, cache_modifier=".cg")
        pixels += tl.sum(n, 0)
        total += tl.sum(n * tl.load(at + C, mask, other=0.0, cache_modifier=".cg"), 0)
    mean = total / tl.maximum(pixels, 1.0)
    squares = tl.zeros([c.shape[0]], tl.float32)
    for first in range(0, count, GROUP):
        at = parts_ptr + (first + i)[:, None] * 3 * C + c[None, :]
        mask = ((first + i) < count)[:, None] & live[None, :]
        n = tl.load(at, mask, other=0.0, cache_modifier=".cg")
        off = tl.load(at + C, mask, other=0.0, cache_modifier=".cg") - mean[None, :]
        own = tl.load(at + 2 * C, mask, other=0.0, cache_modifier=".cg")
        squares += tl.sum(own + n * off * off, 0)
    return pixels, mean, squares


@triton.jit
def _store(parts_ptr, c, C: tl.constexpr, live, first, second, third):
    tl.store(parts_ptr + c, first, live)
    tl.store(parts_ptr + C + c, second, live)
    tl.store(parts_ptr + 2 * C + c, third, live)


@triton.jit
def finish_forward(
    y, valid, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr,
    parameters, C: tl.constexpr,
):  # fmt: skip
    """Take the statistics of y; the last program of all writes the affine.

    Args:
        y: A tile of the convolution's result as it is stored, [pixels, channels] float32.
        valid: Which of the pixels exist, [pixels].
        c: The channels, consecutive from a multiple of their number, [channels]; those from C on do
            not count.
        tile: Which of the `tiles` tiles of this fit.
        fit: Which of the `fits` fits.
        parts_ptr: Scratch, float32; see `scratch_shapes`.
        counters_ptr: Scratch, int32, zero.
        gamma_ptr: Of the first fit, [C] float32.
        beta_ptr: Of the first fit, [C] float32.
        affine_ptr: [F, 4, C] float32, written.
        parameters: Distance in elements from one fit's gamma to the next one's.
    """
    ones = valid.to(tl.float32)
    pixels = tl.sum(ones, 0)
    mean = tl.sum(y * ones[:, None], 0) / tl.maximum(pixels, 1.0)
    off = (y - mean[None, :]) * ones[:, None]
    finish_moments(
        pixels, mean, tl.sum(off * off, 0), c, tile, tiles, fit, fits, parts_ptr, counters_ptr,
        gamma_ptr, beta_ptr, affine_ptr, parameters, C,
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
    pixels += tl.zeros([c.shape[0]], tl.float32)
    groups = tl.cdiv(tiles, GROUP)
    own_ptr = parts_ptr + fit * tiles * 3 * C
    groups_ptr = parts_ptr + (fits * tiles + fit * groups) * 3 * C
    _store(own_ptr + tile * 3 * C, c, C, live, pixels, mean, squares)

    blocks = tl.cdiv(C, c.shape[0])
    counters_ptr += (fit * blocks + tl.min(c) // c.shape[0]) * (groups + 1)
    group = tile // GROUP
    members = tl.minimum(GROUP, tiles - group * GROUP)
    if last_to_arrive(counters_ptr + 1 + group, members):
        pixels, mean, squares = _merge(own_ptr + group * GROUP * 3 * C, members, c, C, live)
        _store(groups_ptr + group * 3 * C, c, C, live, pixels, mean, squares)
        if last_to_arrive(counters_ptr, groups):
            pixels, mean, squares = _merge(groups_ptr, groups, c, C, live)
            inverse = tl.rsqrt(squares / tl.maximum(pixels, 1.0) + EPS)
            gamma = tl.load(gamma_ptr + fit * parameters + c, live, other=0.0)
            beta = tl.load(beta_ptr + fit * parameters + c, live, other=0.0)
            scale = gamma * inverse
            affine_ptr += fit * 4 * C
            tl.store(affine_ptr + c, scale, live)
            tl.store(affine_ptr + C + c, beta - mean * scale, live)
            tl.store(affine_ptr + 2 * C + c, mean, live)
            tl.store(affine_ptr + 3 * C + c, inverse, live)


@triton.jit
def finish_backward(
    du, y, valid, c, tile, tiles, fit, fits, pixels, parts_ptr, counters_ptr, affine_ptr, pull_ptr,
    dgamma_ptr, dbeta_ptr, parameters, C: tl.constexpr,
):  # fmt: skip
    """Sum du and du xhat; the last program of all writes the pull and the gradients.

    Args:
        du: A tile of the gradient before the activation as it is stored, [pixels, channels]
            float32.
        y: The convolution's result there, float32.
        valid: Which of the pixels exist, [pixels].
        c: The channels; see `finish_forward`, as for all that is not named here.
        pixels: Number of pixels of a fit's map.
        affine_ptr: [F, 4, C] float32, read.
        pull_ptr: [F, 3, C] float32, written.
        dgamma_ptr: Of the first fit, [C] float32, written; the next fit's is `parameters` on.
        dbeta_ptr: Likewise.
    """
    live = c < C
    mean = tl.load(affine_ptr + (fit * 4 + 2) * C + c, live, other=0.0)
    inverse = tl.load(affine_ptr + (fit * 4 + 3) * C + c, live, other=0.0)
    du = tl.where(valid[:, None], du, 0.0)
    xhat = tl.where(valid[:, None], (y - mean[None, :]) * inverse[None, :], 0.0)
    finish_sums(
        tl.sum(du, 0), tl.sum(du * xhat, 0), c, tile, tiles, fit, fits, pixels, parts_ptr,
        counters_ptr, affine_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, C,
    )  # fmt: skip


@triton.jit
def finish_sums(
    plain, along, c, tile, tiles, fit, fits, pixels, parts_ptr, counters_ptr, affine_ptr, pull_ptr,
    dgamma_ptr, dbeta_ptr, parameters, C: tl.constexpr,
):  # fmt: skip
    """Add up what each program summed; the last program writes the pull and the gradients.

    Args:
        plain: This program's sum of du, [channels] float32.
        along: Its sum of du xhat.
        tile: Which of the `tiles` programs of this fit; the rest as in `finish_backward`.
    """
    live = c < C
    groups = tl.cdiv(tiles, GROUP)
    own_ptr = parts_ptr + fit * tiles * 3 * C
    groups_ptr = parts_ptr + (fits * tiles + fit * groups) * 3 * C
    _store(own_ptr + tile * 3 * C, c, C, live, plain, along, plain)

    blocks = tl.cdiv(C, c.shape[0])
    counters_ptr += (fit * blocks + tl.min(c) // c.shape[0]) * (groups + 1)
    group = tile // GROUP
    members = tl.minimum(GROUP, tiles - group * GROUP)
    if last_to_arrive(counters_ptr + 1 + group, members):
        plain, along = _sum(own_ptr + group * GROUP * 3 * C, members, c, C, live)
        _store(groups_ptr + group * 3 * C, c, C, live, plain, along, plain)
        if last_to_arrive(counters_ptr, groups):
            plain, along = _sum(groups_ptr, groups, c, C, live)
            affine_ptr += fit * 4 * C
            scale = tl.load(affine_ptr + c, live, other=0.0)
            mean = tl.load(affine_ptr + 2 * C + c, live, other=0.0)
            inverse = tl.load(affine_ptr + 3 * C + c, live, other=0.0)
            tl.store(dgamma_ptr + fit * parameters + c, along, live)
            tl.store(dbeta_ptr + fit * parameters + c, plain, live)
            slope = -scale * inverse * along / pixels
            pull_ptr += fit * 3 * C
            tl.store(pull_ptr + c, scale, live)
            tl.store(pull_ptr + C + c, slope, live)
            tl.store(pull_ptr + 2 * C + c, -scale * plain / pixels - slope * mean, live)


@triton.jit
def _sum(parts_ptr, count, c, C: tl.constexpr, live):
    """Sum the first two rows of `count` parts, each [3, C], at channels c."""
    i = tl.arange(0, GROUP)
    first_row = tl.zeros([c.shape[0]], tl.float32)
    second_row = tl.zeros([c.shape[0]], tl.float32)
    for first in range(0, count, GROUP):
        at = parts_ptr + (first + i)[:, None] * 3 * C + c[None, :]
        mask = ((first + i) < count)[:, None] & live[None, :]
        first_row += tl.sum(tl.load(at, mask, other=0.0, cache_modifier=".cg"), 0)
        second_row += tl.sum(tl.load(at + C, mask, other=0.0, cache_modifier=".cg"), 0)
    return first_row, second_row
