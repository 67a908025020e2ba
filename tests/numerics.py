"""Numbers, and assertions about them, that several tests share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
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


def differentiated(y: Tensor, leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """Return a result and its gradients."""
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def convolved(arguments: Sequence[Tensor], stride: int = 1) -> list[Tensor]:
    """Return result and gradients of torch's convolution, fit by fit.

    Args:
        arguments: A map [F, I, H, W], weights [F, O, I, k, l], and the gradient of the result.
        stride: Along both axes.
    """
    *given, dy = arguments
    leaves = [t.detach().clone().requires_grad_() for t in given]
    parts = zip(leaves[0].split(1), leaves[1], strict=True)
    return differentiated(torch.cat([F.conv2d(*part, None, stride) for part in parts]), leaves, dy)


def assert_as_exact(
    found: Sequence[Tensor], others: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """Assert that errors (root mean square) are at most twice those of others."""
    for ours, theirs, right in zip(found, others, exact, strict=True):
        error, allowed = (
            float((t.double() - right).square().mean().sqrt()) for t in (ours, theirs)
        )
        assert error <= 2 * allowed + 1e-14 * float(right.abs().max())
