"""Names in a profile: ranges around iterations, readings and layers, for NVTX too."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from flashdip.engine.backends.eager import EagerStep

PREFIX = "flashdip: "
STEP, READ = f"{PREFIX}iteration", f"{PREFIX}reading"
_WEIGHTS = {"conv_norm_act": 1, "join_conv": 4, "head": 1}  # where an operation has its weight


@contextlib.contextmanager
def span(name: str, device: torch.device) -> Iterator[None]:
    """Name what runs within the block, in torch's profiler and, on CUDA, for NVIDIA's tools."""
    with record_function(name):
        if device.type != "cuda":
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


class Marked:
    """An op set whose operations are named after their layers.

    Args:
        ops: The op set.
        names: Of layers, by id of their weight.
        device: Where it runs.
    """

    def __init__(self, ops: Any, names: Mapping[int, str], device: torch.device) -> None:
        self._ops, self._names, self._device = ops, names, device

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._ops, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            at = _WEIGHTS.get(name)
            layer = name if at is None else self._names[id(arguments[at])]
            with span(PREFIX + layer, self._device):
                return call(*arguments, **options)

        return marked


def mark(step: EagerStep, device: torch.device) -> None:
    """Name the layers of a step, its operator and its statistics.

    From then on its operations are made one by one: a recording knows of no layers.
    """
    step.records = False
    names = {
        id(leaf): parameter.name.removesuffix(".weight")
        for leaf, parameter in zip(step.leaves, step.network.parameters, strict=True)
    }
    step.ops = Marked(step.ops, names, device)
    step.watch.operator = _named(step.watch.operator, "operator", device)
    update = _named(step.watch.update, "statistics", device)
    step.watch.update = update  # type: ignore[method-assign]


def _named(call: Callable[..., Any], name: str, device: torch.device) -> Callable[..., Any]:
    def marked(*arguments: Tensor) -> Any:
        with span(PREFIX + name, device):
            return call(*arguments)

    return marked
