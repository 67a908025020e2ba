"""How far a kernel may be from the truth, and what its tests have in common."""

import torch
from torch import Tensor


def judge(actual: Tensor, exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> None:
    """Assert that the error is at most twice that of the same arithmetic, plainly rounded.

    Args:
        actual: What the kernel computed.
        exact: The same in float64.
        rounded: The same in float32, with rounding to `dtype` wherever an eager run would store.
        dtype: The storage type.
    """
    found = excess(actual, exact, rounded, dtype)
    assert found <= 1, f"the error is {found:.3g} times what is allowed"


def excess(actual: Tensor, exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> float:
    """Return the error as a multiple of the allowed one; arguments are those of `judge`.

    Both the root mean square and the largest error are judged; a unit in the last place of the
    result's own root mean square or largest value is allowed on top.
    """
    assert actual.shape == exact.shape == rounded.shape
    exact = exact.double()
    error, allowed = (t.double() - exact for t in (actual, rounded))
    assert error.isfinite().all()
    unit = torch.finfo(dtype).eps
    limits = {of: 2 * of(allowed) + unit * of(exact) for of in (_rms, _largest)}
    return max(
        (of(error) / limit if limit else 2.0 * bool(of(error))) for of, limit in limits.items()
    )


def round_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the storage type and back, in the forward and in the backward pass."""
    y: Tensor = _Round.apply(x, dtype)
    return y


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of NaN for a kernel to write."""
    return torch.full(shape, float("nan"), dtype=dtype)


class Scratch:
    """Memory of launches, as a plan has it: what stays is zero, all else was written by others."""

    def __init__(self) -> None:
        self.counters: list[Tensor] = []

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros; counters are remembered."""
        tensor = torch.zeros(shape, dtype=dtype)
        if dtype == torch.int32:
            self.counters.append(tensor)
        return tensor

    def share(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return what has to be written first."""
        return poisoned(shape, dtype)

    def check(self) -> None:
        """Assert that the counters are ready for the next launch."""
        assert not any(counter.any() for counter in self.counters)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy.to(ctx.dtype).to(dy.dtype), None


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
