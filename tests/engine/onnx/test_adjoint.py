"""Gradients as a graph: judged against float64, as the kernels are."""

from statistics import median

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.onnx.adjoint import Differentiable
from flashdip.engine.onnx.fold import Folding
from flashdip.engine.onnx.graph import Graph, Value
from flashdip.kernels import reference
from tests.engine.onnx.cases import TOPOLOGIES, excess_of_gradients, live, run, shrunk


def autograd(network: Skip, views: list[Tensor], z: Tensor, slope: Tensor) -> list[Tensor]:
    """Gradients of the image's sum, weighted by `slope`, by torch."""
    leaves = [v.to(z.dtype).requires_grad_() for v in views]
    image = network.forward(reference, leaves, z)
    grads = torch.autograd.grad((image * slope.to(z)).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads, strict=True)]


@pytest.mark.parametrize("config", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("size", [(24, 16), (21, 27)])
@pytest.mark.parametrize("kind", [Differentiable, Folding])
def test_gradients(config: SkipConfig, size: tuple[int, int], kind: type[Differentiable]) -> None:
    """At most twice as far from float64 as torch's in float32."""
    network = Skip(shrunk(config))
    if not all(config.level(i).skip for i in range(config.levels)):
        size = network.config.network_size(*size)
    graph = Graph("gradients")
    x = graph.input("z", (1, network.config.inputs, *size))
    parameters = [graph.input(p.name, p.shape) for p in network.parameters]
    ops = kind(x)
    image = network.forward(ops, parameters, x)
    slope = torch.cos(0.7 * torch.arange(image.size)).view(image.shape)
    ops.differentiate(image, graph.constant(slope.numpy()))
    gradients = {p.name: ops.gradient(p) for p in parameters}
    names = [name for name, value in gradients.items() if value is not None]
    for name in names:
        graph.output(_the(gradients[name]), f"d/{name}")
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())

    excesses = []
    for seed in range(5):
        flat, z = live(network, size, seed)
        views = network.views(flat)
        feeds = {p.name: v[0].numpy() for p, v in zip(network.parameters, views, strict=True)}
        results = session.run(None, feeds | {"z": z.numpy()})
        found = dict(zip(names, map(torch.from_numpy, results), strict=True))
        exact, single = (autograd(network, views, t, slope) for t in (z.double(), z))
        own = []
        for parameter, true in zip(network.parameters, exact, strict=True):
            own.append(found.get(parameter.name, torch.zeros(parameter.shape)))
            assert own[-1].shape == parameter.shape
            if parameter.name not in found:
                assert parameter.name.endswith(".bias")  # a norm follows
                assert float(true.abs().max()) < 1e-9
        excesses.append(excess_of_gradients(network, own, exact, single))
    assert median(excesses) <= 1, excesses


def _the(value: Value | None) -> Value:
    assert value is not None
    return value


def test_a_pixel_that_is_the_largest_twice_gets_its_gradient_once() -> None:
    """The first of them, as in torch."""
    x = torch.ones(1, 1, 4, 6)
    graph = Graph("pool")
    value = graph.input("x", x.shape)
    ops = Differentiable()
    y = ops.pool(value, "max")
    ops.differentiate(y, graph.constant(np.ones(y.shape, np.float32)))
    graph.output(_the(ops.gradient(value)), "dx")
    leaf = x.clone().requires_grad_()
    torch.nn.functional.max_pool2d(leaf, 2).sum().backward()
    assert torch.equal(run(graph, {"x": x})[0], _gradient(leaf))


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
