"""What is measured: pictures, configs, and the benches that commands and `bench_*.py` share."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdip.bench.measure import Variant
from flashdip.engine.config import FitConfig
from flashdip.engine.presets import preset

SIGMA = 25 / 255
PUBLISHED = "published-denoise"  # the preset that the published loop's network belongs to
ENOUGH = 200_000  # iterations: more than a bench makes

Settings = tuple[tuple[str, str], ...]  # fields of a preset and their other values, as text


def picture(size: int) -> Tensor:
    """Make a smooth picture with noise of sigma 25 / 255, [1, 3, size, size] in [0, 1]."""
    axis = torch.linspace(0, 3 * math.pi, size)
    waves = [torch.sin((c + 1) * axis[:, None] / 2) * torch.cos(axis + c) for c in range(3)]
    clean = 0.5 + 0.4 * torch.stack(waves)[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return (clean + noise * SIGMA).clamp(0, 1)


def configuration(precision: Any, name: str = PUBLISHED, settings: Settings = ()) -> FitConfig:
    """Return a preset for denoising, without statistics that the published loop does not gather."""
    return dataclasses.replace(
        preset("denoise", name).override(dict(settings)),
        stop=("fixed",),
        iterations=ENOUGH,
        precision=precision,
    )


@dataclass(frozen=True)
class Bench:
    """One row of a benchmark.

    Attributes:
        name: Tells it from the other rows; the same in every run.
        make: A module-level function that sets the variant up, in a process of its own.
        arguments: Of `make`.
        parameters: What was chosen, plain values.
        fits: Iterations of one fit that a step of the variant makes.
        check: Proves that it computes the right thing, and returns each error with what was
            allowed, or raises `WrongResultError`; None for what the others are judged by.
    """

    name: str
    make: Callable[..., Variant]
    arguments: tuple[Any, ...] = ()
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    fits: int = 1
    check: Callable[[], dict[str, Any]] | None = None
