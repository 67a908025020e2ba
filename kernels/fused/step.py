"""What frames a step: the perturbation of the network's input, and Adam on the flat parameters.

Both know by themselves which step it is, from a counter per fit on the device that the last program
of Adam advances: a captured graph of launches can be replayed as it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels import noise
from flashdip.kernels.fused.device import last_to_arrive, narrow
from flashdip.kernels.fused.launch import Allocator, Launch, size

BLOCK = 1024  # parameters that one program updates
_ELEMENTS = 4096  # of the input that one program perturbs
_TABLE = tl.constexpr(noise.TABLE_SIZE)
_ALIGNMENT = tl.constexpr(noise.ALIGNMENT)
_PRIME = tl.constexpr((1 << 31) - 1)


class Sum(NamedTuple):
    """Where the gradient of a block of parameters lies: gradient[i] of fit f is the sum over
    j < parts of arena[offset + f fits + j stride + i]; beyond `live` of them there is none.
    """

    offset: int
    parts: int = 1
    stride: int = 0
    fits: int = 0
    live: int = BLOCK


def schedule(rates: Sequence[float], betas: tuple[float, float]) -> Tensor:
    """Return what Adam needs to know of each step, [steps, 2] float32 on the CPU.

    Args:
        rates: Learning rate of each step, from the first one.
        betas: Decay of the first and second moment.

    Returns:
        For step t: rate / (1 - beta1^t) and 1 / sqrt(1 - beta2^t).
    """
    t = torch.arange(1, len(rates) + 1, dtype=torch.float64)
    first, second = (1 - beta**t for beta in betas)
    rate = torch.tensor(rates, dtype=torch.float64) / first
    return torch.stack([rate, second.rsqrt()], 1).float()


@triton.jit(do_not_specialize=["steps"])
def _adam_kernel(
    parameters_ptr, copies_ptr, moment1_ptr, moment2_ptr, arena_ptr, sums_ptr, schedule_ptr,
    counters_ptr, scale_ptr, arrived_ptr, P, steps, unscale, share1, share2, eps,
    ALIGNED: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    sums_ptr += tl.program_id(0) * 6
    block, offset = tl.load(sums_ptr), tl.load(sums_ptr + 1)
    parts, stride = tl.load(sums_ptr + 2).to(tl.int32), tl.load(sums_ptr + 3).to(tl.int32)
    fits, live = tl.load(sums_ptr + 4), tl.load(sums_ptr + 5)
    if ALIGNED:
        offset, stride = tl.multiple_of(offset, 4), tl.multiple_of(stride, 4)
        fits = tl.multiple_of(fits, 4)
    i = tl.arange(0, BLOCK)
    arena_ptr += fit.to(tl.int64) * fits + offset
    gradient = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, TOGETHER):
        j = first + tl.arange(0, TOGETHER)
        part = tl.load(arena_ptr + (j * stride)[:, None] + i[None, :], (j < parts)[:, None], 0.0)
        gradient += tl.sum(part, 0)
    gradient = tl.where(i < live, gradient * unscale, 0.0)  # beyond lies what is another's

    step = tl.load(counters_ptr + fit)
    schedule_ptr += 2 * tl.minimum(step, steps - 1)
    rate = tl.load(schedule_ptr) * tl.load(scale_ptr + fit)
    correction = tl.load(schedule_ptr + 1)
    at = fit.to(tl.int64) * P + block * BLOCK + i
    moment1 = tl.load(moment1_ptr + at)
    moment1 += share1 * (gradient - moment1)
    moment2 = tl.load(moment2_ptr + at)
    moment2 += share2 * (gradient * gradient - moment2)
    updated = tl.load(parameters_ptr + at) - rate * moment1 / (tl.sqrt(moment2) * correction + eps)
    tl.store(moment1_ptr + at, moment1)
    tl.store(moment2_ptr + at, moment2)
    tl.store(parameters_ptr + at, updated)
    if copies_ptr is not None:
        tl.store(copies_ptr + at, narrow(updated, copies_ptr.dtype.element_ty))
    if last_to_arrive(arrived_ptr + fit, tl.num_programs(0)):
        tl.store(counters_ptr + fit, step + 1)


def adam(
    name: str,
    parameters: Tensor,
    copies: Tensor | None,
    moment1: Tensor,
    moment2: Tensor,
    arena: Tensor,
    sums: Sequence[Sum],
    schedule: Tensor,
    counters: Tensor,
    scale: Tensor,
    memory: Allocator,
    *,
    betas: tuple[float, float],
    eps: float,
    loss_scale: float = 1.0,
    gradients: Sequence[Tensor] = (),
) -> Launch:
    """Sum the gradients, update parameters and moments in place, advance the counters.

    Adam as in Kingma and Ba (2015), with PyTorch's place for eps; see `OpSet.adam`.

    Args:
        parameters: [F, P] float32, P a multiple of BLOCK.
        copies: Written: the parameters in the storage type, [F, P]; None where that is float32.
        moment1: [F, P] float32.
        moment2: [F, P] float32.
        arena: Gradients times `loss_scale`, [G] float32, which may be a window on more than those.
        sums: Where the gradient of each block of BLOCK parameters lies, P / BLOCK of them. A block
            that is not full is read in full; its other parameters stay as they are.
        schedule: [steps, 2] float32; see the function of that name. Its last row serves for all
            steps beyond it.
        counters: Steps done, [F] int32.
        scale: Factor on the learning rate, [F] float32.
        betas: Decay of the first and second moment.
        eps: Added to the root of the corrected second moment.
        loss_scale: Factor on the gradients.
        gradients: What of the arena is read.
    """
    fits, count = parameters.shape
    assert count == BLOCK * len(sums)
    assert all(
        s.offset + (fits - 1) * s.fits + (s.parts - 1) * s.stride + BLOCK <= len(arena)
        for s in sums
    )
    # Long sums start first, so that none is left alone at the end.
    rows = sorted(((b, *s) for b, s in enumerate(sums)), key=lambda row: -row[2])
    table = memory.keep((len(rows), 6), torch.int64).copy_(torch.tensor(rows))
    added = fits * BLOCK * sum(s.parts for s in sums)
    return Launch(
        name,
        _adam_kernel,
        (len(rows), fits, 1),
        {
            "parameters_ptr": parameters,
            "copies_ptr": copies,
            "moment1_ptr": moment1,
            "moment2_ptr": moment2,
            "arena_ptr": arena,
            "sums_ptr": table,
            "schedule_ptr": schedule,
            "counters_ptr": counters,
            "scale_ptr": scale,
            "arrived_ptr": memory.keep((fits,), torch.int32),
            "P": count,
            "steps": len(schedule),
            "unscale": 1 / loss_scale,
            "share1": 1 - betas[0],
            "share2": 1 - betas[1],
            "eps": eps,
        },
        {
            "ALIGNED": all(n % 4 == 0 for s in sums for n in (s.offset, s.stride, s.fits)),
            "TOGETHER": 8,
            "BLOCK": BLOCK,
        },
        warps=8,
        flops=added + 12 * parameters.numel(),
        bytes=4 * added + 2 * size(parameters, moment1, moment2) + size(copies),
        within=tuple(gradients),
    )


@triton.jit
def mix(state, value):
    """Absorb a value, as in `flashdip.kernels.noise`."""
    x = (state + value + 0x2545F491) % _PRIME
    square = x * x % _PRIME
    return square * square % _PRIME * x % _PRIME


@triton.jit
def _perturb_kernel(
    z_ptr, out_ptr, table_ptr, keys_ptr, counters_ptr, count, std, ELEMENTS: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    state = mix(tl.load(keys_ptr + fit), tl.load(counters_ptr + fit).to(tl.int64) + 1)
    state = mix(mix(state, 0), 0)
    offset = (state % (_TABLE // _ALIGNMENT) * _ALIGNMENT).to(tl.int32)
    i = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    place = (offset + i) & (_TABLE - 1)  # mod T, a power of 2: no aligned run of draws is cut
    place = tl.max_contiguous(tl.multiple_of(place, _ALIGNMENT), _ALIGNMENT)
    at = fit.to(tl.int64) * count + i
    z = tl.load(z_ptr + at, i < count, other=0.0).to(tl.float32)
    out = z + std * tl.load(table_ptr + place).to(tl.float32)
    tl.store(out_ptr + at, narrow(out, out_ptr.dtype.element_ty), i < count)


def perturb(
    name: str,
    z: Tensor,
    out: Tensor,
    table: Tensor,
    keys: Tensor,
    counters: Tensor,
    *,
    std: float,
) -> Launch:
    """Add the step's noise to the network's input; see `flashdip.kernels.noise`.

    Args:
        z: Network input, [F, H, W, C] in the storage type or float32.
        out: Written, [F, H, W, C] in the storage type.
        table: `noise.table()` as float16, [T].
        keys: `noise.key` of each fit, [F] int64.
        counters: Steps done, [F] int32: the noise is that of the next one.
        std: Standard deviation of the noise.
    """
    count = z[0].numel()
    return Launch(
        name,
        _perturb_kernel,
        (triton.cdiv(count, _ELEMENTS), len(z), 1),
        {
            "z_ptr": z,
            "out_ptr": out,
            "table_ptr": table,
            "keys_ptr": keys,
            "counters_ptr": counters,
            "count": count,
            "std": std,
        },
        {"ELEMENTS": _ELEMENTS},
        warps=4,
        flops=2 * z.numel(),
        bytes=size(z, out) + table.element_size() * min(table.numel(), z.numel()),
    )
