"""What the slots of all backends have in common: each is a row of the step's tensors."""

import weakref
from typing import Protocol

import torch
from torch import Tensor

from flashdip.engine.backends.base import Statistics
from flashdip.engine.backends.observe import Observer
from flashdip.engine.problems import Problem


class Rows(Protocol):
    """A step, as its slots see it.

    Attributes:
        watch: The averaged outputs and stopping statistics of all fits.
        trained: Parameters and moments of all fits by name, [F, P] each.
    """

    watch: Observer
    trained: dict[str, Tensor]

    def read(self) -> list[Statistics]:
        """Return the statistics of each fit."""
        ...


class TensorSlot:
    """One fit: row `index` of each tensor of the step's state. See `Slot`.

    Nothing is allocated anew when a fit takes the place of another, so that a captured graph of
    launches serves for all of them.

    Attributes:
        seed: Of the fit.
    """

    iteration: int = 0
    rate_scale: float = 1.0
    retry: int = 0
    seed: int = 0

    def __init__(self, step: Rows, index: int) -> None:
        # Not to keep the step, which keeps its slots: its memory is to be free when it goes.
        self.step: Rows = weakref.proxy(step)
        self.index = index

    def _draw(self) -> None:
        """Write the initial weights and the input z of the seed."""
        raise NotImplementedError

    def fitted(self) -> dict[str, Tensor]:
        """Copy the parameters by name, in order, and the network's input "z" to the CPU."""
        raise NotImplementedError

    def start(self, seed: int) -> None:
        """Bring everything to where a fit with this seed begins."""
        self.seed, self.iteration, self.rate_scale, self.retry = seed, 0, 1.0, 0
        with torch.no_grad():
            for tensor in (*self._good().values(), self._window()):
                tensor.zero_()
            self._draw()

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place."""
        self.step.watch.replace(self.index, problem, truth)
        self.start(seed)

    def read(self) -> Statistics:
        """Wait for the device; return the statistics of the last iteration."""
        return self.step.read()[self.index]

    def image(self) -> Tensor:
        """Return the averaged output, [1, C, H, W]."""
        return self.step.watch.image(self.index, self.iteration)

    def _good(self) -> dict[str, Tensor]:
        state = self.step.trained | self.step.watch.good()
        return {name: tensor[self.index : self.index + 1] for name, tensor in state.items()}

    def _window(self) -> Tensor:
        return self.step.watch.window[:, self.index : self.index + 1]

    def good_state(self) -> dict[str, Tensor]:
        """Copy what a divergent fit goes back to."""
        return {name: tensor.detach().clone() for name, tensor in self._good().items()}

    def statistics_state(self) -> dict[str, Tensor]:
        """Return a copy of the window."""
        return {"window": self._window().clone()}

    def load(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from copied state."""
        self.iteration = iteration
        own = self._good() | {"window": self._window()}
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
