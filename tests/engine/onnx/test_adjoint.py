"""Gradients as a graph: judged against float64, as the kernels are."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.onnx.adjoint import Differentiable, depth_to_space, unpad
from flashdip.engine.onnx.fold import Folding
from flashdip.engine.onnx.graph import Graph, Value
from flashdip.kernels import reference
from tests.engine.onnx.cases import TOPOLOGIES, judge_gradients, live, shrunk


def run(graph: Graph, feeds: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())
    found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(array) for array in found]


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

    for seed in range(3):
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
        judge_gradients(network, own, exact, single)


def _the(value: Value | None) -> Value:
    assert value is not None
    return value


@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("margin", [1, 2, 4])
def test_unpad_is_the_adjoint_of_padding(margin: int, mode: str) -> None:
    """From the smallest map that can be reflected on, along both axes."""
    for side in range(margin + 1, 4 * margin + 4):
        x = torch.arange(6.0 * side).view(1, 2, 3, side).requires_grad_()
        wide = torch.nn.functional.pad(x, (margin, margin, 0, 0), mode=mode)
        dy = torch.cos(torch.arange(float(wide.numel()))).view(wide.shape)
        (expected,) = torch.autograd.grad(wide, x, dy)
        graph = Graph("unpad")
        given = graph.input("dy", dy.shape)
        turned = given.transpose(0, 1, 3, 2)
        name = "edge" if mode == "replicate" else mode
        graph.output(unpad(given, 3, margin, name), "columns")
        graph.output(unpad(turned, 2, margin, name), "rows")
        columns, rows = run(graph, {"dy": dy})
        torch.testing.assert_close(columns, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows.transpose(2, 3), expected, rtol=1e-6, atol=1e-6)


def test_depth_to_space_is_onnxs() -> None:
    x = torch.arange(1.0 * 4 * 3 * 5 * 7).view(1, 12, 5, 7)
    graph = Graph("phases")
    value = graph.input("x", x.shape)
    graph.output(depth_to_space(value), "own")
    graph.output(graph.node("DepthToSpace", value, blocksize=2), "onnx")
    assert torch.equal(*run(graph, {"x": x}))


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
