"""Networks that the tests of ONNX graphs share: small ones of every published topology."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.onnx.graph import Graph
from flashdip.engine.presets import PRESETS
from tests.kernels.fused.judge import excess

# Of presets with one network the last stands for all.
PUBLISHED = {
    preset.config.network: name
    for (_, name), preset in PRESETS.items()
    if name.startswith("published")
}
OTHERS = {
    "wide-skips-swish": SkipConfig(down=(8, 8), skip=(9, 5), act="Swish", kernel_skip=(1, 3)),
    "zero-elu-max": SkipConfig(down=(8, 8), pad="zero", act="ELU", downsample=("max", "avg")),
    "lanczos": SkipConfig(down=(8, 8), downsample=("lanczos2", "lanczos3"), upsample="nearest"),
    "linear": SkipConfig(
        down=(8, 8), kernel_up=(1, 5), act="none", sigmoid=False, bias=False, conv1x1_up=False
    ),
}
TOPOLOGIES = {name: config for config, name in PUBLISHED.items()} | OTHERS


def shrunk(config: SkipConfig, levels: int = 2) -> SkipConfig:
    """The outermost levels, with an eighth of the channels or so.

    Scales start at one: a channel whose scale is near 0 by chance has a gradient of rounding noise.
    """
    fields: dict[str, Any] = {"inputs": min(3, config.inputs), "scale": "one"}
    fields["down"] = tuple(max(4, channels // 8) + 1 for channels in config.down[:levels])
    names = ("up", "skip", "kernel_down", "kernel_up", "kernel_skip", "upsample", "downsample")
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            fields[name] = value[:levels]
        elif name == "skip" and value > 16:
            fields[name] = value // 8 + 1
    return replace(config, **fields)


def live(network: Skip, size: tuple[int, int], seed: int = 11) -> tuple[Tensor, Tensor]:
    """Parameters [1, P] as in a fit that is on its way, norms not all 1 and 0, and an input."""
    generator = torch.Generator().manual_seed(seed)
    flat = network.initialise(seed)[None]
    for parameter, view in zip(network.parameters, network.views(flat), strict=True):
        if parameter.name.endswith((".gamma", ".beta")):
            view.add_(0.3 * torch.randn(view.shape, generator=generator))
    return flat, 0.1 * torch.rand(1, network.config.inputs, *size, generator=generator)


def run(graph: Graph, feeds: dict[str, Tensor]) -> list[Tensor]:
    """What ONNX Runtime computes of a graph's inputs, by name."""
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())
    found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return [torch.from_numpy(array) for array in found]


def excess_of_gradients(
    network: Skip, found: Sequence[Tensor], exact: Sequence[Tensor], single: Sequence[Tensor]
) -> float:
    """Return their error as a multiple of the allowed one; a layer's alone may be 10 times torch's.

    In single steps an activation on the edge of its sign may turn it, there or in torch, by the
    processor: what must be at most 1 is the median over seeds.

    A layer is a convolution, or a norm: its scale may have next to no effect beside its shift, and
    then that gradient by itself is rounding noise. Biases before a norm have none at all.

    Args:
        network: Of the parameters.
        found: Gradients, in order.
        exact: By torch in float64.
        single: By torch in float32.
    """
    layers: dict[str, list[tuple[Tensor, ...]]] = {}
    for parameter, *three in zip(network.parameters, found, exact, single, strict=True):
        layer, _, kind = parameter.name.rpartition(".")
        if kind != "bias" or layer == "head":
            name = f"{layer} {'norm' if kind in ('gamma', 'beta') else 'conv'}"
            layers.setdefault(name, []).append(tuple(each.flatten() for each in three))
    joined = [[torch.cat(part) for part in zip(*of, strict=True)] for of in layers.values()]
    own, true, plain = (torch.cat(part) for part in zip(*joined, strict=True))
    errors = [[(each.double() - t).norm() / t.norm() for each in (o, p)] for o, t, p in joined]
    worst, allowed = (float(max(of)) for of in zip(*errors, strict=True))
    return max(excess(own, true, plain, torch.float32), worst / (10 * allowed))
