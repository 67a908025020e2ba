"""What the slots of all backends have in common: each is a row of the step's tensors."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flashdip.engine.backends.base import Statistics, Which
from flashdip.engine.backends.observe import Observer
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip
from flashdip.engine.problems import Problem


class Rows(Protocol):
    """A step, as its slots see it.

    Attributes:
        config: How the fits are done.
        network: Of each of them.
        size: Height and width of the images.
        watch: The averaged outputs and stopping statistics of all fits.
        trained: Parameters and moments of all fits by name, [F, P] each.
        good: What each fit goes back to: like `trained` and `watch.good()`.
        best: "parameters" and "image" of the best iteration so far; empty if no rule searches.
    """

    config: FitConfig
    network: Skip
    size: tuple[int, int]
    watch: Observer
    trained: dict[str, Tensor]
    good: dict[str, Tensor]
    best: dict[str, Tensor]

    def read(self) -> list[Statistics]:
        """Wait for the device; return the statistics of each fit's last iteration."""
        ...


def kept(
    trained: dict[str, Tensor], watch: Observer, config: FitConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return memory for the good states and the best results of all fits; see `Rows`."""
    good = {name: torch.zeros_like(tensor) for name, tensor in (trained | watch.good()).items()}
    if not {"es-wmv", "es-emv"} & set(config.stop):
        return good, {}
    best = {"parameters": trained["parameters"], "image": watch.output}
    return good, {name: torch.zeros_like(tensor) for name, tensor in best.items()}


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

    def _place(self, parameters: Tensor, z: Tensor) -> None:
        """Write what the fit begins with: parameters, [P] in the published order, and z, [C, H, W].

        Both are float32 on the CPU.
        """
        raise NotImplementedError

    def _network(self, parameters: Tensor) -> dict[str, Tensor]:
        """Copy parameters, [1, P], by name, in order, and the network's input "z" to the CPU."""
        raise NotImplementedError

    def start(self, seed: int) -> None:
        """Bring everything to where a fit with this seed begins."""
        self.seed, self.iteration, self.rate_scale, self.retry = seed, 0, 1.0, 0
        with torch.no_grad():
            for tensor in (*self._state().values(), self._window()):
                tensor.zero_()
            step = self.step
            z = initial_input(step.config, step.size, seed)
            self._place(step.network.initialise(seed), z)
        self._copy(self._good(), self._state())

    def warm(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights and another z than the seed's."""
        parts = [weights[parameter.name].flatten() for parameter in self.step.network.parameters]
        with torch.no_grad():
            self._place(torch.cat(parts), weights["z"])
        self._copy(self._good(), self._state())

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

    def fitted(self) -> dict[str, Tensor]:
        """Copy parameters and z of the last iteration to the CPU."""
        return self._network(self._state()["parameters"])

    def keep(self) -> None:
        """Copy the state, to go back to."""
        self._copy(self._good(), self._state())

    def go_back(self, iteration: int) -> None:
        """Copy the good state back."""
        self.iteration = iteration
        self._copy(self._state(), self._good())

    def select(self) -> None:
        """Copy image and parameters."""
        state = self._state()
        image = self.step.watch.averaged(state["average"], state["output"])
        self._copy(self._row(self.step.best), {"parameters": state["parameters"], "image": image})

    def result(self, which: Which, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return image and network of an iteration."""
        watch = self.step.watch
        if which == "best":
            found = self._row(self.step.best)
            image = found["image"]
        else:
            found = self._good() if which == "good" else self._state()
            image = watch.averaged(found["average"], found["output"])
        return watch.corrected(image, iteration), self._network(found["parameters"])

    def good_state(self) -> dict[str, Tensor]:
        """Copy the state of the last iteration."""
        return {name: tensor.detach().clone() for name, tensor in self._state().items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copy everything to the CPU."""
        groups = {
            "step": self._state(),
            "statistics": {"window": self._window()},
            "good": self._good(),
            "best": self._row(self.step.best),
        }
        return {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in of.items()}
            for group, of in groups.items()
        }

    def resume(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        iteration: int,
        guard: Mapping[str, float],
        rules: Mapping[str, Sequence[float]],
    ) -> None:
        """Go on where another slot was."""
        self.iteration = iteration
        self.rate_scale, self.retry = guard["rate_scale"], int(guard["total"])
        self._copy(self._state(), state.get("step", state["good"]))
        self._copy({"window": self._window()}, state["statistics"])
        self._copy(self._good(), state["good"])
        self._copy(self._row(self.step.best), state.get("best", {}))

    def _row(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[self.index : self.index + 1] for name, tensor in tensors.items()}

    def _state(self) -> dict[str, Tensor]:
        return self._row(self.step.trained | self.step.watch.good())

    def _good(self) -> dict[str, Tensor]:
        return self._row(self.step.good)

    def _window(self) -> Tensor:
        return self.step.watch.window[:, self.index : self.index + 1]

    def _copy(self, to: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in of.items():
                to[name].copy_(tensor)


def initial_input(config: FitConfig, size: tuple[int, int], seed: int) -> Tensor:
    """Return the input z of one fit, [C, H, W] float32 on the CPU, at the network's size."""
    height, width = config.network.network_size(*size)
    if config.input == "meshgrid":
        y, x = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
        return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)  # another stream than the weights'
    z = torch.rand(config.network.inputs, height, width, generator=generator)
    return z * config.input_scale
