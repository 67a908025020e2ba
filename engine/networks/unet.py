"""The U-Net, as one of the architectures that the paper sets against its own."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Encoder and decoder with concatenations at every level (Ronneberger, Fischer, Brox 2015).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the image.
        channels: Of each level, the finest first; a level has half the resolution of the one
            before.
    """

    def __init__(
        self, inputs: int, outputs: int = 3, channels: tuple[int, ...] = (16, 32, 64, 128, 128)
    ) -> None:
        super().__init__()
        wide = (inputs, *channels)
        self.down = nn.ModuleList(_twice(a, b) for a, b in pairwise(wide))
        pairs = pairwise(channels)
        self.up = nn.ModuleList(_twice(deep + own, own) for own, deep in pairs)
        self.head = nn.Conv2d(channels[0], outputs, 1)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the input for an image of this size: the same."""
        return height, width

    def forward(self, z: Tensor) -> Tensor:
        """Draw an image in [0, 1], [N, outputs, H, W], from z, [N, inputs, H, W]."""
        maps, x = [], z
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if index else x)
            maps.append(x)
        for block, skip in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        return torch.sigmoid(self.head(x))


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    """Convolve, normalise and rectify, twice."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv2d(channels, outputs, 3, padding=1, padding_mode="reflect"))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
