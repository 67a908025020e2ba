"""What a backend is: where a fit runs and with which kernels.

A backend says why it cannot run (`unavailable`) and builds a `Step` (`prepare`). Calling the step
advances every fit by one iteration without waiting for the device; only `read` waits.
"""

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


class Step(Protocol):
    """A fit, prepared: its state on a device, and how to advance it.

    Attributes:
        iteration: Iterations done.
        rate_scale: Factor on the learning rate, set by the divergence guard.
        retry: Enters the perturbation, so that a repeated iteration draws other noise.
    """

    iteration: int
    rate_scale: float
    retry: int

    def __call__(self) -> None:
        """Advance by one iteration."""
        ...

    def read(self) -> Statistics:
        """Wait for the device and return the statistics of the last iteration."""
        ...

    def image(self) -> Tensor:
        """Return the averaged output, [F, C, H, W] float32 in [0, 1], on the device."""
        ...

    def good_state(self) -> dict[str, Tensor]:
        """Return copies of what a divergent fit goes back to: parameters, moments, averages."""
        ...

    def statistics_state(self) -> dict[str, Tensor]:
        """Return copies of what the stopping statistics remember beside that, for a checkpoint."""
        ...

    def fitted(self) -> dict[str, Tensor]:
        """Copy the first fit's parameters by name, in order, and its input "z" to the CPU."""
        ...

    def load(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from copied state; entries that are missing stay as they are."""
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
        """Build the step: parameters initialised, memory taken, kernels compiled."""
        ...
