"""What the machine at hand can do at most, measured: a copy and a matrix product.

They are what shares of the roof are taken of, so they are the best of several samples: the median
would let a busy moment make everything else look good. On a CPU they are the best of several matrix
products too: what its cores share with others may slow a large one down, and the library for
matrix products may know its instructions less well than the one for convolutions does (MKL on
AMD: half the rate in float32).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from flashdip.bench.baselines import variant
from flashdip.bench.measure import clock
from flashdip.engine.backends.base import DTYPES

SAMPLES = 5
SAMPLE = 0.2  # seconds, about
COPIED = 1 << 28  # bytes: more than any cache holds
SIDES = {"cpu": (512, 2048)}  # of the matrices
SIDE = 8192  # elsewhere
CHANNELS, PIXELS = 128, 32  # of the convolution on a CPU: input and output, and a side


@dataclass(frozen=True)
class Ceilings:
    """What a device reached.

    Attributes:
        copy: Bytes a second, read and written, of a long copy.
        product: Operations a second of a matrix product, by precision.
    """

    copy: float
    product: dict[str, float]

    def record(self) -> dict[str, Any]:
        """Return them as plain values."""
        return asdict(self)


def ceilings(
    device: torch.device,
    precisions: Iterable[str],
    *,
    copied: int = COPIED,
    side: int | None = None,
    sample: float = SAMPLE,
) -> Ceilings:
    """Measure the ceilings of a device.

    Args:
        device: What is measured.
        precisions: Of matrix products: what activations will be stored in.
        copied: Bytes of the copy.
        side: Of the matrices and nothing else; None: what suits the device.
        sample: Seconds of a sample, about.
    """
    sides = (side,) if side else SIDES.get(device.type, (SIDE,))
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / _fastest(lambda: target.copy_(source), device, sample)
    product = {}
    for precision in precisions:
        works = [_matrices(each, device, precision) for each in sides]
        if device.type == "cpu" and side is None:
            works.append(_convolution(precision))
        product[precision] = max(flops / _fastest(work, device, sample) for flops, work in works)
    return Ceilings(copy, product)


def _matrices(side: int, device: torch.device, precision: str) -> tuple[float, Callable[[], Any]]:
    """Return the operations of a product of square matrices, and what computes it."""
    a = torch.randn(side, side, device=device).to(DTYPES[precision])
    return 2.0 * side**3, partial(torch.mm, a, a, out=torch.empty_like(a))


def _convolution(precision: str) -> tuple[float, Callable[[], Any]]:
    """Return the operations of a 3x3 convolution, the same as a product of tall matrices."""
    shapes = (1, CHANNELS, PIXELS + 2, PIXELS + 2), (CHANNELS, CHANNELS, 3, 3)
    drawn = (torch.randn(shape).to(DTYPES[precision]) for shape in shapes)
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in drawn)
    return 2.0 * 9 * CHANNELS**2 * PIXELS**2, partial(torch.conv2d, x, weight)


def _fastest(work: Callable[[], Any], device: torch.device, sample: float) -> float:
    """Return the seconds of one piece of work, in the fastest of several samples."""
    sync = variant(work, device).sync
    steps = max(1, math.ceil(sample / clock(work, steps=1, warmup=2, sync=sync)))
    return min(clock(work, steps=steps, warmup=1, sync=sync) for _ in range(SAMPLES))
