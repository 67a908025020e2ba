"""What steps have in common whose host works on each iteration: nothing runs ahead of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashdip.engine.backends.base import Statistics
from flashdip.engine.backends.observe import Observer
from flashdip.engine.backends.slots import TensorSlot
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip


class HostedStep:
    """F fits, advanced one iteration at a time. See `Step` and `Rows`.

    Attributes:
        z: The network's inputs, [F, inputs, H, W].
        trained: Parameters, in the published order, and moments of all fits by name, [F, P] each.
    """

    stride = 1
    notes: tuple[str, ...] = ()

    config: FitConfig
    network: Skip
    size: tuple[int, int]
    watch: Observer
    z: Tensor
    trained: dict[str, Tensor]
    good: dict[str, Tensor]
    best: dict[str, Tensor]
    slots: Sequence["HostedSlot"]

    def __call__(self) -> None:
        """Advance every fit by one iteration."""
        raise NotImplementedError

    def advance(self, count: int) -> None:
        """Advance every fit by so many iterations."""
        for _ in range(count):
            self()

    def read(self) -> list[Statistics]:
        """Wait for the device; return the last statistics of each fit."""
        return self.watch.read([slot.iteration for slot in self.slots], self.trained["parameters"])

    def measure(self, due: Sequence[int]) -> list[tuple[int, Statistics]]:
        """Wait for the device; return the statistics of the slots that are due."""
        statistics = self.read()
        return [(index, statistics[index]) for index in due]

    def drain(self) -> list[tuple[int, Statistics]]:
        """Return nothing: what was asked for has been returned."""
        return []


class HostedSlot(TensorSlot):
    """One fit of a `HostedStep`."""

    step: HostedStep

    def _place(self, parameters: Tensor, z: Tensor) -> None:
        self.step.trained["parameters"][self.index].copy_(parameters)
        self.step.z[self.index].copy_(z)

    def _network(self, parameters: Tensor) -> dict[str, Tensor]:
        network, z = self.step.network, self.step.z[self.index]
        names = [parameter.name for parameter in network.parameters]
        views = (view[0] for view in network.views(parameters))
        tensors = dict(zip(names, views, strict=True)) | {"z": z}
        return {
            name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, tensor in tensors.items()
        }
