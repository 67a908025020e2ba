"""A launch: a kernel with everything it needs, and what it costs.

A step is a list of launches, fixed before the first one runs. Tensors may be on the meta device:
then the list can be compiled ahead of time and costed, but not run.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flashdip.kernels.opset import Activation


class Allocator(Protocol):
    """Where a launch's tensors come from; see `flashdip.kernels.fused.memory`."""

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a zeroed tensor that stays for as long as the plan."""
        ...

    def share(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that is only there for the launches that have it among their arguments.

        What it holds before the first of them in every step is not specified.
        """
        ...


class Tile(NamedTuple):
    """How a kernel's work is cut for one architecture.

    Attributes:
        rows: Rows of pixels of a tile, a power of 2.
        columns: Columns of pixels, a power of 2.
        outputs: Channels that a program computes, a power of 2 from 16.
        inputs: Channels (or pixels, where pixels are summed over) of one product, from 16.
        splits: Programs that share one tile's sum.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        registers: Most that a thread may have; None leaves it to the compiler.
    """

    rows: int = 8
    columns: int = 16
    outputs: int = 128
    inputs: int = 64
    splits: int = 1
    warps: int = 8
    stages: int = 3
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What else the compiler is told."""
        return {} if self.registers is None else {"maxnreg": self.registers}

    @property
    def pixels(self) -> int:
        """Pixels of a tile."""
        return self.rows * self.columns


class Map(NamedTuple):
    """An activation as the kernels see it: value = act(raw scale + shift).

    Attributes:
        raw: [F, H, W, C], contiguous, in the storage type.
        affine: [F, 4, C] float32: scale, shift, mean, 1 / standard deviation; None: raw is the
            value.
        act: Applied after the affine; "none" without one.
    """

    raw: Tensor
    affine: Tensor | None = None
    act: Activation = "none"


class Gradient(NamedTuple):
    """A gradient behind a normalisation, as the kernels see it: dy = a du + b y + c.

    Attributes:
        du: Gradient before the activation, [F, H, W, C], in the storage type.
        y: The convolution's result, [F, H, W, C], in the storage type.
        pull: [F, 3, C] float32: a, b, c.
    """

    du: Tensor
    y: Tensor
    pull: Tensor


class Norm(NamedTuple):
    """The normalisation after a convolution, [F, C] each: views into the flat parameters.

    Rows of one tensor are as far apart as those of every other: `gamma.stride(0)`.

    Attributes:
        gamma: Scale, float32.
        beta: Shift, float32.
        dgamma: Gradient of the scale, float32.
        dbeta: Gradient of the shift, float32.
    """

    gamma: Tensor
    beta: Tensor
    dgamma: Tensor
    dbeta: Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel and all its arguments.

    Attributes:
        name: Layer and pass, such as "level0.up forward".
        kernel: The Triton function.
        grid: Programs along each axis.
        arguments: By name: tensors, numbers, or None for what is not there.
        constants: By name: the compile-time constants.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        flops: Operations that the mathematics asks for, twice the multiply-adds.
        bytes: Traffic that cannot be avoided: every element read or written, once.
        gemm: Whether the matrix units are to do the work.
        options: What else the compiler is told.
        within: Tensors that the kernel reaches through an argument that spans them.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1
    flops: int = 0
    bytes: int = 0
    gemm: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    within: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """All that it reads or writes."""
        arguments = self.arguments.values()
        return [*(a for a in arguments if isinstance(a, Tensor)), *self.within]

    def __call__(self) -> None:
        """Run on the current device, or in Triton's interpreter."""
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,
            **self.options,
        )


def size(*tensors: Tensor | None) -> int:
    """Return the bytes of tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
