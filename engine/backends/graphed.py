"""The backend `native` with most of a step in a CUDA graph, on the devices that have such graphs.

A graph does what an op set is asked for layer by layer, about four hundred launches: the network,
the loss and their gradients. The perturbed input is copied to where the graph reads it; Adam and
the averages, a few launches on flat tensors, follow eagerly, as they know of the iteration.

There has been no GPU to capture on: what is tested, with a stand-in for the capture, is that such a
step computes what the eager one does, also where another fit takes a slot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashdip.engine.backends.base import DTYPES
from flashdip.engine.backends.eager import EagerBackend, EagerSlot, EagerStep
from flashdip.engine.backends.graphs import Captured, capture
from flashdip.engine.config import FitConfig
from flashdip.engine.operators import Downsample, Each, Identity, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels.opset import OpSet

DEVICES = ("cuda",)  # torch's name for those of CUDA and of HIP


class GraphedBackend(EagerBackend):
    """One op set, captured where that can be done, else run operation by operation."""

    def prepare(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        precision: str,
        truth: Tensor | None,
    ) -> EagerStep:
        """Build the step; its first iteration captures the graph."""
        reason = uncaptured(device, problem.operator)
        if reason is None:
            return GraphedStep(self.ops(), problem, config, device, DTYPES[precision], truth)
        step = super().prepare(problem, config, device, precision, truth)
        if device.type != "cpu":
            step.notes = (f"no CUDA graph: {reason}; operations are launched one by one",)
        return step


class GraphedStep(EagerStep):
    """An `EagerStep` whose network, loss and gradients are a graph."""

    def __init__(
        self,
        ops: OpSet[Tensor],
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        dtype: torch.dtype,
        truth: Tensor | None,
    ) -> None:
        super().__init__(ops, problem, config, device, dtype, truth)
        self.input: Tensor | None = None
        self.captured: Captured[tuple[Tensor, Tensor]] | None = None
        self.slots = [GraphedSlot(self, slot.index) for slot in self.slots]
        for slot in self.slots:
            slot.start(config.seed + slot.index)

    def differentiate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradients; return output and loss, in the same memory each time."""
        if self.input is None:
            self.input = x.clone()
        into = self.input
        into.copy_(x)
        if self.captured is None:
            whole = super().differentiate
            self.captured = capture(lambda: whole(into), x.device)
        self.captured.replay()
        return self.captured.result


class GraphedSlot(EagerSlot):
    """One fit of a `GraphedStep`."""

    step: GraphedStep

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place; its operator may read other memory: a new graph."""
        super().replace(problem, seed, truth)
        self.step.captured = None


def uncaptured(device: torch.device, operator: object) -> str | None:
    """Return why a step with this operator is not captured; None if it is."""
    if device.type not in DEVICES:
        return f"{device.type} has none"
    operators: Sequence[object] = operator.operators if isinstance(operator, Each) else [operator]
    for each in operators:
        if not isinstance(each, Identity | Mask | Downsample):
            return f"the operator {type(each).__name__} may wait for the device"
    return None
