"""Downsampling in front of the loss: what is left of the observation, and the way back.

The operator is that of `flashdip.kernels.resample`, separable: along each axis, row i of the result
sees rows i factor - before + t of the image through tap t, rows beyond the border being the
outermost ones. The way back is a gather too: each row of the image is seen by a short run of rows
of the result, and the weights with which it is are listed by the host. A run is longer than the
number of taps over the factor only where the border is repeated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels import resample
from flashdip.kernels.fused.launch import Allocator, Launch, size
from flashdip.kernels.fused.rows import row_of, sum_rows, sum_shapes
from flashdip.kernels.resample import Kernel

_PIXELS = 128  # of one program


@triton.jit(do_not_specialize=["h", "w", "count", "factor", "before"])
def _residual_kernel(
    image_ptr, target_ptr, residual_ptr, loss_ptr, taps_ptr, rows_ptr, counters_ptr, h, w, count,
    factor, before, TAPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    base = fit.to(tl.int64)
    wide, high = w // factor, h // factor
    at = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    valid = at < count
    x, y, plane = at % wide, at // wide % high, at // wide // high
    image_ptr += base * count * factor * factor
    small = tl.zeros([PIXELS], tl.float32)
    for t in range(TAPS):
        row = tl.minimum(tl.maximum(y * factor - before + t, 0), h - 1)
        along = tl.zeros([PIXELS], tl.float32)
        for s in tl.static_range(TAPS):
            column = tl.minimum(tl.maximum(x * factor - before + s, 0), w - 1)
            pixel = tl.load(image_ptr + (plane * h + row) * w + column, valid, other=0.0)
            along += tl.load(taps_ptr + s) * pixel
        small += tl.load(taps_ptr + t) * along
    if target_ptr is None:
        tl.store(residual_ptr + base * count + at, small, valid)
    else:
        residual = small - tl.load(target_ptr + base * count + at, valid, other=0.0)
        tl.store(residual_ptr + base * count + at, residual, valid)
        program, programs = tl.program_id(0), tl.num_programs(0)
        squares = tl.sum(tl.where(valid, residual * residual, 0.0))
        tl.store(row_of(rows_ptr, program, programs, fit, 1), squares)
        last, total_ptr = sum_rows(rows_ptr, counters_ptr, program, programs, fit, 1)
        if last:
            loss = tl.load(total_ptr, cache_modifier=".cg") / count.to(tl.float32)
            tl.store(loss_ptr + fit, loss)


def residual(
    name: str,
    image: Tensor,
    target: Tensor | None,
    residual: Tensor,
    loss: Tensor | None,
    kernel: Kernel,
    factor: int,
    memory: Allocator,
) -> Launch:
    """Downsample the image; subtract what was measured, if it is given.

    Args:
        image: [F, C, h, w] float32, sides multiples of the factor.
        target: What was measured, [F, C, h / factor, w / factor] float32; or None.
        residual: downsample(image) - target, written.
        loss: Mean square of the residual, [F] float32, written; None without a target.
        kernel: See `flashdip.kernels.resample`.
        factor: How many times smaller each side becomes.
    """
    fits, count = len(image), residual[0].numel()
    taps = torch.tensor(resample.taps(kernel, factor))
    programs = triton.cdiv(count, _PIXELS)
    rows, counters = sum_shapes(fits, programs, 1)
    return Launch(
        name,
        _residual_kernel,
        (programs, fits, 1),
        {
            "image_ptr": image,
            "target_ptr": target,
            "residual_ptr": residual,
            "loss_ptr": loss,
            "taps_ptr": copied(taps, memory),
            "rows_ptr": memory.share(rows, torch.float32),
            "counters_ptr": memory.keep(counters, torch.int32),
            "h": image.shape[2],
            "w": image.shape[3],
            "count": count,
            "factor": factor,
            "before": before(kernel, factor),
        },
        {"TAPS": len(taps), "PIXELS": _PIXELS},
        flops=4 * residual.numel() * factor * len(taps),  # it is separable: in two passes
        bytes=size(image, target, residual),
    )


@triton.jit(do_not_specialize=["h", "w", "count", "factor"])
def _adjoint_kernel(
    residual_ptr, dimage_ptr, first_y_ptr, weight_y_ptr, first_x_ptr, weight_x_ptr, h, w, count,
    factor, gain, RUN_Y: tl.constexpr, RUN_X: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(1).to(tl.int64)
    wide, high = w // factor, h // factor
    at = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    valid = at < count
    x, y, plane = at % w, at // w % h, at // w // h
    residual_ptr += base * (count // (factor * factor))
    first_y = tl.load(first_y_ptr + y, valid, other=0)
    first_x = tl.load(first_x_ptr + x, valid, other=0)
    total = tl.zeros([PIXELS], tl.float32)
    for t in range(RUN_Y):
        row = tl.minimum(first_y + t, high - 1)
        along = tl.zeros([PIXELS], tl.float32)
        for s in tl.static_range(RUN_X):
            seen = (plane * high + row) * wide + tl.minimum(first_x + s, wide - 1)
            weight = tl.load(weight_x_ptr + x * RUN_X + s, valid, other=0.0)
            along += weight * tl.load(residual_ptr + seen, valid, other=0.0)
        total += tl.load(weight_y_ptr + y * RUN_Y + t, valid, other=0.0) * along
    tl.store(dimage_ptr + base * count + at, gain * total, valid)


def adjoint(
    name: str,
    residual: Tensor,
    dimage: Tensor,
    kernel: Kernel,
    factor: int,
    memory: Allocator,
) -> Launch:
    """Compute the loss's gradient with respect to the image: 2 A' residual / numbers measured.

    Args:
        residual: [F, C, h / factor, w / factor] float32.
        dimage: [F, C, h, w] float32, written.
        kernel: See `flashdip.kernels.resample`.
        factor: As there.
    """
    fits, _, height, width = dimage.shape
    first_y, weight_y = runs(kernel, factor, height)
    first_x, weight_x = runs(kernel, factor, width)
    count = dimage[0].numel()
    return Launch(
        name,
        _adjoint_kernel,
        (triton.cdiv(count, _PIXELS), fits, 1),
        {
            "residual_ptr": residual,
            "dimage_ptr": dimage,
            "first_y_ptr": copied(first_y, memory),
            "weight_y_ptr": copied(weight_y, memory),
            "first_x_ptr": copied(first_x, memory),
            "weight_x_ptr": copied(weight_x, memory),
            "h": height,
            "w": width,
            "count": count,
            "factor": factor,
            "gain": 2 / residual[0].numel(),
        },
        {"RUN_Y": weight_y.shape[1], "RUN_X": weight_x.shape[1], "PIXELS": _PIXELS},
        flops=4 * residual.numel() * factor * len(resample.taps(kernel, factor)),
        bytes=size(residual, dimage),
    )


def before(kernel: Kernel, factor: int) -> int:
    """Return how many rows in front of the first block of pixels the first tap lies."""
    count = len(resample.taps(kernel, factor))
    return (count - (1 if kernel.startswith("gauss") else factor)) // 2


def runs(kernel: Kernel, factor: int, side: int) -> tuple[Tensor, Tensor]:
    """Return which rows of the result see each row of the image, and through what.

    Returns:
        The first of them, [side] int32, and the weights of the run that begins there, [side, run]
        float32; those that a shorter run leaves over are 0.
    """
    taps = torch.tensor(resample.taps(kernel, factor), dtype=torch.float64)
    small = torch.arange(side // factor)[:, None].expand(-1, len(taps))
    seen = small * factor - before(kernel, factor) + torch.arange(len(taps))
    seen = seen.clamp(0, side - 1).flatten()
    small = small.flatten()
    first = torch.full((side,), side).scatter_reduce(0, seen, small, "amin")
    first = torch.where(first == side, 0, first)  # rows that no tap sees
    place = small - first[seen]
    weights = torch.zeros(side, int(place.max()) + 1, dtype=torch.float64)
    weights.index_put_((seen, place), taps.repeat(side // factor), accumulate=True)
    return first.int(), weights.float()


def copied(values: Tensor, memory: Allocator) -> Tensor:
    """Return the values where launches find them."""
    return memory.keep(tuple(values.shape), values.dtype).copy_(values)
