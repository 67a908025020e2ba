"""What a fit tells while it runs; a callback receives these, in order, on the fitting thread."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """The fit is set up and begins (or goes on, from a checkpoint).

    Attributes:
        iteration: Iterations done already; 0 unless resumed.
        iterations: The most that will be done.
        size: Height and width of the image, in pixels.
        network_size: Height and width the network runs at.
        notes: Lines that a person should see: why this backend, what was estimated.
    """

    iteration: int
    iterations: int
    backend: str
    device: str
    precision: str
    size: tuple[int, int]
    network_size: tuple[int, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """Statistics were read back.

    Attributes:
        loss: Mean squared residual of the last output, averaged over fits.
        psnr: Of the averaged output against the truth, in dB; None without a truth.
        variance: What the stopping rule watches; None if it watches nothing.
        seconds: Since the fit began.
        iterations_per_second: Since the last reading.
    """

    iteration: int
    iterations: int
    loss: float
    psnr: float | None
    variance: float | None
    seconds: float
    iterations_per_second: float


@dataclass(frozen=True)
class Retried:
    """The fit diverged and went back to its last good state."""

    iteration: int
    retry: int
    reason: str


@dataclass(frozen=True)
class Noted:
    """Something a person should know that does not end the fit."""

    message: str


@dataclass(frozen=True)
class Finished:
    """The fit is over.

    Attributes:
        iterations: That were made; of all runs, if there were several.
        best_iteration: The one whose image is returned; of several runs, the first run's.
        stop_reason: Why it ended.
        seconds: That it took.
        runs: How many fits the image is the mean of.
    """

    iterations: int
    best_iteration: int
    stop_reason: str
    seconds: float
    runs: int = 1


Event = Started | Progress | Retried | Noted | Finished
Callback = Callable[[Event], None]
