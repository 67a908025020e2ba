"""Forward operators: how the unknown image becomes what was measured.

An operator takes an image [F, C, H, W] with values in [0, 1] to a measurement whose first axis is F
too. Any callable on tensors will do for a fit; a linear one also has an adjoint.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flashdip.engine.errors import ConfigError, ShapeError
from flashdip.kernels import resample


@runtime_checkable
class Operator(Protocol):
    """A linear operator A: <A x, y> = <x, A' y> for all x, y."""

    def __call__(self, image: Tensor, /) -> Tensor:
        """Return A x."""
        ...

    def adjoint(self, measurement: Tensor, /) -> Tensor:
        """Return A' y."""
        ...


class Identity:
    """A x = x: the image itself was measured."""

    def __call__(self, image: Tensor, /) -> Tensor:
        return image

    def adjoint(self, measurement: Tensor, /) -> Tensor:
        return measurement


class Mask:
    """A x = m x: some pixels were measured, the others read as zero.

    Args:
        mask: 1 where known and 0 where missing (or weights between), [H, W], [C, H, W] or [F, C, H,
            W] with axes of 1 where it is the same for all.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim < 2:
            raise ShapeError(f"mask: expected at least [H, W], got shape {tuple(mask.shape)}")
        self.mask = mask if mask.is_floating_point() else mask.float()

    def __call__(self, image: Tensor, /) -> Tensor:
        self.mask = self.mask.to(image)  # it moves to where the images are, once
        return self.mask * image

    def adjoint(self, measurement: Tensor, /) -> Tensor:
        return self(measurement)


class Downsample:
    """Filter and keep every `factor`-th pixel; see `flashdip.kernels.resample`.

    Args:
        factor: How many times smaller each side becomes; the image's sides must be multiples of it.
        kernel: "lanczos2" (published), "lanczos3", "gauss12", "gauss1sq2" or "box".
    """

    def __init__(self, factor: int, kernel: resample.Kernel = "lanczos2") -> None:
        if factor < 1:
            raise ConfigError(f"factor: expected a whole number of at least 1, got {factor}")
        if kernel not in resample.KERNELS:
            raise ConfigError(
                f"kernel: expected one of {', '.join(resample.KERNELS)}, got {kernel!r}"
            )
        self.factor = factor
        self.kernel = kernel

    def __call__(self, image: Tensor, /) -> Tensor:
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ShapeError(
                f"image: expected sides that are multiples of the factor {self.factor}, "
                f"got {width}x{height}"
            )
        return resample.downsample(image, self.kernel, self.factor)

    def adjoint(self, measurement: Tensor, /) -> Tensor:
        height, width = (side * self.factor for side in measurement.shape[-2:])
        image = measurement.new_zeros(*measurement.shape[:-2], height, width)
        return _transpose(self, image, measurement)


class Linear:
    """A linear operator of the user's own.

    Args:
        forward: Takes an image [F, C, H, W] to a measurement.
        adjoint: Takes a measurement to an image.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> None:
        self._forward = forward
        self._adjoint = adjoint

    def __call__(self, image: Tensor, /) -> Tensor:
        return self._forward(image)

    def adjoint(self, measurement: Tensor, /) -> Tensor:
        return self._adjoint(measurement)


class Compose:
    """A x = outer(inner(x)).

    Args:
        outer: Applied last.
        inner: Applied first.
    """

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer = outer
        self.inner = inner

    def __call__(self, image: Tensor, /) -> Tensor:
        return self.outer(self.inner(image))

    def adjoint(self, measurement: Tensor, /) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(measurement))


class Each:
    """A x = (A_1 x_1, ..., A_F x_F): every fit has an operator of its own.

    Args:
        operators: One for each fit; each takes an image [1, C, H, W], and their measurements have
            one shape.
    """

    def __init__(self, operators: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.operators = list(operators)

    def __call__(self, image: Tensor, /) -> Tensor:
        pairs = zip(self.operators, image.split(1), strict=True)
        return torch.cat([operator(part) for operator, part in pairs])


def _transpose(operator: Callable[[Tensor], Tensor], at: Tensor, measurement: Tensor) -> Tensor:
    """Apply the transpose of a linear map: its derivative, pulled back."""
    with torch.enable_grad():
        image = at.requires_grad_()
        (pulled,) = torch.autograd.grad(operator(image), image, measurement)
    return pulled
