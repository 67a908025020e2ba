"""The Triton kernels' rounding on a CPU: an op set in float32 that rounds wherever they store.

Not where an eager run would store: activations are rounded after the convolution and again as they
enter a product; maps whose join is folded are never stored enlarged, but folded weights, the map
before the bilinear filter and the parts of a skip's gradient are. Statistics, sums, master weights
and Adam stay float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.config import FitConfig
from flashdip.engine.problems import Problem
from flashdip.kernels import native, reference
from flashdip.kernels.fused.record import THIN
from flashdip.kernels.opset import EPS, Activation, Down, Pad, Up

# Which of three taps are summed for the two pixels of the small map that a phase of the doubled one
# sees: [phase, pixel, tap]. The odd phase comes first: `_double` wants it so.
_FOLDED = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]])
_FILTER = torch.outer(*[torch.tensor([1.0, 2.0, 1.0]) / 4] * 2)
_SMOOTH = torch.outer(*[torch.tensor([3.0, 10.0, 3.0]) / 16] * 2)


@dataclass
class Count:
    """What became of the numbers that were stored in one place.

    Attributes:
        stored: How many.
        overflowed: Became infinite.
        flushed: Were not zero, and became it.
        subnormal: Became subnormal.
        largest: Size of the largest, infinite if any is.
    """

    stored: int = 0
    overflowed: int = 0
    flushed: int = 0
    subnormal: int = 0
    largest: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Count(**sums | {"largest": max(self.largest, other.largest)})


class Emulated:
    """The op set; see `OpSet`. Activations are values, rounded.

    Where a value is stored, the gradient passes unrounded, and the other way round: each is rounded
    where the kernels store it.

    Args:
        dtype: Storage type.
        pixels: Values of one image, C H W, of which the loss is the mean.

    Attributes:
        loss_scale: Gradients are so many times larger, until Adam: as in
            `flashdip.kernels.fused.program`.
        names: Of layers, by id of their weight.
        counts: By layer and place.
    """

    def __init__(self, dtype: torch.dtype, pixels: int) -> None:
        self.dtype = dtype
        self.loss_scale = float(1 << pixels.bit_length() - 1)
        self.names: dict[int, str] = {}
        self.counts: dict[tuple[str, str], Count] = {}
        self._read: list[Tensor] = []  # maps of this step

    def perturb(
        self, z: Tensor, table: Tensor, offsets: Sequence[int], std: float, dtype: torch.dtype
    ) -> Tensor:
        """Round the input, and again with its noise."""
        self._read.clear()
        z = self._narrow(z, ("input", "value"))
        z = native.perturb(z, table, offsets, std, torch.float32)
        return self._narrow(z, ("input", "value"))

    def conv_norm_act(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        *,
        stride: int = 1,
        down: Down = "stride",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Tensor:
        """Round the weight, the result, its value and both their gradients.

        The weight's gradient of a thin 1x1 skip is summed from what makes up the result's gradient,
        which is rounded for the input's alone.
        """
        layer, pooled = self._name(weight), stride == 2 and down != "stride"
        x = self._shared(x, weight, layer)
        narrow = self._store(weight, layer, "weight")
        if layer.endswith(".skip") and weight.shape[-1] == 1 and weight.shape[1] <= THIN:
            along = self._gradient(_convolve(x, narrow.detach()), layer, "gradient")
            y = _convolve(x.detach(), narrow) + (along - along.detach())
            return self._norm_act(y, layer, gamma, beta, act, pending=True)
        y = _convolve(_padded(x, weight, pad), narrow, 1 if pooled else stride)
        if pooled:
            y = self._store(y, layer, "before pooling")
            y = reference.pool(self._gradient(y, layer, "gradient before pooling"), 2, down)
        return self._norm_act(y, layer, gamma, beta, act)

    def join_conv(
        self,
        skip: Tensor | None,
        deep: Tensor,
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
    ) -> Tensor:
        """Fold the join into weights, which are rounded; round the map before the filter.

        One that cannot be folded is rounded as a convolution's result is.
        """
        layer, smooth = self._name(weight), up == "bilinear"
        if pad == "zero" or weight.shape[-1] != 3:
            joined = F.interpolate(deep, scale_factor=2, mode=up)
            if skip is not None:
                joined = torch.cat([skip, joined], 1)
            joined = self._norm_act(joined, f"{layer}'s join", join_gamma, join_beta, "none")
            return self.conv_norm_act(joined, weight, bias, gamma, beta, pad=pad, act=act)
        shallow = weight.shape[2] - deep.shape[1]
        scale = join_gamma[:, shallow:] * torch.rsqrt(_variance(deep, smooth) + EPS)
        scaled = weight[:, :, shallow:] * scale[:, None, :, None, None]
        folded = torch.einsum("aik,bjl,fockl->foabcij", _FOLDED, _FOLDED, scaled)
        folded = self._store(folded, layer, "folded weight")
        # The gradient for fixed statistics is stored; what they add to it comes later.
        y = _double(self._gradient(deep, layer, "gradient of the input"), folded, smooth)
        if smooth:
            y = self._store(y, layer, "before the filter")
            y = self._gradient(y, layer, "gradient before the filter")
            y = _depthwise(y, _FILTER)
        if skip is not None:
            scale = join_gamma[:, :shallow] * torch.rsqrt(_variance(skip, False) + EPS)
            scaled = weight[:, :, :shallow] * scale[:, None, :, None, None]
            scaled = self._store(scaled, layer, "skip's weight")
            if shallow > THIN:
                skip = self._gradient(skip, layer, "gradient of the skip")
                add = _convolve(_padded(skip, weight, pad), scaled)
                y = y + self._store(add, layer, "skip's convolution")
            else:
                taps = F.unfold(_padded(skip, weight, pad), 3)  # [F, 9 Cs, H W]
                taps = self._gradient(taps, layer, "gradient of the skip's taps")
                y = y + (scaled.flatten(2) @ taps).view(y.shape)
        return self._norm_act(y, layer, gamma, beta, act)

    def head(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        pad: Pad = "reflection",
        sigmoid: bool = True,
    ) -> Tensor:
        """Draw the image in float32; round the gradient for both products, not for the bias."""
        layer = self._name(weight)
        y = _convolve(x, self._store(weight, layer, "weight"))
        y = self._gradient(y, layer, "gradient")
        if bias is not None:
            y = y + bias[:, :, None, None]
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * self.loss_scale)
        return torch.sigmoid(y) if sigmoid else y

    def adam(
        self,
        parameters: Tensor,
        gradients: Tensor,
        moment1: Tensor,
        moment2: Tensor,
        *,
        step: int,
        rate: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Take the loss scale off; the rest is float32."""
        native.adam(
            parameters,
            gradients / self.loss_scale,
            moment1,
            moment2,
            step=step,
            rate=rate,
            betas=betas,
            eps=eps,
        )

    def _norm_act(
        self,
        y: Tensor,
        layer: str,
        gamma: Tensor,
        beta: Tensor,
        act: Activation,
        *,
        pending: bool = False,
    ) -> Tensor:
        """Normalise and activate; the gradient of y is rounded, unless it stays pending."""
        y = self._store(y, layer, "convolution")
        y = y if pending else self._gradient(y, layer, "gradient")
        flat = y.reshape(1, -1, *y.shape[2:])
        u = F.batch_norm(flat, None, None, gamma.flatten(), beta.flatten(), True, eps=EPS)
        u = self._gradient(u.view(y.shape), layer, "gradient before the activation")
        return self._store(reference.activate(u, act), layer, "value")

    def _shared(self, x: Tensor, weight: Tensor, layer: str) -> Tensor:
        """Round the gradient that a layer leaves for another one, which reads the same map.

        A thin 1x1 convolution is computed along with the other reader's and leaves nothing.
        """
        if any(x is other for other in self._read):
            return self._gradient(x, layer, "gradient of the input")
        if weight.shape[-1] > 1 or weight.shape[1] > THIN:
            self._read.append(x)
        return x

    def _name(self, weight: Tensor) -> str:
        return self.names.get(id(weight), "")

    def _store(self, x: Tensor, layer: str, place: str) -> Tensor:
        """Round; the gradient passes as it is."""
        y: Tensor = _Store.apply(x, self._narrow, (layer, place))  # type: ignore[no-untyped-call]
        return y

    def _gradient(self, x: Tensor, layer: str, place: str) -> Tensor:
        """Pass x as it is; round its gradient."""
        y: Tensor = _Gradient.apply(x, self._narrow, (layer, place))  # type: ignore[no-untyped-call]
        return y

    def _narrow(self, x: Tensor, key: tuple[str, str]) -> Tensor:
        """Round to the storage type and back, and count what that does."""
        y = x.to(self.dtype).float()
        count, size = self.counts.setdefault(key, Count()), y.abs()
        count.stored += y.numel()
        largest = float(size.max())
        count.largest = max(count.largest, largest)
        if not math.isfinite(largest):
            count.overflowed += int(torch.count_nonzero(x.isfinite() & ~y.isfinite()))
        if small := int(torch.count_nonzero(size < torch.finfo(self.dtype).tiny)):
            left = int(torch.count_nonzero(y))
            count.flushed += int(torch.count_nonzero(x)) - left
            count.subnormal += small - (y.numel() - left)
        return y


class _Store(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, narrow: Callable[..., Tensor], key: object) -> Tensor:
        return narrow(x, key)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy, None, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, narrow: Callable[..., Tensor], key: object) -> Tensor:
        ctx.store = lambda dy: narrow(dy, key)  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.store(dy), None, None  # type: ignore[attr-defined]


def _padded(x: Tensor, weight: Tensor, pad: Pad) -> Tensor:
    margin = (weight.shape[-1] - 1) // 2
    if margin == 0:
        return x
    return F.pad(x, (margin,) * 4, mode="reflect" if pad == "reflection" else "constant")


def _convolve(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolve each fit of x [F, I, H, W] with its own weights [F, O, I, k, k]."""
    fits, outputs = weight.shape[:2]
    flat = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(flat, weight.flatten(0, 1), stride=stride, groups=fits)
    return y.view(fits, outputs, *y.shape[2:])


def _double(x: Tensor, folded: Tensor, ring: bool) -> Tensor:
    """Return conv3x3 of x with its pixels doubled, reflected at the border.

    Args:
        x: [F, I, H, W].
        folded: [F, O, 2, 2, I, 2, 2]: phases, odd before even, then pixels of the small map.
        ring: Whether the result has one more row and column at either end: those that a filter of
            three taps needs, for which the doubled map is reflected about its outermost pixels.
    """
    height, width = x.shape[2:]
    if ring:
        rows, columns = (
            torch.tensor([1, 0, *range(side), side - 1, side - 2]) for side in (height, width)
        )
        padded = x[:, :, rows][..., columns]
    else:
        padded = F.pad(x, (1,) * 4, mode="replicate")
    fits, outputs = folded.shape[:2]
    phases = _convolve(padded, folded.reshape(fits, 4 * outputs, *folded.shape[4:]))
    y = F.pixel_shuffle(phases, 2)
    if not ring:
        return y[:, :, 1:-1, 1:-1]
    # The outermost rows are of one phase; between them and the others lies one that nobody sees.
    rows, columns = (
        torch.tensor([1, *range(3, 2 * side + 3), 2 * side + 4]) for side in (height, width)
    )
    return y[:, :, rows][..., columns]


def _depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    channels = x.shape[1]
    return F.conv2d(x, kernel.expand(channels, 1, *kernel.shape), groups=channels)


def _variance(x: Tensor, smooth: bool) -> Tensor:
    """Return the variance over (H, W), [F, C]; if `smooth` that of the bilinear enlargement."""
    centred = x - x.mean((2, 3), keepdim=True)
    near = centred
    if smooth:
        near = _depthwise(F.pad(centred, (1,) * 4, mode="replicate"), _SMOOTH)
    return (centred * near).mean((2, 3))


def emulate(problem: Problem, config: FitConfig, dtype: torch.dtype) -> tuple[EagerStep, Emulated]:
    """Prepare a fit on the CPU that rounds as the kernels do; return its op set too."""
    ops = Emulated(dtype, math.prod(problem.shape))
    step = EagerStep(ops, problem, config, torch.device("cpu"), torch.float32, None)
    for leaf, parameter in zip(step.leaves, step.network.parameters, strict=True):
        ops.names[id(leaf)] = parameter.name.removesuffix(".weight")
    return step, ops
