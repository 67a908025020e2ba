"""The layers as an eager run with 16-bit storage computes them: in float32, rounded at each store.

The yardstick for what the kernels may be off by; see `judge`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels import reference
from flashdip.kernels.opset import Activation, Down, Pad, Up
from tests.kernels.fused.judge import round_through


class Rounded:
    """`Layers` on tensors; values and gradients are rounded to `dtype` wherever one is stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

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
        """Round weights, the padded input, and what convolution, pooling, norm, activation give."""
        margin = (weight.shape[-1] - 1) // 2
        if pad == "reflection" and margin:
            x = self._store(F.pad(x, (margin,) * 4, mode="reflect"))
        step = stride if down == "stride" else 1
        y = self._store(self._convolve(x, weight, step, 0 if pad == "reflection" else margin))
        if step != stride:
            y = self._store(reference.pool(y, stride, down))
        y = self._store(reference._norm(y, gamma, beta))
        return self._store(reference.activate(y, act))

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
        """Round the enlarged map and the joined, normalised one; then as `conv_norm_act`."""
        joined = self._store(F.interpolate(deep, scale_factor=2, mode=up))
        if skip is not None:
            joined = reference.concatenate(skip, joined)
        joined = self._store(reference._norm(joined, join_gamma, join_beta))
        return self.conv_norm_act(joined, weight, bias, gamma, beta, pad=pad, act=act)

    def head(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        pad: Pad = "reflection",
        sigmoid: bool = True,
    ) -> Tensor:
        """Draw the image in float32, of rounded weights."""
        y = self._convolve(x, weight, 1, 0)
        if bias is not None:
            y = y + bias[:, :, None, None]
        return torch.sigmoid(y) if sigmoid else y

    def _store(self, x: Tensor) -> Tensor:
        return round_through(x, self.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, stride: int, margin: int) -> Tensor:
        weight = weight + (weight.to(self.dtype).to(weight.dtype) - weight).detach()
        return torch.cat(
            [F.conv2d(x[f : f + 1], weight[f], None, stride, margin) for f in range(len(weight))]
        )
