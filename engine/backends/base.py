"""What a backend is: where a fit runs and with which kernels.

A backend says why it cannot run (`unavailable`) and builds a `Step` (`prepare`). The step advances
every fit by some iterations without waiting for the device. Each fit has
a `Slot` of the step, which another fit may take when it is done.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

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


Which = Literal["last", "good", "best"]


class Statistics(NamedTuple):
    """What one reading of the device brings; see `flashdip.engine.stopping.Reading`."""

    iteration: int
    loss: float
    residual: float
    noise: float
    windowed_variance: float
    moving_variance: float
    squared_error: float  # of the averaged output against the truth; NaN without one
    weights: float  # sum of the squared parameters, which the next output will be drawn with


class Slot(Protocol):
    """One fit of a step: its state on the device, and how far it got.

    A state is what a divergent fit goes back to: parameters, moments, averages.

    Attributes:
        iteration: Iterations done, or that will have been when the device has caught up.
        rate_scale: Factor on the learning rate, set by the divergence guard.
        retry: Enters the perturbation, so that a repeated iteration draws other noise.
    """

    iteration: int
    rate_scale: float
    retry: int

    def keep(self) -> None:
        """Keep the state of the last reading as the good one."""
        ...

    def go_back(self, iteration: int) -> None:
        """Go back to the good state, which is that after so many iterations."""
        ...

    def select(self) -> None:
        """Keep what the last reading read as the best so far."""
        ...

    def result(self, which: Which, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return image and network of an iteration; waits for the device.

        Args:
            which: The "last" iteration, the "good" one, or the "best" one.
            iteration: After how many iterations that is.

        Returns:
            The averaged output, [1, C, H, W] float32 in [0, 1], on the device; on the CPU the
            parameters by name, in order, and the network's input "z".
        """
        ...

    def read(self) -> Statistics:
        """Wait for the device and return the statistics of the last iteration, whichever it is."""
        ...

    def image(self) -> Tensor:
        """Return the averaged output of the last iteration; see `result`."""
        ...

    def fitted(self) -> dict[str, Tensor]:
        """Return the network of the last iteration; see `result`."""
        ...

    def good_state(self) -> dict[str, Tensor]:
        """Return copies of what makes up the state, by name."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies on the CPU of all that the fit needs to go on, in groups, by name."""
        ...

    def resume(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        iteration: int,
        guard: Mapping[str, float],
        rules: Mapping[str, Sequence[float]],
    ) -> None:
        """Go on where another slot, or this one, was.

        Args:
            state: What `state` returned there; without its group "step" the good state counts.
            iteration: Iterations done.
            guard: `Guard.state` there.
            rules: `Stopping.state` there.
        """
        ...

    def warm(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights and another z than the seed's, before the first iteration.

        Args:
            weights: Parameters by name in their published shapes, and the network's input "z", as
                `result` returns them.
        """
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
        notes: Lines that a person should see.
    """

    stride: int
    notes: tuple[str, ...]

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

    def measure(self, due: Sequence[int]) -> Iterable[tuple[int, Statistics]]:
        """Ask for a reading, and return what there is by now.

        What is returned is that of this reading, or always that of the one before: never does it
        depend on how fast the device is.

        Args:
            due: The slots that are to be read.

        Returns:
            Slots and their statistics; to be taken in while they come.
        """
        ...

    def drain(self) -> Iterable[tuple[int, Statistics]]:
        """Wait for the device, and return what was asked for and not yet returned."""
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
