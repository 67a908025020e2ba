"""The three further networks: what their equations say, number by number, and their sizes."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdip.engine.errors import ShapeError
from flashdip.engine.networks.deep_decoder import DeepDecoder
from flashdip.engine.networks.resnet import ResNet
from flashdip.engine.networks.unet import UNet


def seeded(make: type[nn.Module], *arguments: object, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return make(*arguments, **options).double()


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * scale.view(shape) + shift.view(shape)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    border = weight.shape[2] // 2
    return F.conv2d(F.pad(x, (border,) * 4, mode="reflect"), weight, bias)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float(found.detach().std()) > 1e-3


def test_resnet() -> None:
    """Every block adds to what came in; nothing changes its size."""
    network = seeded(ResNet, 2, 1, channels=3, blocks=2)
    z = noise(1, 2, 7, 9)
    p = list(network.parameters())
    x = F.leaky_relu(conv(z, p[0], p[1]), 0.2)
    for block in (p[2:10], p[10:18]):
        # Convolutions and norms alternate within a block.
        w1, b1, g1, s1, w2, b2, g2, s2 = block
        y = F.leaky_relu(norm(conv(x, w1, b1), g1, s1), 0.2)
        x = x + norm(conv(y, w2, b2), g2, s2)
    close(network(z), torch.sigmoid(conv(x, p[18], p[19])))


def test_deep_decoder() -> None:
    """No weight sees more than one pixel; each layer doubles the side."""
    network = seeded(DeepDecoder, 3, 2, channels=4, layers=2)
    assert all(p.shape[2:] in ((1, 1), ()) for p in network.parameters())
    z = noise(1, 3, 4, 5)
    p = list(network.parameters())
    x = z
    for mix, scale, shift in ((p[0], p[2], p[3]), (p[1], p[4], p[5])):
        x = F.interpolate(F.conv2d(x, mix), scale_factor=2, mode="bilinear", align_corners=False)
        x = norm(F.relu(x), scale, shift)
    close(network(z), torch.sigmoid(F.conv2d(x, p[6], p[7])))
    assert network(z).shape == (1, 2, 16, 20)
    assert network.input_size(16, 20) == (4, 5)  # type: ignore[operator]
    with pytest.raises(ShapeError, match="multiples of 4 for 2 layers, got 18x16"):
        network.input_size(16, 18)  # type: ignore[operator]


def test_unet() -> None:
    """What a level makes is joined, before its pooling, to what comes back from below."""
    network = seeded(UNet, 2, 1, channels=(3, 5))
    z = noise(1, 2, 9, 7)
    p = list(network.parameters())

    def twice(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        for start in (0, 4):
            weight, bias, scale, shift = parameters[start : start + 4]
            x = F.relu(norm(conv(x, weight, bias), scale, shift))
        return x

    fine = twice(z, p[:8])
    deep = twice(F.max_pool2d(fine, 2, ceil_mode=True), p[8:16])
    large = F.interpolate(deep, size=(9, 7), mode="bilinear", align_corners=False)
    x = twice(torch.cat([large, fine], dim=1), p[16:24])
    close(network(z), torch.sigmoid(F.conv2d(x, p[24], p[25])))


@pytest.mark.parametrize("make", [UNet, ResNet, DeepDecoder])
def test_every_parameter_learns(make: type[nn.Module]) -> None:
    """But for biases that a norm follows."""
    network = seeded(make, 4)
    z = noise(1, 4, *network.input_size(32, 48))  # type: ignore[operator]
    image = network(z)
    assert image.shape == (1, 3, 32, 48)
    (image - noise(*image.shape)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        if parameter.ndim == 4:
            assert float(parameter.grad.abs().max()) > 1e-9, name
