"""Operators: adjoints, shapes, errors."""

import pytest
import torch
from torch import Tensor

from flashdip.engine.errors import ConfigError, ShapeError
from flashdip.engine.operators import Compose, Downsample, Identity, Linear, Mask, Operator
from flashdip.kernels.resample import KERNELS, Kernel
from tests.numerics import assert_adjoint

MASK = (torch.arange(35).view(5, 7) % 3 > 0).float()


def blur(image: Tensor) -> Tensor:
    """A circular shift average: a user's own operator."""
    return (image + image.roll(1, -1)) / 2


def blur_adjoint(image: Tensor) -> Tensor:
    """Its transpose."""
    return (image + image.roll(-1, -1)) / 2


@pytest.mark.parametrize(
    "operator",
    [Identity(), Mask(MASK), Mask(MASK.bool()), Linear(blur, blur_adjoint)],
    ids=["identity", "mask", "mask-bool", "linear"],
)
def test_adjoint(operator: Operator) -> None:
    """<A x, y> = <x, A' y>."""
    assert_adjoint(operator, (2, 3, 5, 7))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downsample_adjoint(kernel: Kernel, factor: int) -> None:
    """The same for every kernel, at even and odd factors, and behind a mask."""
    assert_adjoint(Downsample(factor, kernel), (2, 3, 6 * factor, 5 * factor))
    mask = (torch.arange(30).view(6, 5) % 4 > 0).float()
    both = Compose(Mask(mask), Downsample(factor, kernel))
    assert_adjoint(both, (1, 2, 6 * factor, 5 * factor))


def test_compose_applies_the_inner_first() -> None:
    """The order of composition."""
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    double = Linear(lambda t: 2 * t, lambda t: 2 * t)
    small = Downsample(2)
    assert torch.equal(Compose(double, small)(x), 2 * small(x))


def test_errors_name_what_came() -> None:
    """One line each."""
    with pytest.raises(ShapeError, match="multiples of the factor 4, got 10x8"):
        Downsample(4)(torch.zeros(1, 1, 8, 10))
    with pytest.raises(ConfigError, match="factor: expected a whole number of at least 1, got 0"):
        Downsample(0)
    with pytest.raises(ConfigError, match="kernel: expected one of lanczos2"):
        Downsample(2, "cubic")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="mask: expected at least"):
        Mask(torch.ones(3))
