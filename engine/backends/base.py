"""What a backend is: where a fit runs and with which kernels.

A backend says why it cannot run (`unavailable`) and builds a `Step` (`prepare`). The step advances
every fit by some iterations without waiting for the device; only `read` waits. Each fit has
a `Slot` of the step, which another fit may take when it is done.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.problems import Problem

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Statistics(NamedTuple):
    """What one reading of the device brings; see `flashdip.engine.stopping.Reading`."""

    loss: float
    residual: float
    noise: float
    windowed_variance: float
    moving_variance: float
    squared_error: float  # of the averaged output against the truth; NaN without one


class Slot(Protocol):
    """One fit of a step: its state on the device, and how far it got.

    Attributes:
        iteration: Iterations done.
        rate_scale: Factor on the learning rate, set by the divergence guard.
        retry: Enters the perturbation, so that a repeated iteration draws other noise.
    """

    iteration: int
    rate_scale: float
    retry: int

    def read(self) -> Statistics:
        """Wait for the device and return the statistics of the last iteration."""
        ...

    def image(self) -> Tensor:
        """Return the averaged output, [1, C, H, W] float32 in [0, 1], on the device."""
        ...

    def good_state(self) -> dict[str, Tensor]:
        """Return copies of what a divergent fit goes back to: parameters, moments, averages."""
        ...

    def statistics_state(self) -> dict[str, Tensor]:
        """Return copies of what the stopping statistics remember beside that, for a checkpoint."""
        ...

    def fitted(self) -> dict[str, Tensor]:
        """Copy the parameters by name, in order, and the network's input "z" to the CPU."""
        ...

    def load(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from copied state; entries that are missing stay as they are."""
        ...

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place; its neighbours do not notice.

        Args:
            problem: A single fit (F = 1) of the same shapes. The step must have been prepared with
                an `Each`, and with operators of the same kind: see `fit_many`.
            seed: Of the initial weights, z and the perturbation.
            truth: The undamaged image, [C, H, W], or None.
        """
        ...


class Step(Protocol):
    """Fits, prepared: one slot for each, and how to advance them together.

    Attributes:
        stride: Iterations to advance by in one go, unless fewer are asked for: 1 where the host
            works on each of them.
    """

    stride: int

    @property
    def slots(self) -> Sequence[Slot]:
        """One for each fit."""
        ...

    def advance(self, count: int) -> None:
        """Advance every fit by so many iterations, without waiting for the device."""
        ...

    def __call__(self) -> None:
        """Advance every fit by one iteration."""
        ...

    def read(self) -> list[Statistics]:
        """Wait for the device and return the statistics of each fit's last iteration."""
        ...


class Backend(Protocol):
    """Where and with which kernels a fit runs."""

    name: str
    devices: tuple[str, ...]  # types of device it is made for; elsewhere "auto" is silent about it

    def unavailable(self, device: torch.device, config: FitConfig) -> list[str]:
        """Return the reasons why this backend cannot run such a fit there; empty if it can."""
        ...

    def precision(self, device: torch.device) -> str:
        """Return the precision that "auto" stands for."""
        ...

    def prepare(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        precision: str,
        truth: Tensor | None,
    ) -> Step:
        """Build the step: parameters initialised, memory taken, kernels compiled.

        Args:
            problem: F fits; fit f of them has the seed `config.seed + f`.
            config: How they are fitted.
            device: Where.
            precision: See `FitConfig`; not "auto".
            truth: The undamaged images, [F or 1, C, H, W], or None.
        """
        ...
