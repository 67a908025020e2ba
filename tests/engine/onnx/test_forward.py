"""The forward pass as a graph: what ONNX Runtime computes of it is what `reference` computes."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.onnx.forward import Forward
from flashdip.engine.onnx.graph import Graph
from flashdip.engine.presets import PRESETS
from flashdip.kernels import reference
from tests.engine.onnx.cases import TOPOLOGIES, live, shrunk


def forward(network: Skip, size: tuple[int, int]) -> onnx.ModelProto:
    """The network as a graph of its parameters and its input."""
    graph = Graph("forward")
    x = graph.input("z", (1, network.config.inputs, *size))
    parameters = [graph.input(p.name, p.shape) for p in network.parameters]
    graph.output(network.forward(Forward(), parameters, x), "image")
    return graph.model()


@pytest.mark.parametrize("config", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("size", [(24, 16), (21, 27)])
def test_computes_what_reference_computes(config: SkipConfig, size: tuple[int, int]) -> None:
    """Every published topology shrunk, and every other option; sides that cannot be halved too."""
    network = Skip(shrunk(config))
    if not all(config.level(i).skip for i in range(config.levels)):
        size = network.config.network_size(*size)  # without skips sizes must match by themselves
    flat, z = live(network, size)
    views = network.views(flat)
    expected = network.forward(reference, [v.double() for v in views], z.double())
    session = onnxruntime.InferenceSession(forward(network, size).SerializeToString())
    feeds = {p.name: v[0].numpy() for p, v in zip(network.parameters, views, strict=True)}
    (found,) = session.run(None, feeds | {"z": z.numpy()})
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=0, atol=1e-5)


def test_only_the_standard_domain() -> None:
    """Every preset's network at full width, by ONNX's own checker; no shape is left open."""
    for config in {preset.config.network for preset in PRESETS.values()}:
        network = Skip(replace(config, outputs=3))
        model = forward(network, config.network_size(64, 64))
        assert {node.domain for node in model.graph.node} == {""}
        assert [opset.domain for opset in model.opset_import] == [""]
        onnx.checker.check_model(model, full_check=True)
