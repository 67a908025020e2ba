"""The residual network, as one of the architectures that the paper sets against its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """Residual blocks at full resolution, without any change of scale (He et al. 2016).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the image.
        channels: Of all blocks.
        blocks: How many there are.
    """

    def __init__(self, inputs: int, outputs: int = 3, channels: int = 32, blocks: int = 8) -> None:
        super().__init__()
        self.first = _conv(inputs, channels)
        self.blocks = nn.ModuleList(_block(channels) for _ in range(blocks))
        self.head = _conv(channels, outputs)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the input for an image of this size: the same."""
        return height, width

    def forward(self, z: Tensor) -> Tensor:
        """Draw an image in [0, 1], [N, outputs, H, W], from z, [N, inputs, H, W]."""
        x = F.leaky_relu(self.first(z), 0.2)
        for block in self.blocks:
            x = x + block(x)
        return torch.sigmoid(self.head(x))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect")


def _block(channels: int) -> nn.Sequential:
    norms = [nn.BatchNorm2d(channels) for _ in range(2)]
    act = nn.LeakyReLU(0.2)
    return nn.Sequential(
        _conv(channels, channels), norms[0], act, _conv(channels, channels), norms[1]
    )
