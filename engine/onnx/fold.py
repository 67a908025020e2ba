"""Joins on the small grid: a 3x3 convolution of doubled pixels without doubling them.

Each of the four phases of its result sees 2x2 pixels of the small map: 16 products in place of 36,
and the norm before it, and all gradients, are taken of a quarter of the pixels. Reflection of the
doubled map is replication of the small one. A convolution over a concatenation is the sum of two.
"""

import numpy as np

from flashdip.engine.onnx.adjoint import Differentiable
from flashdip.engine.onnx.gradients import (
    depth_to_space,
    from_phases,
    input_gradient,
    to_phases,
    unpad,
    weight_gradient,
)
from flashdip.engine.onnx.graph import Value
from flashdip.kernels.opset import Activation, Pad, Up

# Which of three taps fall on either of the two pixels that a phase sees: [phase, pixel, tap]. The
# odd phase comes first, as the grid of phases begins one pixel before the map.
_SEEN = np.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])


class Folding(Differentiable):
    """`Differentiable` with joins on the small grid where they enlarge by doubling pixels."""

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
        even = skip is None or skip.shape[2:] == tuple(2 * side for side in deep.shape[2:])
        if up != "nearest" or not even or weight.shape[-1] != 3:
            own = (join_gamma, join_beta, weight, bias, gamma, beta)
            return super().join_conv(skip, deep, *own, up=up, pad=pad, act=act)
        total = weight.shape[1]
        shallow = total - deep.shape[1]
        scale, shift = (self.part(of, 0, shallow, total) for of in (join_gamma, join_beta))
        y = self.enlarged_conv(
            self.norm(deep, scale, shift), self.part(weight, 1, shallow, total), pad
        )
        if skip is not None:
            scale, shift = (self.part(of, 0, 0, shallow) for of in (join_gamma, join_beta))
            thin = self.norm(skip, scale, shift)
            y = self.add(y, self.conv(thin, self.part(weight, 1, 0, shallow), None, 1, pad))
        return self.activate(self.norm(y, gamma, beta), act)

    def enlarged_conv(self, x: Value, weight: Value, pad: Pad) -> Value:
        """Convolve the map whose pixels are those of x, doubled.

        Args:
            x: [1, I, H, W].
            weight: [O, I, 3, 3].
            pad: Of the doubled map.

        Returns:
            [1, O, 2H, 2W].
        """
        outputs, inputs = weight.shape[:2]
        mode = "edge" if pad == "reflection" else "constant"
        small = x.pad({2: (1, 1), 3: (1, 1)}, mode)
        folded = to_phases(weight, _SEEN).transpose(2, 0, 1, 3).reshape(4 * outputs, inputs, 2, 2)
        phases = x.graph.node("Conv", small, folded)  # [1, 4 O, H + 1, W + 1]
        ring = {axis: (1, 1 + 2 * x.shape[axis]) for axis in (2, 3)}
        y = depth_to_space(phases).crop(ring)

        def adjoint(dy: Value) -> None:
            around = dy.pad({2: (1, 1), 3: (1, 1)})
            dphases = x.graph.node("SpaceToDepth", around, blocksize=2)
            taps = weight_gradient(small, dphases, 2, 1).reshape(4, outputs, inputs, 4)
            self.add_gradient(weight, from_phases(taps.transpose(1, 2, 0, 3), _SEEN))
            dx = input_gradient(dphases, folded, 1, small.shape[2:])
            self.add_gradient(x, unpad(unpad(dx, 2, 1, mode), 3, 1, mode))

        return self.follow(y, adjoint)

    def part(self, x: Value, axis: int, start: int, end: int) -> Value:
        """Return a part of a parameter."""
        y = x.crop({axis: (start, end)})
        if y is x:
            return x
        beyond = {axis: (start, x.shape[axis] - end)}
        return self.follow(y, lambda dy: self.add_gradient(x, dy.pad(beyond)))

    def add(self, a: Value, b: Value) -> Value:
        """Add two maps."""

        def adjoint(dy: Value) -> None:
            self.add_gradient(a, dy)
            self.add_gradient(b, dy)

        return self.follow(a + b, adjoint)
