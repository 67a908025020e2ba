"""A 3x3 convolution of a map of doubled pixels, as four phases on the small map.

Along an axis two pixels of the result lie between two neighbours p and q of the small map. With
taps a, b, c the earlier is (a + b) p + c q, the later a p + (b + c) q: four products, 16 along both
axes instead of 36. With s = a + b + c and d = q - p they are s p + c d and s q - a d: three
products, nine along both axes, each of which takes all pixels' channels to new ones. Nine cost more
passes over the maps: they are taken where products are dear, for many channels in float32. Rounded
to 16 bits their sums have more than twice the error of 16 products.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import fitwise

_WIDE = 64  # channels from which on the passes cost less than the products that they save


def taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which sums of taps `phases` takes of weights [F, O, C, 3, 3], for a map's type.

    Rows for `fitwise.combine`, nine or 16.
    """
    return NINE if min(weight.shape[1:3]) >= _WIDE and dtype.itemsize >= 4 else SIXTEEN


def phases(p: Tensor, sums: Tensor) -> Tensor:
    """Return the four phases of conv3x3 of p's doubled pixels, [F, 4 O, H - 1, W - 1].

    Phase 2 a + b has what lies between pixels: along H the later (a = 0) or the earlier pixel
    (a = 1), along W by b.

    Args:
        p: [F, C, H, W], in channels-last memory.
        sums: Of the weights' taps, nine or 16 as `taps` has it, [F, n, O, C].
    """
    if sums.shape[1] == len(NINE):
        y: Tensor = _Nine.apply(p, sums.to(p.dtype))  # type: ignore[no-untyped-call]
        return y
    # A tap's channels stay together, as a convolution wants its weights: [F, 4 O, 2, 2, C].
    folded = sums.unflatten(1, (4, 2, 2)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
    return fitwise.conv(p, folded.to(p.dtype).permute(0, 1, 4, 2, 3))


# Which of three taps fall on either of the two pixels that a phase sees: [phase, pixel, tap].
SEEN = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
# The same along both axes: [phase, phase, pixel, pixel] in 16 rows, [tap, tap] in nine columns.
SIXTEEN = torch.einsum("aik,bjl->abijkl", SEEN, SEEN).reshape(16, 9)

# What a pixel is multiplied by, and the difference for either phase: [product, tap].
_THREE = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
# The same along both axes: rows for pixels, differences along W, along H, and along both.
NINE = torch.kron(_THREE, _THREE)[[0, 1, 2, 3, 6, 4, 5, 7, 8]]
_SPLIT = (1, 2, 2, 4)  # of those rows


class _Nine(torch.autograd.Function):
    """Compute `phases` by nine products, whose weights are [F, 9, O, C]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, nine: Tensor) -> Tensor:
        ctx.save_for_backward(p, nine)
        weights = [part.flatten(1, 2) for part in nine.split(_SPLIT, 1)]
        below = _difference(p, 2)
        both = fitwise.multiply(_difference(below, 3), weights[3])
        four = both.unflatten(1, (2, 2, -1))
        along = fitwise.multiply(below, weights[2]).unflatten(1, (2, -1))
        for b in range(2):
            four[:, :, b] += _seen(along, b, 4)
        del below, along  # a step's memory is not to grow by what is needed only here
        along = fitwise.multiply(_difference(p, 3), weights[1]).unflatten(1, (2, -1))
        plain = fitwise.multiply(p, weights[0])
        for b in range(2):
            along[:, b] += _seen(plain, b, 3)
        for a in range(2):
            four[:, a] += _seen(along, a, 3)
        return both

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        p, nine = ctx.saved_tensors
        weights = [part.flatten(1, 2) for part in nine.split(_SPLIT, 1)]
        four = dy.unflatten(1, (2, 2, -1))
        gradients = []

        def share(of: Tensor, x: Tensor, index: int) -> Tensor:
            """Keep a weights' gradient; return that of what they were multiplied by."""
            gradients.append(fitwise.weight_gradient(of, x))
            return fitwise.multiply(of, weights[index].mT)

        along = _gathered(four[:, 0], four[:, 1], 3)
        dp = share(_gathered(along[:, 0], along[:, 1], 3), p, 0)
        _differentiate(dp, share(along.flatten(1, 2), _difference(p, 3), 1), 3)
        below = _difference(p, 2)
        along = _gathered(four[:, :, 0], four[:, :, 1], 4)
        d_below = share(along.flatten(1, 2), below, 2)
        _differentiate(d_below, share(dy, _difference(below, 3), 3), 3)
        _differentiate(dp, d_below, 2)
        return dp, torch.cat(gradients, 1).unflatten(1, nine.shape[1:3])


def _difference(x: Tensor, axis: int) -> Tensor:
    """Return by how much each pixel's next one along an axis differs."""
    length = x.shape[axis] - 1
    return x.narrow(axis, 1, length) - x.narrow(axis, 0, length)


def _differentiate(dx: Tensor, d_difference: Tensor, axis: int) -> None:
    """Add to a gradient what comes from that of `_difference`."""
    length = d_difference.shape[axis]
    dx.narrow(axis, 1, length).add_(d_difference)
    dx.narrow(axis, 0, length).sub_(d_difference)


def _seen(x: Tensor, phase: int, axis: int) -> Tensor:
    """Return the pixels that s is multiplied by in a phase along an axis: q, or p."""
    return x.narrow(axis, 1 - phase, x.shape[axis] - 1)


def _gathered(later: Tensor, earlier: Tensor, axis: int) -> Tensor:
    """Add up at each pixel what both phases saw of it; the reverse of `_seen`."""
    length = later.shape[axis]
    y = _longer(later, axis)
    y.narrow(axis, 0, 1).copy_(earlier.narrow(axis, 0, 1))
    y.narrow(axis, length, 1).copy_(later.narrow(axis, length - 1, 1))
    torch.add(
        later.narrow(axis, 0, length - 1),
        earlier.narrow(axis, 1, length - 1),
        out=y.narrow(axis, 1, length - 1),
    )
    return y


def _longer(x: Tensor, axis: int) -> Tensor:
    """Return an uninitialised map [F, ..., H, W], longer by one along an axis, channels last."""
    fits, *channels, height, width = x.shape
    height, width = height + (axis == x.dim() - 2), width + (axis == x.dim() - 1)
    return x.new_empty(fits, height, width, *channels).movedim((1, 2), (-2, -1))


@functools.cache
def constant(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return constants where they are needed, copied there once."""
    return values.to(device, dtype)
