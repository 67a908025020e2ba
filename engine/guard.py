"""The divergence guard: a fit that jumps away goes back to its last good state."""

import math

from torch import Tensor

from flashdip.engine.backends.base import Slot, Statistics

JUMP = 10**0.5  # a loss that grew so much, 5 dB, since the last reading: the published threshold
CAREFUL = 100  # iterations at half the rate after going back


class Guard:
    """Watches the loss; keeps the last good state, optimiser moments included.

    The published notebook restores only the parameters, and the next step reuses the moments that
    led away.

    Args:
        slot: The fit to watch, freshly prepared.
        retries: How often to go back in a row, that is without getting `CAREFUL` iterations past
            the place.

    Attributes:
        total: Times gone back to try again.
        exhausted: Whether the last check went back once too often.
    """

    def __init__(self, slot: Slot, retries: int) -> None:
        self.slot = slot
        self.retries = retries
        self.total = 0
        self.in_a_row = 0
        self.failed_at = 0
        self.loss = math.inf
        self.good: dict[str, Tensor] = slot.good_state()
        self.good_iteration = slot.iteration

    @property
    def exhausted(self) -> bool:
        """Whether it went back more often than allowed."""
        return self.in_a_row > self.retries

    def sound(self, statistics: Statistics) -> bool:
        """Return whether the state that gave these statistics may be kept."""
        finite = math.isfinite(statistics.loss) and math.isfinite(statistics.residual)
        return finite and statistics.loss <= JUMP * self.loss

    def accept(self, statistics: Statistics) -> bool:
        """Keep the state and return True; or, if the fit diverged, go back and return False."""
        iteration = self.slot.iteration
        if self.sound(statistics):
            if iteration >= self.failed_at + CAREFUL:
                self.in_a_row, self.slot.rate_scale = 0, 1.0
            self.loss = statistics.loss
            self.good, self.good_iteration = self.slot.good_state(), iteration
            return True
        self.go_back()
        self.in_a_row += 1
        self.failed_at = iteration
        if not self.exhausted:
            self.total += 1
            self.slot.rate_scale = 0.5**self.in_a_row
            self.slot.retry = self.total
        return False

    def go_back(self) -> None:
        """Restore the last good state."""
        self.slot.load(self.good, self.good_iteration)

    def state(self) -> dict[str, float]:
        """Return the counters, for a checkpoint."""
        names = ("total", "in_a_row", "failed_at", "loss", "good_iteration")
        return {name: getattr(self, name) for name in names} | {"rate_scale": self.slot.rate_scale}

    def load(self, state: dict[str, float], good: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for name, value in state.items():
            setattr(self.slot if name == "rate_scale" else self, name, value)
        self.slot.retry = self.total
        self.good = good
