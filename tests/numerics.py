"""Assertions about numbers that several tests share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class _Linear(Protocol):
    def __call__(self, image: Tensor, /) -> Tensor: ...
    def adjoint(self, measurement: Tensor, /) -> Tensor: ...


def assert_adjoint(operator: _Linear, shape: Sequence[int], *, seed: int = 0) -> None:
    """Assert linearity and <A x, y> = <x, A' y> in float64, for random x and y."""
    draw = _normal(seed)
    x, other = draw(shape), draw(shape)
    measured = operator(x)
    y = draw(measured.shape)
    torch.testing.assert_close(operator(2 * x + other), 2 * measured + operator(other))
    left, right = (measured * y).sum(), (x * operator.adjoint(y)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def _normal(seed: int) -> Callable[[Sequence[int]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
