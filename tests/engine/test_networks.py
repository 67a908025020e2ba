"""The skip network: the published numbers, the published parameters, the options' errors."""

import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashdip.engine.errors import ConfigError
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.presets import PRESETS
from flashdip.kernels import native, reference
from tests import golden

_PUBLISHED = {
    "num_input_channels": "inputs",
    "num_output_channels": "outputs",
    "num_channels_down": "down",
    "num_channels_up": "up",
    "num_channels_skip": "skip",
    "filter_size_down": "kernel_down",
    "filter_size_up": "kernel_up",
    "filter_skip_size": "kernel_skip",
    "upsample_mode": "upsample",
    "downsample_mode": "downsample",
    "need1x1_up": "conv1x1_up",
    "pad": "pad",
}


def config_of(options: dict[str, Any]) -> SkipConfig:
    """Translate the published names."""
    fields: dict[str, Any] = {
        _PUBLISHED[name]: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
    }
    return SkipConfig(**fields)


@pytest.mark.parametrize("name", golden.cases())
def test_agrees_with_the_published_network(name: str) -> None:
    """Outputs and gradients of the published code in float64, odd sizes included."""
    known = golden.case(name)
    network = Skip(config_of(known.options))
    assert [p.shape for p in network.parameters] == known.shapes
    leaves = [p[None].requires_grad_() for p in golden.parameters(known.shapes)]
    inputs, outputs = known.channels
    x = golden.network_input(inputs, *known.size)[None]
    y = network.forward(reference, leaves, x)
    golden.check_output(known, y)
    (y - golden.target(outputs, *known.size)).square().mean().backward()
    golden.check_gradients(known, [None if p.grad is None else p.grad[0] for p in leaves])


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("name", golden.cases())
def test_agrees_with_the_published_module(name: str, ops: types.ModuleType) -> None:
    """To 1e-10 and 1e-8 at weights as a fit has them, with the algebra that `native` uses too."""
    known = golden.case(name)
    live = golden.live(known.options, known.size)
    network = Skip(config_of(known.options))
    leaves = [p.clone()[None].requires_grad_() for p in live.parameters]
    z = live.z[None].contiguous(memory_format=torch.channels_last)
    y = network.forward(ops, leaves, z)
    (y - live.target).square().mean().backward()
    live.check(y, [None if p.grad is None else p.grad[0] for p in leaves])


def test_initial_parameters_are_torchs() -> None:
    """Uniform with the bound of torch.nn.Conv2d; norms start at one and zero."""
    network = Skip(SkipConfig(inputs=8, down=(32,), skip=4))
    flat = network.initialise(seed=5)
    assert torch.equal(flat, network.initialise(seed=5))
    assert not torch.equal(flat, network.initialise(seed=6))
    views = {
        p.name: v[0] for p, v in zip(network.parameters, network.views(flat[None]), strict=True)
    }
    weight, bound = views["level0.down.weight"], (8 * 9) ** -0.5
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert float(views["level0.down.bias"].abs().max()) <= bound
    assert torch.equal(views["level0.join.gamma"], torch.ones(36))
    assert torch.equal(views["level0.join.beta"], torch.zeros(36))


def test_views_share_memory() -> None:
    """The flat buffer is the parameters."""
    network = Skip(SkipConfig(inputs=2, down=(3, 4), skip=0))
    flat = torch.zeros(2, len(network.initialise(0)))
    for index, view in enumerate(network.views(flat)):
        view += index
    assert flat[1].unique().tolist() == list(range(len(network.parameters)))


@pytest.mark.parametrize(
    ("size", "expected"), [((16, 16), (64, 64)), ((64, 65), (64, 96)), ((256, 100), (256, 128))]
)
def test_network_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """The next multiple of 32 for five levels, at least 64."""
    assert SkipConfig().network_size(*size) == expected


@pytest.mark.parametrize("key", PRESETS, ids="/".join)
def test_every_preset_draws_the_smallest_pictures(key: tuple[str, str]) -> None:
    """Large kernels need a larger map than its own side to reflect it."""
    config = replace(PRESETS[key].config.network, outputs=1)
    network, size = Skip(config), config.network_size(16, 16)
    parameters = network.views(network.initialise(0)[None])
    with torch.no_grad():
        image = network.forward(reference, parameters, torch.rand(1, config.inputs, *size))
    assert image.shape == (1, 1, *size)
    assert 0 < float(image.min()) < float(image.max()) < 1


def test_network_size_of_large_kernels() -> None:
    """A margin of two needs three pixels at the deepest level, of four five."""
    assert SkipConfig(down=(4,) * 6, kernel_down=5).network_size(16, 16) == (192, 192)
    assert SkipConfig(down=(4, 4), kernel_up=9).network_size(8, 8) == (20, 20)
    assert SkipConfig(down=(4, 4), kernel_down=(9, 3)).network_size(8, 8) == (12, 12)


def test_the_last_entry_stands_for_deeper_levels() -> None:
    """The levels can be fewer or more without a word about what else differs between them."""
    config = SkipConfig(down=(4,) * 4, upsample=("bilinear", "nearest"), skip=(0, 4))
    assert [config.level(i).upsample for i in range(4)] == ["bilinear"] + ["nearest"] * 3
    assert [config.level(i).skip for i in range(4)] == [0, 4, 4, 4]
    fewer = replace(config, down=(4,) * 2)
    assert [fewer.level(i).upsample for i in range(2)] == ["bilinear", "nearest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down": ()}, "network.down: expected the channels of at least one level"),
        ({"down": (8, 0)}, "network.down: expected whole numbers of at least 1, got 0"),
        ({"skip": (4,) * 6}, "network.skip: expected 1 to 5 entries, one per level"),
        ({"upsample": ()}, "network.upsample: expected 1 to 5 entries, one per level"),
        ({"kernel_up": 4}, "network.kernel_up: expected odd whole numbers of at least 1, got 4"),
        ({"upsample": "cubic"}, "network.upsample: expected one of nearest, bilinear, got 'cubic'"),
        ({"sigmoid": "no"}, "network.sigmoid: expected true or false, got 'no'"),
        ({"act": "ReLU"}, "network.act: expected one of LeakyReLU"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    """One line that names the field, what was expected and what came."""
    with pytest.raises(ConfigError) as error:
        SkipConfig(**options)
    assert str(error.value).startswith(message)


def test_initial_scales() -> None:
    """Norms start at 1, as torch's do now, or anywhere up to it, as they did for the paper."""
    for scale, low, high in (("one", 1.0, 1.0), ("uniform", 0.2, 0.8)):
        network = Skip(SkipConfig(down=(8, 8), scale=scale))  # type: ignore[arg-type]
        values = zip(network.parameters, network.views(network.initialise(3)[None]), strict=True)
        gammas = torch.cat([v.flatten() for p, v in values if p.name.endswith("gamma")])
        assert 0 <= gammas.min() <= low and high <= gammas.max() <= 1
