"""The deep decoder: too few parameters to draw noise, and no convolution beyond a pixel."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdip.engine.errors import ShapeError


class DeepDecoder(nn.Module):
    """Mix channels pixel by pixel, enlarge, rectify, normalise, again and again.

    Heckel and Hand, "Deep Decoder", ICLR 2019. Neighbours come together in the bilinear enlargement
    alone.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the image.
        channels: Of all layers.
        layers: How often the side doubles.
    """

    def __init__(self, inputs: int, outputs: int = 3, channels: int = 64, layers: int = 4) -> None:
        super().__init__()
        wide = (inputs, *(channels,) * layers)
        self.mixes = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(wide))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(layers))
        self.head = nn.Conv2d(channels, outputs, 1)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the input for an image of this size.

        Raises:
            ShapeError: They are not multiples of what it is enlarged by.
        """
        step = 1 << len(self.mixes)
        if height % step or width % step:
            raise ShapeError(
                f"image: expected sides that are multiples of {step} for {len(self.mixes)} layers, "
                f"got {width}x{height}"
            )
        return height // step, width // step

    def forward(self, z: Tensor) -> Tensor:
        """Draw an image in [0, 1], [N, outputs, H, W], from a small z, [N, inputs, h, w]."""
        x = z
        for mix, norm in zip(self.mixes, self.norms, strict=True):
            x = F.interpolate(mix(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = norm(F.relu(x))
        return torch.sigmoid(self.head(x))
