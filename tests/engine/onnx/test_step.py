"""The step as a graph: what it is made of, and the parts beside the network."""

import itertools
from dataclasses import replace

import onnx
import pytest
import torch

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import UnavailableError
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.onnx.graph import Graph
from flashdip.engine.onnx.step import adam, noise_row, perturb, write_step
from flashdip.engine.operators import Compose, Downsample, Identity, Mask
from flashdip.kernels import noise, reference
from tests.engine.onnx.cases import TOPOLOGIES, run
from tests.engine.onnx.documented import TENSORRT_OPERATORS, TENSORRT_OPSETS


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tensorrt_takes_every_operator(name: str) -> None:
    """At full width; of the standard domain, in versions that it knows, by its own table."""
    config = FitConfig(network=replace(TOPOLOGIES[name], outputs=3), schedule="cosine", warmup=4)
    for operator in (Identity(), Mask(torch.ones(96, 96)), Downsample(4)):
        model = write_step(config, (3, 96, 96), operator)
        assert {node.domain for node in model.graph.node} == {""}
        assert {node.op_type for node in model.graph.node} <= TENSORRT_OPERATORS
        (opset,) = model.opset_import
        assert TENSORRT_OPSETS["first"] <= opset.version <= TENSORRT_OPSETS["last"]


def test_the_default_network_at_256_pixels() -> None:
    """At most 2,500 nodes, all shapes known."""
    model = write_step(FitConfig(network=SkipConfig()), (3, 256, 256), Identity())
    assert len(model.graph.node) <= 2500
    onnx.checker.check_model(model, full_check=True)


def test_another_operator_is_refused() -> None:
    """With what to do about it."""
    twice = Compose(Identity(), Identity())
    with pytest.raises(UnavailableError, match=r"Mask or Downsample.*got Compose: take --backend"):
        write_step(FitConfig(network=SkipConfig(down=(4,))), (3, 16, 16), twice)


def test_the_perturbation_is_the_written_function() -> None:
    """The very values of the other backends, where the table wraps too."""
    z = torch.zeros(1, 3, 5, 7)
    graph = Graph("noise")
    row = graph.input("row", (), "int64")
    graph.output(perturb(graph.input("z", z.shape), row, 1.0), "noise")
    for start in (0, 8, noise.TABLE_SIZE - 24):
        expected = reference.perturb(z, noise.table(), [start], 1.0, torch.float32)
        (found,) = run(graph, {"z": z, "row": torch.tensor(start // 8)})
        assert torch.equal(found, expected)

    graph = Graph("row")
    key, step = (graph.input(name, (), "int64") for name in ("key", "step"))
    graph.output(noise_row(key, step), "row")
    for seed, retry, at in itertools.product((0, 1, (1 << 62) - 1), (0, 3), (1, 500, 99_999)):
        number = noise.key(seed, retry=retry)
        (found,) = run(graph, {"key": torch.tensor(number), "step": torch.tensor(at)})
        assert int(found) * 8 == noise.offset(number, at)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_adam_is_torchs(betas: tuple[float, float]) -> None:
    """Equal gradients in, equal parameters out, from the first step on."""
    config = FitConfig(betas=betas, eps=1e-7)
    graph = Graph("adam")
    names = ("parameters", "gradients", "moment1", "moment2")
    parameters, gradients, *moments = (graph.input(name, (50,)) for name in names)
    step, rate = graph.input("step", (), "int64"), graph.input("rate", ())
    made = adam(parameters, gradients, moments, step, rate, config)
    for value, name in zip(made, ("p", "m", "v"), strict=True):
        graph.output(value, name)
    generator = torch.Generator().manual_seed(3)
    start, *drawn = (torch.randn(50, generator=generator) for _ in range(6))
    expected = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([expected], lr=0.01, betas=betas, eps=1e-7)
    found, first, second = start, torch.zeros(50), torch.zeros(50)
    for index, gradient in enumerate(drawn, 1):
        expected.grad = gradient
        optimiser.step()
        feeds = dict(zip(names, (found, gradient, first, second), strict=True))
        numbers = {"step": torch.tensor(index), "rate": torch.tensor(0.01)}
        found, first, second = run(graph, feeds | numbers)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)
