"""What a step of a fit has to do at least: operations and bytes, by layer and pass.

An op set that computes nothing: it counts. Operations are twice the multiply-adds that the
mathematics asks for, after the algebra of `flashdip.kernels.native`: a 3x3 convolution of an
enlarged map costs 4/9 of one at the large size. Bytes are what no fusion of neighbours can avoid:
each activation written once and read once by each reader, and the same for its gradient. Both hold
for every backend and for the published loop, so that shares of the roof compare as times do.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashdip.bench.ceilings import Ceilings
from flashdip.engine.backends.base import DTYPES
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip
from flashdip.kernels.opset import Activation, Down, Pad, Up

WIDE = 4  # bytes of a master weight, a moment, a pixel of an image


class Shape(NamedTuple):
    """An activation: all that is known of it."""

    channels: int
    height: int
    width: int
    leaf: bool = False  # the network's input: nothing is differentiated by it

    @property
    def values(self) -> int:
        """Number of its values."""
        return self.channels * self.height * self.width


class Work(NamedTuple):
    """What one thing has to do.

    Attributes:
        flops: Operations, twice the multiply-adds.
        bytes: Read and written.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def roof(self, ceilings: Ceilings, precision: str) -> float:
        """Return the least seconds it takes: whichever ceiling it meets first."""
        return max(self.flops / ceilings.product[precision], self.bytes / ceilings.copy)


class Counter:
    """The op set; see `Layers`. Counts one fit.

    Args:
        names: Of layers, by id of their weight.
        width: Bytes of a stored value.
        folded: Whether enlarged maps are convolved on the small grid.

    Attributes:
        counts: By layer and pass.
    """

    def __init__(self, names: Mapping[int, str], width: int, folded: bool = True) -> None:
        self.names, self.width, self.folded = names, width, folded
        self.counts: dict[tuple[str, str], Work] = {}

    def conv_norm_act(
        self,
        x: Shape,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        *,
        stride: int = 1,
        down: Down = "stride",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Shape:
        outputs = weight.shape[1]
        by_stride = stride == 1 or down == "stride"
        full = _shrunk(x, outputs, stride if by_stride else 1)
        self._count(self.names[id(weight)], [x], full, _products(weight, full), weight)
        if by_stride:
            return full
        return Shape(outputs, full.height // stride, full.width // stride)

    def join_conv(
        self,
        skip: Shape | None,
        deep: Shape,
        join_gamma: Tensor,
        join_beta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        *,
        up: Up = "bilinear",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Shape:
        height, width = 2 * deep.height, 2 * deep.width
        even = skip is None or (skip.height, skip.width) == (height, width)
        if skip is not None:
            height, width = min(skip.height, height), min(skip.width, width)
        y = Shape(weight.shape[1], height, width)
        products = _products(weight, y)
        shallow = 0 if skip is None else skip.channels
        if self.folded and even and weight.shape[-1] == 3:
            of_deep = products // weight.shape[2] * deep.channels
            products = products - of_deep + of_deep * 4 // 9
        inputs = [deep] if skip is None else [skip._replace(channels=shallow), deep]
        self._count(self.names[id(weight)], inputs, y, products, weight)
        return y

    def head(
        self,
        x: Shape,
        weight: Tensor,
        bias: Tensor | None,
        *,
        pad: Pad = "reflection",
        sigmoid: bool = True,
    ) -> Tensor:
        image = Shape(weight.shape[1], x.height, x.width)
        flops = 2 * _products(weight, image)
        # Its output meets the observation and enters the average; nothing of it is stored else.
        pixels = 4 * WIDE * image.values
        self.counts["head", "forward"] = Work(flops, self.width * x.values + pixels)
        self.counts["head", "backward"] = Work(2 * flops, self.width * 2 * x.values)
        return torch.empty(1, *image[:3], device="meta")

    def _count(
        self, name: str, inputs: Sequence[Shape], y: Shape, products: int, weight: Tensor
    ) -> None:
        """Count a convolution's passes: y from x; dx and dweight from dy and x."""
        read = sum(x.values for x in inputs)
        wanted = sum(x.values for x in inputs if not x.leaf)
        weights = weight[0].numel()
        forward = self.width * (read + y.values + weights)
        # dy is made from the gradient and the result; dx is written, x and weights read again.
        backward = self.width * (2 * y.values + read + wanted + weights) + WIDE * weights
        of_dx = products if wanted else 0
        self.counts[name, "forward"] = Work(2 * products, forward)
        self.counts[name, "backward"] = Work(2 * (products + of_dx), backward)


def count(
    config: FitConfig, size: tuple[int, int], precision: str, *, fits: int = 1, folded: bool = True
) -> dict[tuple[str, str], Work]:
    """Count a step of F fits, by layer and pass: "forward", "backward", or "" for what has none.

    Args:
        config: How they are fitted.
        size: Height and width of the image.
        precision: What activations are stored in.
        fits: F.
        folded: Whether enlarged maps are convolved on the small grid; else as published.
    """
    network = Skip(config.network)
    parameters = [torch.empty((1, *p.shape), device="meta") for p in network.parameters]
    names = {
        id(tensor): parameter.name.removesuffix(".weight")
        for tensor, parameter in zip(parameters, network.parameters, strict=True)
    }
    width = DTYPES[precision].itemsize
    counter = Counter(names, width, folded)
    height, breadth = config.network.network_size(*size)
    x = Shape(config.network.inputs, height, breadth, leaf=True)
    if config.perturbation:
        counter.counts["perturb", ""] = perturbation(x, width)
    network.forward(counter, parameters, x)
    counter.counts["adam", ""] = update(sum(tensor.numel() for tensor in parameters))
    return {key: Work(fits * each.flops, fits * each.bytes) for key, each in counter.counts.items()}


def perturbation(x: Shape, width: int) -> Work:
    """Count the noise of an input: two are read and one is written."""
    return Work(2 * x.values, width * 3 * x.values)


def update(parameters: int) -> Work:
    """Count Adam: it reads parameter, gradient and moments, and writes all but the gradient."""
    return Work(12 * parameters, WIDE * 7 * parameters)


def total(counts: Mapping[tuple[str, str], Work]) -> Work:
    """Return all of it together."""
    return sum(counts.values(), Work())


def roof(counts: Mapping[tuple[str, str], Work], ceilings: Ceilings, precision: str) -> float:
    """Return the least seconds of a step whose parts come one after another."""
    return sum(each.roof(ceilings, precision) for each in counts.values())


def _products(weight: Tensor, y: Shape) -> int:
    """Return the multiply-adds of a convolution with [1, O, I, k, k] whose result is y."""
    return y.height * y.width * weight[0].numel()


def _shrunk(x: Shape, channels: int, stride: int) -> Shape:
    return Shape(channels, -(-x.height // stride), -(-x.width // stride))
