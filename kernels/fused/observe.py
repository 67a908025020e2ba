"""The stopping statistics of a step, kept up on the device; they are read now and then.

The window holds the last outputs at some pixels in a ring, in which the counter of steps is the
place: like the step itself, this can be replayed. See `flashdip.engine.backends.observe`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import last_to_arrive
from flashdip.kernels.fused.launch import Allocator, Launch, size

_ELEMENTS = 2048  # of an output that one program takes in


@triton.jit(do_not_specialize=["count", "length", "samples"])
def _observe(
    output_ptr, sample_ptr, window_ptr, mean_ptr, variance_ptr, counters_ptr, parts_ptr,
    arrived_ptr, count, length, samples, rate, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    fit, fits = tl.program_id(1), tl.num_programs(1)
    i = program * BLOCK + tl.arange(0, BLOCK)
    output_ptr += fit.to(tl.int64) * count
    if window_ptr is not None:
        place = tl.load(counters_ptr + fit) % length
        at = tl.load(sample_ptr + i, i < samples, other=0)
        value = tl.load(output_ptr + at, i < samples, other=0.0)
        window_ptr += (place.to(tl.int64) * fits + fit) * samples
        tl.store(window_ptr + i, value, i < samples)
    if mean_ptr is not None:
        mean_ptr += fit.to(tl.int64) * count
        output = tl.load(output_ptr + i, i < count, other=0.0)
        mean = tl.load(mean_ptr + i, i < count, other=0.0)
        off = output - mean
        tl.store(mean_ptr + i, mean + rate * off, i < count)
        parts_ptr += fit * programs
        tl.store(parts_ptr + program, tl.sum(off * off, 0))
        if last_to_arrive(arrived_ptr + fit, programs):
            squares = tl.zeros([BLOCK], tl.float32)
            for first in range(0, programs, BLOCK):
                part = first + tl.arange(0, BLOCK)
                squares += tl.load(
                    parts_ptr + part, part < programs, other=0.0, cache_modifier=".cg"
                )
            variance = tl.load(variance_ptr + fit) + rate * (tl.sum(squares, 0) / count)
            tl.store(variance_ptr + fit, (1 - rate) * variance)


def observe(
    name: str,
    output: Tensor,
    counters: Tensor,
    memory: Allocator,
    *,
    window: Tensor | None,
    sample: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    rate: float,
) -> Launch:
    """Put the output into the window, and update its moving mean and variance.

    Args:
        output: Of this step, [F, C, H, W] float32.
        counters: Steps done before this one, [F] int32.
        window: [length, F, n] float32, one place of it written; or None.
        sample: Which values of an output enter it, [n] int64.
        mean: Moving mean, [F, C, H, W] float32, updated; or None.
        variance: Moving variance, [F] float32, updated.
        rate: Of the moving mean and variance.
    """
    fits, count = len(output), output[0].numel()
    samples = 0 if sample is None else len(sample)
    programs = triton.cdiv(count if mean is not None else samples, _ELEMENTS)
    return Launch(
        name,
        _observe,
        (programs, fits, 1),
        {
            "output_ptr": output,
            "sample_ptr": sample,
            "window_ptr": window,
            "mean_ptr": mean,
            "variance_ptr": variance,
            "counters_ptr": counters,
            "parts_ptr": None if mean is None else memory.share((fits, programs), torch.float32),
            "arrived_ptr": None if mean is None else memory.keep((fits,), torch.int32),
            "count": count,
            "length": 0 if window is None else len(window),
            "samples": samples,
            "rate": rate,
        },
        {"BLOCK": _ELEMENTS},
        flops=0 if mean is None else 7 * output.numel(),
        bytes=8 * fits * samples + size(sample) + (0 if mean is None else 3 * size(output)),
    )
