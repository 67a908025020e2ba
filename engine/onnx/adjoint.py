"""The forward pass again, where each operation also knows how its adjoint is written.

Nothing is traced or derived: `Differentiable` has the primitives of `Forward`, and beside each its
adjoint in plain operators. The gradients of a convolution are another convolution, and one product
of matrices, over maps that were shifted once along each axis.
"""

from collections.abc import Callable, Sequence

import numpy as np

from flashdip.engine.onnx.forward import Forward, bilinear, centre, downsampling
from flashdip.engine.onnx.graph import Value
from flashdip.kernels.opset import EPS, SLOPE, Activation, Down, Pad, Up

_STEEP = 1e38  # takes any normal float32 beyond 1, so that clipping leaves a step


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


def slope(x: Value, y: Value, act: Activation) -> Value:
    """Return the slope of an activation function, y = act(x)."""
    graph = x.graph
    if act == "Swish":
        gate = graph.node("Sigmoid", x)
        return gate + y * (1 - gate)
    if act == "ELU":
        return graph.node("Min", y, y.like(0)) + 1
    # Where and PRelu say the same, at fifty times the cost (ONNX Runtime 1.32, CPU, measured).
    ends = (y.like(end) for end in (SLOPE, 1))
    return graph.node("Clip", y * _STEEP, *ends)


def add_up(x: Value) -> Value:
    """Return the sums of a map's channels, [1, C, 1, 1].

    Rows are added up first: where much cancels, as in the gradient by a norm's scale before another
    norm, it shows how many numbers are added one by one. A product of matrices, which adds up all
    of them so, would write no map of products, and be four times as far off.
    """
    return x.sum((3,)).sum((2,))


def weight_gradient(x: Value, dy: Value, size: int, stride: int) -> Value:
    """Return the gradient by the weight, [O, I, k, k], of a convolution without padding.

    One product of matrices gives all taps: of x, shifted along the columns by 0 to k - 1, and dy,
    shifted along the rows.

    Args:
        x: Its input, [1, I, H, W].
        dy: Gradient by its output, [1, O, h, w].
        size: Of the kernel, k.
        stride: 1 or 2.
    """
    if stride == 2:
        inputs = x.shape[1]
        half = weight_gradient(space_to_depth(x, dy, size), dy, (size + 1) // 2, 1)
        # [O, (a, b, I), k', k'] holds tap (2i + a, 2j + b) at (i, j).
        taps = half.reshape(half.shape[0], 2, 2, inputs, *half.shape[2:])
        taps = taps.transpose(0, 3, 4, 1, 5, 2).reshape(half.shape[0], inputs, size + 1, size + 1)
        return taps.crop({2: (0, size), 3: (0, size)})
    graph, shifts = x.graph, range(size)
    (inputs, height), (outputs, width) = x.shape[1:3], (dy.shape[1], dy.shape[3])
    columns = [x.crop({3: (shift, shift + width)}) for shift in shifts]
    rows = [dy.pad({2: (shift, size - 1 - shift)}) for shift in shifts]
    rows = [of.reshape(outputs, 1, height * width) for of in rows]
    if size > 1:
        columns, rows = ([graph.node("Concat", *of, axis=1)] for of in (columns, rows))
    left = rows[0].reshape(outputs * size, height * width)
    right = columns[0].reshape(size * inputs, height * width)
    taps = graph.node("Gemm", left, right, transB=1)  # [(O, k), (k, I)]
    taps = taps.reshape(outputs, size * size, inputs).transpose(0, 2, 1)
    return taps.reshape(outputs, inputs, size, size)


def input_gradient(dy: Value, weight: Value, stride: int, sides: Sequence[int]) -> Value:
    """Return the gradient by the input of a convolution without padding.

    It is a convolution with the kernel turned around. At a stride of 2 each of the four phases of
    the input sees its own taps: they are channels of one convolution over dy.

    Args:
        dy: Gradient by its output, [1, O, h, w].
        weight: [O, I, k, k].
        stride: 1 or 2.
        sides: Height and width of the input.
    """
    outputs, inputs, size, _ = weight.shape
    if stride == 2:
        even = weight.pad({2: (0, 1), 3: (0, 1)})
        half = (size + 1) // 2
        taps = even.reshape(outputs, inputs, half, 2, half, 2).transpose(0, 3, 5, 1, 2, 4)
        taps = taps.reshape(outputs, 4 * inputs, half, half)
        least = [dy.shape[axis] + half - 1 for axis in (2, 3)]
        dx = depth_to_space(input_gradient(dy, taps, 1, least))
        return dx.crop({2: (0, sides[0]), 3: (0, sides[1])})
    turned = weight.transpose(1, 0, 2, 3)
    if size > 1:
        # A product of matrices takes a fifth of the time that Gather needs (measured).
        flat = turned.reshape(inputs * outputs, size * size)
        turned = (flat @ np.eye(size * size)[::-1]).reshape(*turned.shape)
    return dy.graph.node("Conv", dy, turned, pads=(size - 1,) * 4)


def space_to_depth(x: Value, dy: Value, size: int) -> Value:
    """Put the four phases of x into channels: stride 2 over x is stride 1 over them.

    Args:
        x: Input of a convolution of stride 2 without padding, [1, I, H, W].
        dy: Its output, or what has its size.
        size: Of its kernel; that over the phases is half as large, rounded up.
    """
    sides = {axis: 2 * (dy.shape[axis] + (size + 1) // 2 - 1) for axis in (2, 3)}
    whole = x.crop({axis: (0, min(side, x.shape[axis])) for axis, side in sides.items()})
    whole = whole.pad({axis: (0, side - whole.shape[axis]) for axis, side in sides.items()})
    return x.graph.node("SpaceToDepth", whole, blocksize=2)


def unpad(x: Value, axis: int, margin: int, mode: str) -> Value:
    """Apply the adjoint of padding along an axis: add the margin to what it was made of.

    Args:
        x: What has a margin.
        axis: Along which.
        margin: Its width, on either side.
        mode: How it was made: "constant", "reflect" or "edge"; see `Value.pad`.
    """
    if margin == 0:
        return x
    count = x.shape[axis] - 2 * margin
    if mode == "constant":
        return x.crop({axis: (margin, margin + count)})
    # Single rows as far as any is added to another, and what lies between them in one piece.
    edge = min(2 * margin + 1, x.shape[axis] // 2)
    middle = x.shape[axis] - 2 * edge
    sizes = [1] * edge + [middle] * (middle > 0) + [1] * edge
    rows = [int(start) - margin for start in np.cumsum([0, *sizes[:-1]])]  # in the inner map
    origins = np.pad(np.arange(count), margin, mode=mode)  # type: ignore[call-overload]
    parts = x.graph.nodes_of("Split", len(sizes), x, x.graph.indices(sizes), axis=axis)
    sums: dict[int, Value] = {}
    for row, part in zip(rows, parts, strict=True):
        origin = int(origins[row + margin])
        sums[origin] = sums[origin] + part if origin in sums else part
    return x.graph.node("Concat", *(sums[origin] for origin in sorted(sums)), axis=axis)


def depth_to_space(x: Value) -> Value:
    """Put four phases together, [1, 4 C, H, W] to [1, C, 2H, 2W]: ONNX's DepthToSpace.

    As two transpositions, columns and then rows, it takes ONNX Runtime half the time (measured).
    """
    channels, height, width = x.shape[1] // 4, *x.shape[2:]
    columns = x.reshape(2, 2, channels, height, width).transpose(0, 2, 3, 4, 1)
    rows = columns.reshape(2, channels, height, 2 * width).transpose(1, 2, 0, 3)
    return rows.reshape(1, channels, 2 * height, 2 * width)


def unpool(x: Value, y: Value, dy: Value) -> Value:
    """Give each gradient to the first of the four pixels that is the largest: [1, C, 2h, 2w].

    Args:
        x: What was pooled, [1, C, 2h, 2w].
        y: Its maxima, [1, C, h, w].
        dy: Their gradients.
    """
    graph, channels = x.graph, x.shape[1]
    phases = graph.node("SpaceToDepth", x, blocksize=2)
    parts, left = [], dy
    for phase in range(4):
        own = phases.crop({1: (phase * channels, (phase + 1) * channels)})
        largest = graph.node("Cast", graph.node("Equal", own, y), to=1)
        parts.append(left * largest)
        left = left - parts[-1]
    return depth_to_space(graph.node("Concat", *parts, axis=1))
