"""A whole iteration of the fit as one ONNX graph: state in, state out.

Perturb, draw, compare, differentiate, update, average. A fit is this graph, run again and again
with each result handed back in; what it takes and gives is listed at `write_step`.
"""

import json
import math
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import UnavailableError
from flashdip.engine.networks.skip import Skip
from flashdip.engine.onnx.fold import Folding
from flashdip.engine.onnx.forward import downsampling
from flashdip.engine.onnx.graph import Graph, Value
from flashdip.engine.operators import Downsample, Identity, Mask
from flashdip.kernels import noise

if TYPE_CHECKING:
    from onnx import ModelProto

TRAINED = ("parameters", "moment1", "moment2")  # of the state, [P] each
_LANES = noise.ALIGNMENT  # the table is read in rows of so many draws


def write_step(config: FitConfig, shape: tuple[int, int, int], operator: object) -> "ModelProto":
    """Write one iteration of a fit of one image.

    Inputs, float32 where nothing is said; those with a * have a "next_..." among the outputs, to be
    handed in next:

        z             network's input, [1, inputs, H, W], at the network's size
        observation   what was measured, [1, ...]
        mask          of a `Mask`, [1, C, h, w]
        parameters *  in the order of `Skip.parameters`, [P]
        moment1 *     of Adam, [P], at first 0
        moment2 *     likewise
        average *     of the outputs, [1, C, h, w], at first 0; unless the config has none
        step *        iterations done, int64 []
        key           `noise.key` of the fit, int64 []; unless nothing is perturbed
        rate          learning rate at the start of the config's schedule, []

    Further outputs are "output", what the network drew, [1, C, h, w], its "loss", [], and "image",
    what the fit has to show for itself: the average, or the output where there is none, with the
    share of the residual that the config adds back; see `Problem.finish`.

    Args:
        config: How it is fitted; the network's outputs are the image's channels.
        shape: Of the image, (C, h, w).
        operator: `Identity`, `Mask` or `Downsample`.

    Raises:
        UnavailableError: It is another operator, which ONNX does not know.
    """
    notes = {"config": json.dumps(config.record()), "flashdip": metadata.version("flashdip")}
    return _step(config, shape, operator).model(notes)


def kept_bytes(config: FitConfig, shape: tuple[int, int, int]) -> int:
    """Return the most bytes that the step of a noisy image keeps at once; see `write_step`."""
    return _step(config, shape, Identity()).kept_bytes()


def _step(config: FitConfig, shape: tuple[int, int, int], operator: object) -> Graph:
    """Return the graph of `write_step`."""
    graph, network = Graph("flashdip_step"), Skip(config.network)
    height, width = shape[1:]
    z = graph.input("z", (1, config.network.inputs, *config.network.network_size(height, width)))
    compare = _comparison(graph, shape, operator)
    count = sum(math.prod(parameter.shape) for parameter in network.parameters)
    parameters, *moments = (graph.input(name, (count,)) for name in TRAINED)
    step = graph.input("step", (), np.int64) + 1

    x = z
    if config.perturbation:
        x = perturb(z, noise_row(graph.input("key", (), np.int64), step), config.perturbation)
    ops = Folding(x)
    views = _views(network, parameters)
    image = network.forward(ops, views, x)
    output = image.crop({2: (0, height), 3: (0, width)})
    residual, pulled = compare(output)
    loss = (residual * residual).mean((0, 1, 2, 3)).reshape()
    gradient = pulled * (2 / residual.size)
    beyond = {axis: (0, image.shape[axis] - output.shape[axis]) for axis in (2, 3)}
    ops.differentiate(image, gradient.pad(beyond))
    gradients = _flat([ops.gradient(view) for view in views], network)

    rate = graph.input("rate", ()) * _schedule(step, config)
    trained = adam(parameters, gradients, moments, step, rate, config)
    for name, value in zip(TRAINED, trained, strict=True):
        graph.output(value, f"next_{name}")
    shown = output
    if config.average is not None:
        average = graph.input("average", output.shape)
        average = average + (output - average) * (1 - config.average)
        graph.output(average, "next_average")
        shown = average / _started(step, config.average)
    if config.add_back and isinstance(operator, Identity | Mask):
        shown = shown - compare(shown)[1] * config.add_back
    graph.output(graph.node("Identity", shown), "image")
    graph.output(step, "next_step")
    graph.output(output, "output")
    graph.output(loss, "loss")
    return graph


def noise_row(key: Value, step: Value) -> Value:
    """Return which row of the table a step starts to read: `noise.offset` in rows, int64 []."""
    state = key
    for index in range(3):  # the step, and two zeros
        x = ((state + step if index == 0 else state) + noise.ADDEND) % noise.PRIME
        square = x * x % noise.PRIME
        state = square * square % noise.PRIME * x % noise.PRIME
    return state % (noise.TABLE_SIZE // _LANES)


def perturb(z: Value, row: Value, std: float) -> Value:
    """Add noise to the network's input; see `OpSet.perturb`.

    Args:
        z: [1, C, H, W].
        row: Where the table is read from, in rows.
        std: Standard deviation.
    """
    graph, (_, channels, height, width) = z.graph, z.shape
    # 16 bits hold the draws: half the size of a file.
    table = graph.constant(noise.table().numpy().astype(np.float16).reshape(-1, _LANES), "table")
    ends = (graph.constant(np.array(end)) for end in (0, -(-z.size // _LANES), 1))
    rows = graph.node("Range", *ends)
    draws = graph.node("Gather", table, (rows + row) % table.shape[0])
    draws = draws.reshape(draws.size).crop({0: (0, z.size)})
    field = draws.reshape(1, height, width, channels).transpose(0, 3, 1, 2)
    return z + graph.node("Cast", field, to=1) * std


def adam(
    parameters: Value,
    gradients: Value,
    moments: list[Value],
    step: Value,
    rate: Value,
    config: FitConfig,
) -> tuple[Value, Value, Value]:
    """Return what Adam makes of parameters and moments, all [P]; see `OpSet.adam`."""
    first, second = (
        moment * beta + of * (1 - beta)
        for moment, of, beta in zip(
            moments, (gradients, gradients * gradients), config.betas, strict=True
        )
    )
    mean, square = (_started(step, beta) for beta in config.betas)
    root = parameters.graph.node("Sqrt", second / square) + config.eps
    return parameters - first / root * (rate / mean), first, second


def _schedule(step: Value, config: FitConfig) -> Value | float:
    """Return the factor on the learning rate in this iteration: see `FitConfig.rate`."""
    graph = step.graph
    rising: Value | float = 1.0
    if config.warmup:
        risen = graph.node("Cast", step, to=1) * (1 / (config.warmup + 1))
        rising = graph.node("Min", risen, risen.like(1.0))
    if config.schedule == "constant":
        return rising
    turn = graph.node("Cast", step - 1, to=1) * (math.pi / config.iterations)
    return (0.505 + 0.495 * graph.node("Cos", turn)) * rising


def _started(step: Value, beta: float) -> Value:
    """Return 1 - beta^step, which an average that began with zero has to be divided by.

    With t = tanh(-step log(beta) / 2) it is 2 t / (1 + t): nothing cancels where beta is near 1.
    """
    half = -math.log(beta) / 2 if beta else math.inf
    graph = step.graph
    tanh = graph.node("Tanh", graph.node("Cast", step, to=1) * half)
    return 2 * tanh / (1 + tanh)


def _views(network: Skip, flat: Value) -> list[Value]:
    """Cut flat parameters, [P], into the published shapes, in order."""
    shapes = [parameter.shape for parameter in network.parameters]
    sizes = flat.graph.indices(map(math.prod, shapes))
    parts = flat.graph.nodes_of("Split", len(shapes), flat, sizes, axis=0)
    return [part.reshape(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(gradients: list[Value | None], network: Skip) -> Value:
    """Put gradients one behind another, [P]; zeros for what has no effect."""
    parts: list[Value] = []
    known = next(gradient for gradient in gradients if gradient is not None)
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        size = math.prod(parameter.shape)
        parts.append(known.like(np.zeros(size)) if gradient is None else gradient.reshape(size))
    return known.graph.node("Concat", *parts, axis=0)


def _comparison(
    graph: Graph, shape: tuple[int, int, int], operator: object
) -> Callable[[Value], tuple[Value, Value]]:
    """Declare what an output is compared with; return what compares it.

    That gives operator(output) - observation, and the same pulled back by the operator's adjoint.
    """
    measure: Callable[[Value], Value]
    pull: Callable[[Value], Value]
    measure = pull = lambda x: x
    size = (1, *shape)
    if isinstance(operator, Mask):
        mask = graph.input("mask", size)
        measure = pull = lambda x: x * mask
    elif isinstance(operator, Downsample):
        rows, columns = (downsampling(operator.kernel, operator.factor, n) for n in shape[1:])
        size = (1, shape[0], len(rows), len(columns))

        def measure(x: Value) -> Value:
            return graph.constant(rows) @ (x @ columns.T)

        def pull(x: Value) -> Value:
            return graph.constant(rows.T) @ (x @ columns)

    elif not isinstance(operator, Identity):
        raise UnavailableError(
            "backend onnx: expected the operator Identity, Mask or Downsample, which can be "
            f"written as a graph, got {type(operator).__name__}: take --backend native"
        )
    observation = graph.input("observation", size)

    def compare(output: Value) -> tuple[Value, Value]:
        residual = measure(output) - observation
        return residual, pull(residual)

    return compare
