"""The published hourglass with skip connections, written once against an op set.

Level i of L, outermost first (Ulyanov et al., "Deep Image Prior", CVPR 2018; models/skip.py of
their code):

    x ── 1x1 conv, norm, act ─────────────────────────────── skip ┐
    └── conv /2, norm, act ── conv, norm, act ── [level i+1] ── x2 ┴ join, norm ─┐
       ┌──────────────────────────────────────────────────────────────────────────┘
       └── conv, norm, act ── 1x1 conv, norm, act

and a 1x1 convolution with a sigmoid at the end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from flashdip.engine.errors import ConfigError
from flashdip.kernels.opset import Activation, Down, Layers, Pad, Up

A = TypeVar("A")
P = TypeVar("P")
Scale = Literal["one", "uniform"]


@dataclass(frozen=True)
class SkipConfig:
    """Options of the network; tuples have an entry per level, outermost first.

    The last entry of a tuple stands for all deeper levels too, and a value that is no tuple for all
    levels: so the number of levels can be changed alone, by `down`.

    Attributes:
        inputs: Channels of the network's input z.
        outputs: Channels of the image.
        down: Channels of each level's downward convolutions; their number is the number of levels.
        up: Channels of each level's upward convolutions; None: as `down`.
        skip: Channels of each level's skip connection; 0 for none.
        kernel_down: Size of the downward kernels, odd.
        kernel_up: Size of the upward kernels, odd.
        kernel_skip: Size of the skip kernels, odd.
        upsample: How a level's result is enlarged: "nearest" or "bilinear".
        downsample: How a level halves: "stride", "avg", "max", "lanczos2" or "lanczos3".
        pad: Padding of the convolutions: "reflection" or "zero".
        act: "LeakyReLU" (slope 0.2), "Swish", "ELU" or "none".
        sigmoid: Whether the output passes a sigmoid.
        bias: Whether convolutions have a bias.
        conv1x1_up: Whether a 1x1 convolution follows each upward convolution.
        scale: Initial scales of the norms: "one", or "uniform" in [0, 1], as torch.nn.BatchNorm2d
            drew them before PyTorch 1.2, when the paper was written. A fit then rises faster.
    """

    inputs: int = 32
    outputs: int = 3
    down: tuple[int, ...] = (128,) * 5
    up: tuple[int, ...] | None = None
    skip: int | tuple[int, ...] = 4
    kernel_down: int | tuple[int, ...] = 3
    kernel_up: int | tuple[int, ...] = 3
    kernel_skip: int | tuple[int, ...] = 1
    upsample: Up | tuple[Up, ...] = "bilinear"
    downsample: Down | tuple[Down, ...] = "stride"
    pad: Pad = "reflection"
    act: Activation = "LeakyReLU"
    sigmoid: bool = True
    bias: bool = True
    conv1x1_up: bool = True
    scale: Scale = "one"

    def __post_init__(self) -> None:
        if not self.down:
            raise ConfigError("network.down: expected the channels of at least one level, got none")
        for name in ("inputs", "outputs"):
            _check(name, (getattr(self, name),), 1)
        for name in ("down", "up", "skip"):
            _check(name, self._per_level(name), 0 if name == "skip" else 1)
        for name in ("kernel_down", "kernel_up", "kernel_skip"):
            _check(name, self._per_level(name), 1, odd=True)
        for name in ("sigmoid", "bias", "conv1x1_up"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"network.{name}: expected true or false, got {getattr(self, name)!r}"
                )
        for name, allowed in (
            ("upsample", get_args(Up)),
            ("downsample", get_args(Down)),
            ("pad", get_args(Pad)),
            ("act", get_args(Activation)),
            ("scale", get_args(Scale)),
        ):
            for value in self._per_level(name):
                if value not in allowed:
                    raise ConfigError(
                        f"network.{name}: expected one of {', '.join(allowed)}, got {value!r}"
                    )

    @property
    def levels(self) -> int:
        """Number of halvings."""
        return len(self.down)

    def level(self, index: int) -> "Level":
        """Return the options of one level."""
        return Level._make(self._per_level(name)[index] for name in Level._fields)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size the network runs at: the next multiple of 2^levels, at least twice it.

        More where large kernels need it: a map can be reflected by less than its side only.
        """
        step, least = 1 << self.levels, 2
        for index in range(self.levels):
            level = self.level(index)
            margin = max(level.kernel_down, level.kernel_up, level.kernel_skip) // 2
            least = max(least, margin // (step >> index + 1) + 1)
        return max(least, -(-height // step)) * step, max(least, -(-width // step)) * step

    def _per_level(self, name: str) -> tuple[object, ...]:
        value = getattr(self, name)
        if name == "up" and value is None:
            value = self.down
        if not isinstance(value, tuple):
            return (value,) * self.levels
        if not 0 < len(value) <= self.levels:
            raise ConfigError(
                f"network.{name}: expected 1 to {self.levels} entries, one per level of "
                f"network.down, got {len(value)}"
            )
        return value + value[-1:] * (self.levels - len(value))


class Level(NamedTuple):
    """The options of one level; see `SkipConfig`."""

    down: int
    up: int
    skip: int
    kernel_down: int
    kernel_up: int
    kernel_skip: int
    upsample: Up
    downsample: Down


class Parameter(NamedTuple):
    """One tensor of the network: its name, shape for one fit, and initial values."""

    name: str
    shape: tuple[int, ...]
    low: float  # initial values are uniform in [low, high]
    high: float


class Skip:
    """The network: a description without state; parameters are handed in.

    Attributes:
        config: The options.
        parameters: All parameters in the order of the published module.
    """

    def __init__(self, config: SkipConfig) -> None:
        self.config = config
        self.parameters = tuple(self._describe())

    def _describe(self) -> Iterator[Parameter]:
        config = self.config
        levels = [config.level(i) for i in range(config.levels)]

        def visit(index: int, inputs: int) -> Iterator[Parameter]:
            level, name = levels[index], f"level{index}"
            if level.skip:
                yield from self._block(f"{name}.skip", inputs, level.skip, level.kernel_skip)
            yield from self._block(f"{name}.down", inputs, level.down, level.kernel_down)
            yield from self._block(f"{name}.conv", level.down, level.down, level.kernel_down)
            deep = level.down
            if index + 1 < config.levels:
                yield from visit(index + 1, level.down)
                deep = levels[index + 1].up
            yield from self._norm(f"{name}.join", level.skip + deep)
            yield from self._block(f"{name}.up", level.skip + deep, level.up, level.kernel_up)
            if config.conv1x1_up:
                yield from self._block(f"{name}.one", level.up, level.up, 1)

        yield from visit(0, config.inputs)
        yield from self._conv("head", levels[0].up, config.outputs, 1)

    def _block(self, name: str, inputs: int, outputs: int, size: int) -> Iterator[Parameter]:
        yield from self._conv(name, inputs, outputs, size)
        yield from self._norm(name, outputs)

    def _conv(self, name: str, inputs: int, outputs: int, size: int) -> Iterator[Parameter]:
        bound = (inputs * size * size) ** -0.5  # the default initialisation of torch.nn.Conv2d
        yield Parameter(f"{name}.weight", (outputs, inputs, size, size), -bound, bound)
        if self.config.bias:
            yield Parameter(f"{name}.bias", (outputs,), -bound, bound)

    def _norm(self, name: str, channels: int) -> Iterator[Parameter]:
        low = 0.0 if self.config.scale == "uniform" else 1.0
        yield Parameter(f"{name}.gamma", (channels,), low, 1.0)
        yield Parameter(f"{name}.beta", (channels,), 0.0, 0.0)

    def initialise(self, seed: int) -> Tensor:
        """Return the initial parameters of one fit, torch.nn's, [P] float32 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for parameter in self.parameters:
            values = torch.full(parameter.shape, parameter.high)
            if parameter.low < parameter.high:
                values.uniform_(parameter.low, parameter.high, generator=generator)
            parts.append(values.flatten())
        return torch.cat(parts)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut flat parameters [F, P] into views [F, ...published shape], in order."""
        views, start = [], 0
        for parameter in self.parameters:
            count = torch.Size(parameter.shape).numel()
            views.append(flat[:, start : start + count].view(-1, *parameter.shape))
            start += count
        return views

    def forward(self, ops: Layers[A, P], parameters: Sequence[P], x: A) -> P:
        """Draw the image, [F, C, H, W] in [0, 1] if the config has a sigmoid.

        Args:
            ops: The op set that computes, or records.
            parameters: Tensors [F, ...published shape], in order; or what `ops` takes for them.
            x: The network's input, as `ops.perturb` returns it. Without skips both its sides must
                be multiples of 2^levels for the image to have its size.
        """
        config, take = self.config, iter(parameters)

        def conv() -> tuple[P, P | None]:
            return next(take), next(take) if config.bias else None

        def norm() -> tuple[P, P]:
            return next(take), next(take)

        def visit(index: int, x: A) -> A:
            level = config.level(index)
            skip = None
            if level.skip:
                skip = ops.conv_norm_act(x, *conv(), *norm(), pad=config.pad, act=config.act)
            x = ops.conv_norm_act(
                x, *conv(), *norm(), stride=2, down=level.downsample, pad=config.pad, act=config.act
            )
            x = ops.conv_norm_act(x, *conv(), *norm(), pad=config.pad, act=config.act)
            if index + 1 < config.levels:
                x = visit(index + 1, x)
            x = ops.join_conv(
                skip,
                x,
                *norm(),
                *conv(),
                *norm(),
                up=level.upsample,
                pad=config.pad,
                act=config.act,
            )
            if config.conv1x1_up:
                x = ops.conv_norm_act(x, *conv(), *norm(), pad=config.pad, act=config.act)
            return x

        features = visit(0, x)
        return ops.head(features, *conv(), pad=config.pad, sigmoid=config.sigmoid)


def _check(name: str, values: Sequence[object], least: int, *, odd: bool = False) -> None:
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (odd and value % 2 == 0):  # type: ignore[operator]
            kind = "odd whole numbers" if odd else "whole numbers"
            raise ConfigError(f"network.{name}: expected {kind} of at least {least}, got {value!r}")
