"""An op set that computes nothing: it writes a network's forward pass into an ONNX graph.

Maps are values [1, C, H, W] of the graph; parameters are values of the published shapes, without
an axis of fits. Batch normalisation over a batch of one is ONNX's InstanceNormalization, so that
the graph is exact. Operators are those of the standard domain that TensorRT takes.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from flashdip.engine.onnx.graph import Array, Value
from flashdip.kernels import resample
from flashdip.kernels.opset import EPS, SLOPE, Activation, Down, Pad, Up


class Forward:
    """`Layers` on the values of a graph; what each returns belongs to that of its arguments."""

    def conv_norm_act(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        gamma: Value,
        beta: Value,
        *,
        stride: int = 1,
        down: Down = "stride",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Value:
        """Convolve, normalise each channel over (H, W), activate; see `Layers.conv_norm_act`.

        The bias is left out: the norm takes it away.
        """
        if stride == 1 or down == "stride":
            y = self.conv(x, weight, None, stride, pad)
        else:
            y = self.pool(self.conv(x, weight, None, 1, pad), down)
        return self.activate(self.norm(y, gamma, beta), act)

    def join_conv(
        self,
        skip: Value | None,
        deep: Value,
        join_gamma: Value,
        join_beta: Value,
        weight: Value,
        bias: Value | None,
        gamma: Value,
        beta: Value,
        *,
        up: Up = "bilinear",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Value:
        """Upsample, concatenate, normalise, convolve, normalise, activate; see `Layers`."""
        joined = self.enlarge(deep, up)
        if skip is not None:
            joined = self.concatenate(skip, joined)
        joined = self.norm(joined, join_gamma, join_beta)
        return self.conv_norm_act(joined, weight, bias, gamma, beta, pad=pad, act=act)

    def head(
        self,
        x: Value,
        weight: Value,
        bias: Value | None,
        *,
        pad: Pad = "reflection",
        sigmoid: bool = True,
    ) -> Value:
        """Convolve to the image's channels; see `Layers.head`."""
        y = self.conv(x, weight, bias, 1, pad)
        return self.sigmoid(y) if sigmoid else y

    def conv(self, x: Value, weight: Value, bias: Value | None, stride: int, pad: Pad) -> Value:
        """Convolve, padded so that a stride of 1 keeps the size."""
        x, margin = padded(x, weight.shape[-1] // 2, pad)
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return x.graph.node("Conv", *inputs, strides=(stride,) * 2, pads=(margin,) * 4)

    def norm(self, x: Value, gamma: Value, beta: Value) -> Value:
        """Normalise each channel over (H, W), then scale and shift it."""
        return x.graph.node("InstanceNormalization", x, gamma, beta, epsilon=EPS)

    def activate(self, x: Value, act: Activation) -> Value:
        """Apply the activation function."""
        match act:
            case "LeakyReLU":
                return x.graph.node("LeakyRelu", x, alpha=SLOPE)
            case "Swish":
                return x * x.graph.node("Sigmoid", x)
            case "ELU":
                return x.graph.node("Elu", x)
            case "none":
                return x

    def sigmoid(self, x: Value) -> Value:
        """Map to (0, 1)."""
        return x.graph.node("Sigmoid", x)

    def pool(self, x: Value, down: Down) -> Value:
        """Halve the sides, rounded down."""
        if down in ("avg", "max"):
            op = "AveragePool" if down == "avg" else "MaxPool"
            return x.graph.node(op, x, kernel_shape=(2, 2), strides=(2, 2))
        assert down in ("lanczos2", "lanczos3")
        rows, columns = (downsampling(down, 2, side) for side in x.shape[2:])
        return x.like(rows) @ (x @ columns.T)

    def enlarge(self, x: Value, up: Up) -> Value:
        """Double the sides."""
        if up == "bilinear":
            rows, columns = (bilinear(side) for side in x.shape[2:])
            return x.like(rows) @ (x @ columns.T)
        scales = x.graph.constant(np.array([1, 1, 2, 2], np.float32))
        modes = {"mode": "nearest", "nearest_mode": "floor"}
        position = "asymmetric"
        return x.graph.node(
            "Resize", x, None, scales, coordinate_transformation_mode=position, **modes
        )

    def concatenate(self, a: Value, b: Value) -> Value:
        """Put channels together, both maps cropped centrally to the smaller size."""
        size = [min(sides) for sides in zip(a.shape[2:], b.shape[2:], strict=True)]
        parts = [x.crop(centre(x, size)) for x in (a, b)]
        return a.graph.node("Concat", *parts, axis=1)


def padded(x: Value, margin: int, pad: Pad) -> tuple[Value, int]:
    """Return the map with its reflected margin, and the zeros that a convolution adds itself."""
    if pad == "zero":
        return x, margin
    return x.pad({2: (margin, margin), 3: (margin, margin)}, "reflect"), 0


def centre(x: Value, size: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return where the central part of a size lies, by axis."""
    starts = [(own - side) // 2 for own, side in zip(x.shape[2:], size, strict=True)]
    return {
        2 + i: (start, start + side)
        for i, (start, side) in enumerate(zip(starts, size, strict=True))
    }


@functools.cache
def bilinear(side: int) -> Array:
    """Return the matrix that doubles one axis as torch's bilinear enlargement does, [2n, n]."""
    eye = torch.eye(side, dtype=torch.float64)[None]  # [1, what is 1, pixel]
    rows = torch.nn.functional.interpolate(eye, scale_factor=2, mode="linear")
    return rows[0].T.float().numpy()


@functools.cache
def downsampling(kernel: resample.Kernel, factor: int, side: int) -> Array:
    """Return the matrix that filters and thins one axis, [n // factor, n]: see `resample`."""
    eye = torch.eye(side, dtype=torch.float64)[:, :, None].expand(-1, -1, factor)
    return resample.downsample(eye, kernel, factor)[..., 0].T.float().contiguous().numpy()
