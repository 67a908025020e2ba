"""What architectures draw with random weights: the prior itself, before any fit.

The spectrum says how natural it is: in photographs the power falls with a power of the frequency,
of white noise it does not fall at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flashdip.engine.networks.deep_decoder import DeepDecoder
from flashdip.engine.networks.resnet import ResNet
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.networks.unet import UNet
from flashdip.kernels import reference

INPUTS = 32  # channels of the input, uniform noise, as published
Draw = Callable[[int, int], Tensor]  # size and seed to an image [1, 3, size, size]


@dataclass(frozen=True)
class Spectrum:
    """Of a picture, averaged over channels and directions.

    Attributes:
        slope: Of the power over the frequency, both logarithmic: 0 for white noise, -2 to -3 for
            photographs.
        wavelength: Root mean square, weighted by power, inverted: the typical size of structure,
            in pixels.
    """

    slope: float
    wavelength: float


def skip_network(config: SkipConfig) -> Draw:
    """Return what draws with the hourglass."""

    def draw(size: int, seed: int) -> Tensor:
        network = Skip(config)
        weights = network.views(network.initialise(seed)[None])
        z = _input(config.network_size(size, size), seed)
        with torch.no_grad():
            return network.forward(reference, weights, z)[..., :size, :size]

    return draw


def module(make: Callable[[], nn.Module]) -> Draw:
    """Return what draws with a module that has `input_size`."""

    def draw(size: int, seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = make()
        small = network.input_size(size, size)  # type: ignore[operator]
        with torch.no_grad():
            image: Tensor = network(_input(small, seed))
        return image

    return draw


def _input(size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 0.1 * torch.rand(1, INPUTS, *size, generator=generator)


def _hourglass(depth: int, **options: Any) -> Draw:
    return skip_network(SkipConfig(inputs=INPUTS, down=(32,) * depth, **options))


ARCHITECTURES: Mapping[str, Draw] = {
    **{f"depth {depth}": _hourglass(depth, skip=0) for depth in (1, 2, 3, 4, 5)},
    "depth 5, skips": _hourglass(5, skip=4),
    "depth 5, wide skips": _hourglass(5, skip=32),
    "depth 5, nearest": _hourglass(5, skip=0, upsample="nearest"),
    "U-Net": module(lambda: UNet(INPUTS)),
    "ResNet": module(lambda: ResNet(INPUTS)),
    "deep decoder": module(lambda: DeepDecoder(INPUTS)),
}


def priors(size: int, *, draws: int = 4, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Draw with each architecture.

    Args:
        size: Side of the images; a multiple of 32.
        draws: Images of each.
        seed: Of the first.

    Returns:
        By name: "image", the first draw [size, size, 3], stretched to [0, 1]; "slope" and
        "wavelength", means over the draws.
    """
    found = {}
    for name, draw in ARCHITECTURES.items():
        images = [draw(size, seed + each)[0].double().numpy() for each in range(draws)]
        spectra = [spectrum(image) for image in images]
        found[name] = {
            "image": stretched(images[0]),
            "slope": float(np.mean([each.slope for each in spectra])),
            "wavelength": float(np.mean([each.wavelength for each in spectra])),
        }
    return found


def spectrum(image: NDArray[np.floating]) -> Spectrum:
    """Measure the spectrum of an image [C, H, W].

    A Hann window keeps the jump at the borders out of it.
    """
    height, width = image.shape[1:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    centred = image - image.mean(axis=(1, 2), keepdims=True)
    power = np.square(np.abs(np.fft.fft2(centred * window))).sum(axis=0)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    radius = np.hypot(rows, columns)
    # Below two waves a side the window decides; beyond Nyquist there are corners only.
    edges = np.geomspace(2 / min(height, width), 0.5, 12)
    middles, means = [], []
    for low, high in pairwise(edges):
        ring = (radius >= low) & (radius < high)
        if ring.any():
            middles.append(np.log(radius[ring].mean()))
            means.append(np.log(power[ring].mean() + 1e-300))
    slope = float(np.polyfit(middles, means, 1)[0])
    mean_square = float((power * radius**2).sum() / power.sum())
    return Spectrum(slope, mean_square**-0.5)


def stretched(image: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return an image [C, H, W] as [H, W, C], its 1st and 99th percentiles taken to 0 and 1."""
    low, high = np.percentile(image, (1, 99))
    scaled = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    pixels: NDArray[np.float32] = np.moveaxis(scaled, 0, 2).astype(np.float32)
    return pixels
