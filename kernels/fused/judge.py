"""A reading: the statistics of each fit, what its guard and its stopping rules make of them.

All is decided on the device, so that the host need not wait: it learns of a reading when it comes
by, and comes to the same decisions by itself. Hence they are taken in float64, as Python takes
them; `engine/guard.py` and `engine/stopping.py` say what they are. A reading is taken of a fit
whose iteration is due for one; of all others nothing is changed.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.launch import Allocator, Launch, size
from flashdip.kernels.fused.rows import row_of, sum_rows, sum_shapes
from flashdip.kernels.fused.step import mix

_ELEMENTS = 1024  # of an image that one program takes in
_SAMPLES = 256  # of the window
_WIDTH = 8  # of a row of sums

BOARD = (
    *("iteration", "loss", "residual", "noise", "windowed_variance", "moving_variance"),
    *("squared_error", "weights", "readings"),
)
BOOKS = (
    *("stopped", "loss", "good_iteration", "in_a_row", "failed_at", "total"),
    *("windowed", "windowed_at", "moving", "moving_at", "readings"),
)
_BOARD, _BOOKS = tl.constexpr(len(BOARD)), tl.constexpr(len(BOOKS))
_INFINITY = tl.constexpr(float("inf"))
_ROOT = tl.constexpr(0.5**0.5)
_DENSITY = tl.constexpr((2 * math.pi) ** -0.5)


class Rules(NamedTuple):
    """When a reading is due, and what guard and rules go by; see `FitConfig`.

    Attributes:
        every: Iterations between two readings.
        iterations: The last of which is read, too, and ends the fit.
        retries: How often a fit may go back in a row.
        jump: Growth of the loss that is a divergence.
        careful: Iterations at a smaller rate after one.
        discrepancy: Share of the noise that ends the fit; None: no such rule.
        start: Variances before this iteration do not count.
        patience: Iterations without a smaller variance that end the fit.
    """

    every: int
    iterations: int
    retries: int
    jump: float
    careful: int
    discrepancy: float | None
    start: int
    patience: int

    def limits(self) -> Tensor:
        """Return what the kernel has to know in float64: jump, discrepancy, scales of the rate."""
        scales = [0.5**row for row in range(self.retries + 2)]
        share = math.nan if self.discrepancy is None else self.discrepancy
        return torch.tensor([self.jump, share, *scales], dtype=torch.float64)


class State(NamedTuple):
    """What guard and rules remember, [F] or [F, fields] each.

    Attributes:
        counters: Iterations done, int32; set back where a fit goes back.
        keys: `noise.key` of each fit, int64.
        prefixes: The same before the number of retries is absorbed, int64.
        rate_scale: float32.
        books: `BOOKS`, float64.
        actions: What is to be done with each fit's state, see `keep`, int32, written.
        board: `BOARD`, float64, written.
    """

    counters: Tensor
    keys: Tensor
    prefixes: Tensor
    rate_scale: Tensor
    books: Tensor
    actions: Tensor
    board: Tensor


class Observed(NamedTuple):
    """What the statistics are taken of; all float32 unless said otherwise.

    Attributes:
        image: Averaged output, [F, C, h, w], to be divided by `divisors`.
        ideal: What would be measured of that but for the mask, [F, ...], to be divided likewise.
        mask: Factor on it, like `target`; or None.
        target: What was measured, [F, ...].
        measured: Which entries of it were, 1 or 0.
        truth: [F, C, h, w]; NaN where it is unknown.
        sigma: Of the noise, [F]; NaN where it is unknown.
        clipped: Whether noise was clipped, [F] int32.
        divisors: Of the image after so many iterations, [iterations + 1].
        loss: [F].
        parameters: [F, P].
        window: [length, F, n]; or None.
        moving_variance: [F]; or None.
    """

    image: Tensor
    ideal: Tensor
    mask: Tensor | None
    target: Tensor
    measured: Tensor
    truth: Tensor
    sigma: Tensor
    clipped: Tensor
    divisors: Tensor
    loss: Tensor
    parameters: Tensor
    window: Tensor | None
    moving_variance: Tensor | None


@triton.jit
def _distribution(t):
    return 0.5 * (1 + tl.erf(t * _ROOT))  # under the interpreter a constant must not come first


@triton.jit
def _clipped_variance(x, sigma):
    """Return what `engine/noise_level.py` does; sigma is a scalar."""
    x = tl.minimum(tl.maximum(x, 0.0), 1.0)
    spread = tl.maximum(sigma, 1e-30)
    a = -tl.minimum(x / spread, 40.0)  # beyond, the distribution is 0 or 1
    b = tl.minimum((1 - x) / spread, 40.0)
    below, above = _distribution(a), _distribution(-b)
    inside = 1 - below - above
    inside += (a * tl.exp(-0.5 * a * a) - b * tl.exp(-0.5 * b * b)) * _DENSITY
    return sigma * sigma * inside + x * x * below + (1 - x) * (1 - x) * above


@triton.jit
def _search(value, best_ptr, judged, now, start, patience):
    """Take one reading into a search for the least variance: is it one, does it end the fit?"""
    best, at = tl.load(best_ptr), tl.load(best_ptr + 1)
    counts = judged & (now >= start) & (value == value)
    better = counts & (value < best)
    ended = counts & (value >= best) & (now - at >= patience)
    tl.store(best_ptr, tl.where(better, value, best))
    tl.store(best_ptr + 1, tl.where(better, now, at))
    return better, ended


@triton.jit
def _judge(
    book_ptr, limits_ptr, board_ptr, counter_ptr, key_ptr, prefix_ptr, scale_ptr, action_ptr,
    iterations, retries, careful, start, patience, WINDOWED: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """Judge what stands on the board."""
    now, loss, residual = tl.load(board_ptr), tl.load(board_ptr + 1), tl.load(board_ptr + 2)
    known, good = tl.load(book_ptr + 1), tl.load(book_ptr + 2)
    row, failed_at, total = tl.load(book_ptr + 3), tl.load(book_ptr + 4), tl.load(book_ptr + 5)
    sound = (tl.abs(loss) < _INFINITY) & (tl.abs(residual) < _INFINITY)
    sound = sound & (tl.load(board_ptr + 7) < _INFINITY)
    sound = sound & (loss <= tl.load(limits_ptr) * known)
    calm = sound & (now >= failed_at + careful)
    row = tl.where(sound, tl.where(calm, 0.0, row), row + 1)
    given_up = (sound == 0) & (row > retries)
    again = (sound == 0) & (row <= retries)
    total = tl.where(again, total + 1, total)
    tl.store(book_ptr + 1, tl.where(sound, loss, known))
    tl.store(book_ptr + 2, tl.where(sound, now, good))
    tl.store(book_ptr + 3, row)
    tl.store(book_ptr + 4, tl.where(sound, failed_at, now))
    tl.store(book_ptr + 5, total)
    scale = tl.load(limits_ptr + 2 + row.to(tl.int32)).to(tl.float32)
    tl.store(scale_ptr, tl.where(calm | again, scale, tl.load(scale_ptr)))
    tl.store(key_ptr, mix(tl.load(prefix_ptr), total.to(tl.int64)))
    tl.store(counter_ptr, tl.where(sound, now, good).to(tl.int32))

    selected = sound & (residual <= tl.load(limits_ptr + 1) * tl.load(board_ptr + 3))
    judged = sound & (selected == 0)
    stopped = selected | given_up | (sound & (now >= iterations))
    if WINDOWED:
        value = tl.load(board_ptr + 4)
        better, ended = _search(value, book_ptr + 6, judged, now, start, patience)
        selected, stopped = selected | better, stopped | ended
    if MOVING:
        value = tl.load(board_ptr + 5)
        better, ended = _search(value, book_ptr + 8, judged, now, start, patience)
        stopped = stopped | ended
        if not WINDOWED:
            selected = selected | better
    tl.store(book_ptr, tl.where(stopped, 1.0, 0.0).to(tl.float64))
    action = tl.where(sound, 1, 2)
    if WINDOWED or MOVING:
        action += tl.where(selected, 4, 0)
    tl.store(action_ptr, action)


@triton.jit(do_not_specialize=["count", "entries", "length", "samples", "every", "iterations",
                               "retries", "careful", "start", "patience"])  # fmt: skip
def _read_kernel(
    image_ptr, ideal_ptr, mask_ptr, target_ptr, measured_ptr, truth_ptr, sigma_ptr, clipped_ptr,
    divisors_ptr, loss_ptr, parameters_ptr, window_ptr, moving_ptr, counters_ptr, keys_ptr,
    prefixes_ptr, scale_ptr, books_ptr, actions_ptr, board_ptr, limits_ptr, rows_ptr, arrived_ptr,
    P, count, entries, length, samples, every, iterations, retries, careful, start, patience,
    unknown, BLOCK: tl.constexpr, SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    fit, fits = tl.program_id(1), tl.num_programs(1)
    base = fit.to(tl.int64)
    books_ptr += fit * _BOOKS
    iteration = tl.load(counters_ptr + fit)
    due = (iteration % every == 0) | (iteration == iterations)
    if due & (iteration > 0) & (tl.load(books_ptr) == 0):
        divisor = tl.load(divisors_ptr + iteration)
        sigma = tl.load(sigma_ptr + fit)
        at = program * BLOCK + tl.arange(0, BLOCK)
        of, valid = base * entries + at, at < entries
        ideal = tl.load(ideal_ptr + of, valid, other=0.0) / divisor
        if mask_ptr is not None:
            ideal *= tl.load(mask_ptr + of, valid, other=0.0)
        off = tl.where(valid, ideal - tl.load(target_ptr + of, valid, other=0.0), 0.0)
        seen = tl.load(measured_ptr + of, valid, other=0.0)
        level = tl.where(
            tl.load(clipped_ptr + fit) != 0, _clipped_variance(ideal, sigma), sigma * sigma
        )
        row = row_of(rows_ptr, program, programs, fit, WIDTH)
        tl.store(row, tl.sum(off * off))
        tl.store(row + 1, tl.sum(level * seen))
        tl.store(row + 2, tl.sum(seen))
        of, valid = base * count + at, at < count
        image = tl.load(image_ptr + of, valid, other=0.0) / divisor
        off = tl.where(valid, image - tl.load(truth_ptr + of, valid, other=0.0), 0.0)
        tl.store(row + 3, tl.sum(off * off))
        live = at < P
        parameters = tl.load(parameters_ptr + base * P + at, live, other=0.0)
        tl.store(row + 5, tl.sum(parameters * parameters))
        if window_ptr is not None:
            # About the first output, from which the others differ little: no digits are lost.
            at = program * SAMPLES + tl.arange(0, SAMPLES)
            ring = window_ptr + base * samples + at
            first = tl.load(ring, at < samples, other=0.0)
            plain = tl.zeros([SAMPLES], tl.float32)
            squares = tl.zeros([SAMPLES], tl.float32)
            for begin in range(0, length, 8):
                j = begin + tl.arange(0, 8)
                there = (j < length)[:, None] & (at < samples)[None, :]
                place = ring[None, :] + (j.to(tl.int64) * fits * samples)[:, None]
                apart = tl.where(there, tl.load(place, there, other=0.0) - first[None, :], 0.0)
                plain += tl.sum(apart, 0)
                squares += tl.sum(apart * apart, 0)
            plain /= length
            tl.store(row + 4, tl.sum(tl.maximum(squares / length - plain * plain, 0.0)))
        last, total_ptr = sum_rows(rows_ptr, arrived_ptr, program, programs, fit, WIDTH)
        if last:
            board_ptr += fit * _BOARD
            entries_seen = tl.load(total_ptr + 2, cache_modifier=".cg")
            residual = tl.sqrt(tl.load(total_ptr, cache_modifier=".cg") / entries_seen)
            noise = tl.sqrt(tl.load(total_ptr + 1, cache_modifier=".cg") / entries_seen)
            noise += 0 * sigma  # unknown where that is
            tl.store(board_ptr, iteration.to(tl.float64))
            tl.store(board_ptr + 1, tl.load(loss_ptr + fit).to(tl.float64))
            tl.store(board_ptr + 2, residual.to(tl.float64))
            tl.store(board_ptr + 3, noise.to(tl.float64))
            if window_ptr is not None:
                variance = tl.load(total_ptr + 4, cache_modifier=".cg") / samples
                variance = tl.where(iteration >= length, variance, unknown)
                tl.store(board_ptr + 4, variance.to(tl.float64))
            if moving_ptr is not None:
                tl.store(board_ptr + 5, tl.load(moving_ptr + fit).to(tl.float64))
            error = tl.load(total_ptr + 3, cache_modifier=".cg") / count
            tl.store(board_ptr + 6, error.to(tl.float64))
            readings = tl.load(books_ptr + 10) + 1
            tl.store(books_ptr + 10, readings)
            weights = tl.load(total_ptr + 5, cache_modifier=".cg")
            tl.store(board_ptr + 7, weights.to(tl.float64))
            tl.store(board_ptr + 8, readings)
            tl.debug_barrier()  # the board is written
            _judge(
                books_ptr, limits_ptr, board_ptr, counters_ptr + fit, keys_ptr + fit,
                prefixes_ptr + fit, scale_ptr + fit, actions_ptr + fit, iterations, retries,
                careful, start, patience, window_ptr is not None, moving_ptr is not None,
            )  # fmt: skip
    elif program == 0:
        tl.store(actions_ptr + fit, 0)


def read(
    name: str, of: Observed, state: State, rules: Rules, limits: Tensor, memory: Allocator
) -> Launch:
    """Take a reading of each fit that is due for one, and judge it.

    Args:
        of: What the statistics are taken of.
        state: What is decided.
        rules: By what.
        limits: `Rules.limits`, on the device.
    """
    fits, count, entries = len(of.image), of.image[0].numel(), of.target[0].numel()
    samples = 0 if of.window is None else of.window.shape[2]
    largest = max(count, entries, of.parameters.shape[1])
    programs = max(triton.cdiv(largest, _ELEMENTS), triton.cdiv(samples, _SAMPLES))
    rows, arrived = sum_shapes(fits, programs, _WIDTH)
    return Launch(
        name,
        _read_kernel,
        (programs, fits, 1),
        {
            "image_ptr": of.image,
            "ideal_ptr": of.ideal,
            "mask_ptr": of.mask,
            "target_ptr": of.target,
            "measured_ptr": of.measured,
            "truth_ptr": of.truth,
            "sigma_ptr": of.sigma,
            "clipped_ptr": of.clipped,
            "divisors_ptr": of.divisors,
            "loss_ptr": of.loss,
            "parameters_ptr": of.parameters,
            "window_ptr": of.window,
            "moving_ptr": of.moving_variance,
            "counters_ptr": state.counters,
            "keys_ptr": state.keys,
            "prefixes_ptr": state.prefixes,
            "scale_ptr": state.rate_scale,
            "books_ptr": state.books,
            "actions_ptr": state.actions,
            "board_ptr": state.board,
            "limits_ptr": limits,
            "rows_ptr": memory.share(rows, torch.float32),
            "arrived_ptr": memory.keep(arrived, torch.int32),
            "P": of.parameters.shape[1],
            "count": count,
            "entries": entries,
            "length": 0 if of.window is None else len(of.window),
            "samples": samples,
            "every": rules.every,
            "iterations": rules.iterations,
            "retries": rules.retries,
            "careful": rules.careful,
            "start": rules.start,
            "patience": rules.patience,
            "unknown": math.nan,
        },
        {"BLOCK": _ELEMENTS, "SAMPLES": _SAMPLES, "WIDTH": _WIDTH},
        flops=40 * fits * entries + 5 * size(of.window) // 4,
        bytes=size(of.image, of.ideal, of.mask, of.target, of.measured, of.truth, of.window)
        + size(of.parameters),
    )
