"""The forward pass again, where each operation also knows how its adjoint is written.

Nothing is traced or derived: `Differentiable` has the primitives of `Forward`, and beside each its
adjoint in plain operators.
"""

from collections.abc import Callable

from flashdip.engine.onnx.forward import Forward, bilinear, centre, downsampling
from flashdip.engine.onnx.gradients import (
    add_up,
    input_gradient,
    slope,
    unpad,
    unpool,
    weight_gradient,
)
from flashdip.engine.onnx.graph import Value
from flashdip.kernels.opset import EPS, Activation, Down, Pad, Up


class Differentiable(Forward):
    """`Layers` on the values of a graph, which can be differentiated by what they computed from.

    Args:
        fixed: Values that need no gradient: the network's input.
    """

    def __init__(self, *fixed: Value) -> None:
        self.fixed = set(fixed)
        self._adjoints: list[tuple[Value, Callable[[Value], None]]] = []
        self._gradients: dict[Value, Value] = {}

    def differentiate(self, y: Value, gradient: Value) -> None:
        """Write the gradients of a scalar by all that y was computed from, given that by y."""
        self.add_gradient(y, gradient)
        for value, adjoint in reversed(self._adjoints):
            if value in self._gradients:
                adjoint(self._gradients.pop(value))

    def gradient(self, of: Value) -> Value | None:
        """Return what `differentiate` found for a parameter; None: it has no effect."""
        return self._gradients.get(of)

    def add_gradient(self, of: Value, gradient: Value) -> None:
        """Add a part of the gradient by a value."""
        if of in self.fixed:
            return
        before = self._gradients.get(of)
        self._gradients[of] = gradient if before is None else before + gradient

    def follow(self, y: Value, adjoint: Callable[[Value], None]) -> Value:
        """Remember what to do with the gradient by y; return y."""
        self._adjoints.append((y, adjoint))
        return y

    def conv(self, x: Value, weight: Value, bias: Value | None, stride: int, pad: Pad) -> Value:
        """Convolve; see `Forward.conv`."""
        margin = weight.shape[-1] // 2
        mode = "reflect" if pad == "reflection" else "constant"
        full = x.pad({2: (margin, margin), 3: (margin, margin)}, mode)
        inputs = (full, weight) if bias is None else (full, weight, bias)
        y = x.graph.node("Conv", *inputs, strides=(stride,) * 2)

        def adjoint(dy: Value) -> None:
            if bias is not None:
                self.add_gradient(bias, dy.sum((0, 2, 3)).reshape(*bias.shape))
            self.add_gradient(weight, weight_gradient(full, dy, weight.shape[-1], stride))
            if x in self.fixed:
                return
            dx = input_gradient(dy, weight, stride, full.shape[2:])
            self.add_gradient(x, unpad(unpad(dx, 2, margin, mode), 3, margin, mode))

        return self.follow(y, adjoint)

    def norm(self, x: Value, gamma: Value, beta: Value) -> Value:
        """Normalise each channel over (H, W), then scale and shift it."""
        channels, count = x.shape[1], x.shape[2] * x.shape[3]
        scale, shift = (parameter.reshape(1, channels, 1, 1) for parameter in (gamma, beta))
        centred = x - x.mean((2, 3))
        root = x.graph.node("Sqrt", add_up(centred * centred) / count + EPS)
        factor = scale / root  # [1, C, 1, 1]
        y = centred * factor + shift

        def adjoint(dy: Value) -> None:
            total, along = add_up(dy), add_up(dy * centred) / root
            self.add_gradient(beta, total.reshape(channels))
            self.add_gradient(gamma, along.reshape(channels))
            # What changes the mean or the variance has no effect.
            within = centred * (along / root / -count) + total / -count
            self.add_gradient(x, (dy + within) * factor)

        return self.follow(y, adjoint)

    def activate(self, x: Value, act: Activation) -> Value:
        """Apply the activation function."""
        y = super().activate(x, act)
        if act == "none":
            return y
        return self.follow(y, lambda dy: self.add_gradient(x, dy * slope(x, y, act)))

    def sigmoid(self, x: Value) -> Value:
        """Map to (0, 1)."""
        y = super().sigmoid(x)
        return self.follow(y, lambda dy: self.add_gradient(x, dy * (y * (1 - y))))

    def pool(self, x: Value, down: Down) -> Value:
        """Halve the sides, rounded down."""
        y = super().pool(x, down)

        def adjoint(dy: Value) -> None:
            if down in ("lanczos2", "lanczos3"):
                rows, columns = (downsampling(down, 2, side) for side in x.shape[2:])
                self.add_gradient(x, x.like(rows.T) @ (dy @ columns))
                return
            odd = {axis: (0, x.shape[axis] % 2) for axis in (2, 3)}
            if down == "avg":
                self.add_gradient(x, (Forward.enlarge(self, dy, "nearest") * 0.25).pad(odd))
                return
            whole = {axis: (0, 2 * y.shape[axis]) for axis in (2, 3)}
            self.add_gradient(x, unpool(x.crop(whole), y, dy).pad(odd))

        return self.follow(y, adjoint)

    def enlarge(self, x: Value, up: Up) -> Value:
        """Double the sides."""
        y = super().enlarge(x, up)

        def adjoint(dy: Value) -> None:
            if up == "bilinear":
                rows, columns = (bilinear(side) for side in x.shape[2:])
                self.add_gradient(x, x.like(rows.T) @ (dy @ columns))
            else:
                self.add_gradient(x, 4 * Forward.pool(self, dy, "avg"))

        return self.follow(y, adjoint)

    def concatenate(self, a: Value, b: Value) -> Value:
        """Put channels together, both maps cropped centrally to the smaller size."""
        y = super().concatenate(a, b)

        def adjoint(dy: Value) -> None:
            start = 0
            for x in (a, b):
                own = dy.crop({1: (start, start + x.shape[1])})
                spans = centre(x, y.shape[2:])
                self.add_gradient(
                    x, own.pad({i: (s, x.shape[i] - e) for i, (s, e) in spans.items()})
                )
                start += x.shape[1]

        return self.follow(y, adjoint)
