"""Gradients of single operations, in plain operators of ONNX.

Those of a convolution are another convolution, and one product of matrices, over maps that were
shifted once along each axis. At a stride of 2 both are taken over the four phases of the input,
laid into channels, where the stride is 1. Times in comments are ONNX Runtime 1.32's, on a CPU.
"""

from collections.abc import Sequence

import numpy as np

from flashdip.engine.onnx.graph import Array, Value
from flashdip.kernels.opset import SLOPE, Activation

_STEEP = 1e38  # takes any normal float32 beyond 1, so that clipping leaves a step


def slope(x: Value, y: Value, act: Activation) -> Value:
    """Return the slope of an activation function, y = act(x)."""
    graph = x.graph
    if act == "Swish":
        gate = graph.node("Sigmoid", x)
        return gate + y * (1 - gate)
    if act == "ELU":
        return graph.node("Min", y, y.like(0)) + 1
    # Where and PRelu say the same, at fifty times the cost (measured).
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
        inputs, outputs, seen = x.shape[1], dy.shape[1], strided(size)
        taps = weight_gradient(space_to_depth(x, dy, size), dy, seen.shape[1], 1)
        return from_phases(
            taps.reshape(outputs, 4, inputs, seen.shape[1] ** 2).transpose(0, 2, 1, 3), seen
        )
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
        seen = strided(size)
        half = seen.shape[1]
        taps = to_phases(weight, seen).transpose(0, 2, 1, 3)
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


def to_phases(weight: Value, seen: Array) -> Value:
    """Return what kernels have at the pixels that each of four phases sees: [O, I, 4, p p].

    Args:
        weight: [O, I, k, k].
        seen: How much of a tap falls on a pixel along one axis, [phase, pixel, tap]: [2, p, k].
    """
    outputs, inputs, size, _ = weight.shape
    pixels = weight.reshape(outputs * inputs, size * size) @ _both_axes(seen)
    return pixels.reshape(outputs, inputs, 4, seen.shape[1] ** 2)


def from_phases(pixels: Value, seen: Array) -> Value:
    """Apply the adjoint of `to_phases`: [O, I, 4, p p] to [O, I, k, k]."""
    outputs, inputs, size = *pixels.shape[:2], seen.shape[2]
    taps = pixels.reshape(outputs * inputs, 4 * seen.shape[1] ** 2) @ _both_axes(seen).T
    return taps.reshape(outputs, inputs, size, size)


def _both_axes(seen: Array) -> Array:
    pixels: Array = np.einsum("aik,bjl->klabij", seen, seen)
    return pixels.reshape(seen.shape[2] ** 2, -1)


def strided(size: int) -> Array:
    """Return what the phases of a stride of 2 see: pixel i of phase a is tap 2i + a."""
    pixels = np.arange((size + 1) // 2)
    return np.stack([np.eye(size + 1)[2 * pixels + phase, :size] for phase in (0, 1)])


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
