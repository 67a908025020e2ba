"""What the machine at hand can do at most, measured: a copy and a matrix product.

They are what shares of the roof are taken of, so they are the best of several samples: the median
would let a busy moment make everything else look good.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flashdip.bench.baselines import variant
from flashdip.bench.measure import clock
from flashdip.engine.backends.base import DTYPES

SAMPLES = 5
SAMPLE = 0.2  # seconds, about
COPIED = 1 << 28  # bytes: more than any cache holds
SIDES = {"cpu": 2048}  # of the matrices
SIDE = 8192  # elsewhere


@dataclass(frozen=True)
class Ceilings:
    """What a device reached.

    Attributes:
        copy: Bytes a second, read and written, of a long copy.
        product: Operations a second of a square matrix product, by precision.
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
        side: Of the matrices; None: what suits the device.
        sample: Seconds of a sample, about.
    """
    side = side or SIDES.get(device.type, SIDE)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied / _fastest(lambda: target.copy_(source), device, sample)
    product = {}
    for precision in precisions:
        a = torch.randn(side, side, device=device).to(DTYPES[precision])
        out = torch.empty_like(a)
        seconds = _fastest(lambda a=a, out=out: torch.mm(a, a, out=out), device, sample)
        product[precision] = 2.0 * side**3 / seconds
    return Ceilings(copy, product)


def _fastest(work: Any, device: torch.device, sample: float) -> float:
    """Return the seconds of one piece of work, in the fastest of several samples."""
    sync = variant(work, device).sync
    steps = max(1, math.ceil(sample / clock(work, steps=1, warmup=2, sync=sync)))
    return min(clock(work, steps=steps, warmup=1, sync=sync) for _ in range(SAMPLES))
