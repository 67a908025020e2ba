"""The divergence guard: a fit that jumps away goes back to its last good state."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashdip.engine.backends.base import Slot, Statistics

JUMP = 10**0.5  # a loss that grew so much, 5 dB, since the last reading: the published threshold
CAREFUL = 100  # iterations at half the rate after going back


class Guard:
    """Watches the loss; has the last good state kept, optimiser moments included.

    The published notebook restores only the parameters, and the next step reuses the moments that
    led away.

    Where a backend decides on the device, what is said here was done by the time it is said:
    `kernels/fused/judge.py` decides likewise.

    Args:
        slot: The fit to watch, freshly prepared.
        retries: How often to go back in a row, that is without getting `CAREFUL` iterations past
            the place.

    Attributes:
        total: Times gone back to try again.
        exhausted: Whether the last check went back once too often.
        good_iteration: How many iterations the good state is after.
    """

    def __init__(self, slot: "Slot", retries: int) -> None:
        self.slot = slot
        self.retries = retries
        self.total = 0
        self.in_a_row = 0
        self.failed_at = 0
        self.loss = math.inf
        self.good_iteration = slot.iteration

    @property
    def exhausted(self) -> bool:
        """Whether it went back more often than allowed."""
        return self.in_a_row > self.retries

    def sound(self, statistics: "Statistics") -> bool:
        """Return whether the state that gave these statistics may be kept."""
        return finite(statistics) and statistics.loss <= JUMP * self.loss

    def accept(self, statistics: "Statistics") -> bool:
        """Keep the state and return True; or, if the fit diverged, go back and return False."""
        iteration = statistics.iteration
        if self.sound(statistics):
            if iteration >= self.failed_at + CAREFUL:
                self.in_a_row, self.slot.rate_scale = 0, 1.0
            self.loss, self.good_iteration = statistics.loss, iteration
            self.slot.keep()
            return True
        self.slot.go_back(self.good_iteration)
        self.in_a_row += 1
        self.failed_at = iteration
        if not self.exhausted:
            self.total += 1
            self.slot.rate_scale = 0.5**self.in_a_row
            self.slot.retry = self.total
        return False

    def state(self) -> dict[str, float]:
        """Return the counters, for a checkpoint."""
        names = ("total", "in_a_row", "failed_at", "loss", "good_iteration")
        return {name: getattr(self, name) for name in names} | {"rate_scale": self.slot.rate_scale}

    def load(self, state: dict[str, float]) -> None:
        """Go on from what `state` returned; the slot resumes by itself."""
        for name, value in state.items():
            if name != "rate_scale":
                setattr(self, name, value)


def finite(statistics: "Statistics") -> bool:
    """Return whether loss, residual and weights are finite."""
    return all(map(math.isfinite, (statistics.loss, statistics.residual, statistics.weights)))
