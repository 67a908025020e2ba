"""Torch calls whose parameters each fit has for itself, for the op set `native`.

With one fit nothing is cut out or put together: that would cost copies in the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import shifted
from flashdip.kernels.opset import EPS

_FEW = 1024  # pixels, below which BLAS multiplies faster than oneDNN


def conv(x: Tensor, weight: Tensor, stride: int = 1, margin: int = 0) -> Tensor:
    """Convolve each fit of x [F, I, H, W] with its own weights [F, O, I, k, l]."""
    weights = [weight.squeeze(0)] if len(x) == 1 else weight.unbind()
    maps = [x] if len(x) == 1 else x.split(1)
    pairs = zip(maps, weights, strict=True)
    if margin == 0 and shifted.pays(x, weight, stride):
        return _joined([_Shifted.apply(*pair, stride) for pair in pairs])  # type: ignore[no-untyped-call]
    return _joined([F.conv2d(own, w, None, stride, margin) for own, w in pairs])


class _Shifted(torch.autograd.Function):
    """Convolve x [1, I, H, W] with weights [O, I, k, l]; their gradient is `shifted`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], False)
        dx = _gradients(dy, x, weight, wanted, ctx.stride)[0] if wanted[0] else None
        return dx, shifted.weight_gradient(dy, x, weight.shape[2:], ctx.stride), None


def product(x: Tensor, weight: Tensor, blas: bool = False) -> Tensor:
    """Multiply the channels of each pixel, x [F, I, H, W], by the fit's weights [F, O, I].

    Args:
        x: In channels-last memory.
        weight: In the map's dtype.
        blas: Whether BLAS does it at any size; see `multiply`.
    """
    y: Tensor = _Product.apply(x, weight, blas)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """See `product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, blas: bool) -> Tensor:
        ctx.blas = blas
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, blas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        d_weight = weight_gradient(dy, x, ctx.blas)
        del x  # which may have been made for this only
        dx = multiply(dy, weight.mT, ctx.blas) if ctx.needs_input_grad[0] else None
        return dx, d_weight, None


def multiply(x: Tensor, weight: Tensor, blas: bool = False) -> Tensor:
    """Compute `product`, without a record for autograd.

    Each line of pixels is convolved as an image of its own. That changes nothing but the library:
    torch hands matrix products, and 1x1 convolutions of a single image on one thread, to its BLAS
    in float32; in oneDNN they are 2.4 times as fast on a Zen 5 core. Of small maps a call costs
    more than the product, and BLAS has the cheaper one (measured).
    """
    if blas or x.shape[2] * x.shape[3] < _FEW:
        return _pixels(torch.bmm(_rows(x), weight.mT), x)
    parts = [F.conv2d(_lines(own), w[:, :, None, None]) for own, w in zip(x, weight, strict=True)]
    pixels = [y.permute(0, 2, 3, 1).flatten(0, 1)[None] for y in parts]  # [1, H, W, O]
    return _joined(pixels).permute(0, 3, 1, 2)


def weight_gradient(dy: Tensor, x: Tensor, blas: bool = False) -> Tensor:
    """Return the gradient of `product`'s weights, [F, O, I].

    Without AVX-512 BLAS has it sooner at any size: 35 ms against 40 at 128 channels and 256x256
    pixels, on a Zen 3 core (measured).
    """
    if blas or x.shape[2] * x.shape[3] < _FEW or shifted.avx2_at_best():
        return torch.bmm(_rows(dy).mT, _rows(x))
    parts = []
    for of, own in zip(dy, x, strict=True):
        weight = own.new_empty(len(of), len(own), 1, 1)
        parts.append(_gradients(_lines(of), _lines(own), weight, (False, True))[1])
    return torch.stack(parts).flatten(2)


def conv_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, of_map: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of `conv`'s map, if wanted, and of its weights.

    At stride 1 and without a margin.
    """
    parts = zip(dy.split(1), x.split(1), weight, strict=True)
    maps, weights, _ = zip(*(_gradients(*part, (of_map, True)) for part in parts), strict=True)
    return _joined(list(maps)) if of_map else None, torch.stack(weights)


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool], stride: int = 1
) -> list[Tensor]:
    """Return the gradients of a map and of weights [O, I, k, l], of those that are wanted."""
    gradients: list[Tensor] = torch.ops.aten.convolution_backward(
        dy, x, weight, None, (stride, stride), (0, 0), (1, 1), False, (0, 0), 1, (*wanted, False)
    )
    return gradients


def combine(weight: Tensor, taps: Tensor) -> Tensor:
    """Return sums of the taps of weights [F, O, I, 3, 3], taken as rows of [n, 9]: [F, n, O, I]."""
    columns = weight.flatten(3).flatten(1, 2).mT  # [F, 9, O I]
    sums: Tensor = torch.matmul(taps, columns).unflatten(2, weight.shape[1:3])
    return sums


def _rows(x: Tensor) -> Tensor:
    """View a map in channels-last memory as a matrix of its pixels, [F, H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pixels(rows: Tensor, like: Tensor) -> Tensor:
    """View a matrix of pixels [F, H W, C] as a map of the height and width of another."""
    y: Tensor = rows.unflatten(1, like.shape[2:])
    return y.permute(0, 3, 1, 2)


def _lines(x: Tensor) -> Tensor:
    """View a map [C, H, W] as H images of one line, [H, C, 1, W]."""
    return x.permute(1, 0, 2)[:, :, None]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise each channel of x [F, C, H, W] over (H, W); gamma and beta are [F, C]."""
    if len(x) == 1:
        return F.batch_norm(x, None, None, gamma.squeeze(0), beta.squeeze(0), True, eps=EPS)
    return torch.cat(
        [
            F.batch_norm(x[f : f + 1], None, None, gamma[f], beta[f], True, eps=EPS)
            for f in range(len(x))
        ]
    )


def norm_(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `norm` in place; return means and reciprocal standard deviations, [F, C]."""
    mean, root = torch.empty_like(gamma), torch.empty_like(gamma)
    for own, g, b, m, r in zip(x.split(1), gamma, beta, mean, root, strict=True):
        torch.ops.aten.native_batch_norm.out(
            own, g, b, None, None, True, 0.0, EPS, out=own, save_mean=m, save_invstd=r
        )
    return mean, root


def norm_gradients(
    dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `norm`'s x, gamma and beta, of its statistics, [F, C] each."""
    parts = [
        torch.ops.aten.native_batch_norm_backward(
            of, own, g, None, None, m, r, True, EPS, (True, True, True)
        )
        for of, own, g, m, r in zip(dy.split(1), x.split(1), gamma, mean, root, strict=True)
    ]
    dx, d_gamma, d_beta = zip(*parts, strict=True)
    return _joined(list(dx)), torch.stack(d_gamma), torch.stack(d_beta)


def sums(y: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over (H, W) of y and of y (x - mean), [F, C] in the type of `mean`.

    A norm's backward pass takes both in one go, without a product of maps.
    """
    one = torch.ones_like(mean[0])
    parts = [
        torch.ops.aten.native_batch_norm_backward(
            of, own, one, None, None, centre, one, True, EPS, (False, True, True)
        )
        for of, own, centre in zip(y.split(1), x.split(1), mean, strict=True)
    ]
    return torch.stack([part[2] for part in parts]), torch.stack([part[1] for part in parts])


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x scale + shift, rounded once; x is [F, C, H, W], the others [F, C] in float32.

    That is a norm with statistics of 0 and 1, which torch computes in one pass.
    """
    still, one = torch.zeros_like(scale[0]), torch.ones_like(scale[0])
    parts = [
        F.batch_norm(x[f : f + 1], still, one, scale[f], shift[f], False, eps=0.0)
        for f in range(len(x))
    ]
    return _joined(parts)
