"""How much memory a step of an eager op set takes: seen on three small images, known for all.

Autograd says what it keeps for the backward pass (`saved_tensors_hooks`). Each map has the area of
the network's input, or a quarter of it, and so on, and may have a margin, so that their bytes are
exactly a H W + b (H + W) + c; three square inputs give a, b and c, for any network and op set. The
most is in use when the backward pass has just begun: all that is kept, and one more map of the
largest size, a gradient. That is within 1 % of what torch's allocator counts. Where maps are
recalled, so that less is kept, it is when the outermost norm is differentiated, in three.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from flashdip.engine.backends.observe import spread
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip
from flashdip.engine.problems import SMALLEST_SIDE, Problem
from flashdip.kernels import noise
from flashdip.kernels.memory import kept_pages
from flashdip.kernels.recall import recalling

# What glibc's heap takes, from which the maps come (`flashdip.kernels.memory`), over what is in use
# in it: a share, the convolutions' own work space in it, and some maps of the largest size, as what
# a map leaves is spoilt for the next one of its size when something small comes to lie in it.
# Fitted to 13 narrow and wide networks, 256 to 1024 pixels a side, float32 and bfloat16, which took
# 0.92 to 1.09 of it.
_SHARE, _SPOILT = 1.1, 7.5
# Where maps are recalled fewer are spoilt: fitted to 8 such, which took 0.68 to 1.14 of it.
_SPOILT_RECALLING = 2.5
# Images beside the network, of each fit: truth, measured, output, average, the last two again in
# the good state, and the newest output and its gradient.
_IMAGES = 8


class Differentiable(Protocol):
    """A step of one fit, as it is seen here.

    Attributes:
        parameters: [1, P].
    """

    parameters: Tensor

    def advance(self, count: int) -> None:
        """Advance the fit by so many iterations."""
        ...


class Kept(NamedTuple):
    """The maps that are kept while a network is differentiated.

    Attributes:
        terms: a, b and c of each map's bytes, a H W + b (H + W) + c, [3, maps].
        recalls: Whether others are made anew; see `flashdip.kernels.recall`.
    """

    terms: NDArray[np.float64]
    recalls: bool

    def used(self, height: int, width: int) -> int:
        """Return the most bytes that are in use, for a network input of this size."""
        kept = float(self._maps(height, width).sum())
        return round(kept + (3 if self.recalls else 1) * self._largest(height, width))

    def taken(self, height: int, width: int) -> int:
        """Return the bytes that glibc's heap takes for them."""
        spoilt = _SPOILT_RECALLING if self.recalls else _SPOILT
        return round(_SHARE * self.used(height, width) + spoilt * self._largest(height, width))

    def _largest(self, height: int, width: int) -> float:
        maps = self._maps(height, width)
        # The first one is the network's input, which is not differentiated.
        return float(max(maps[1:] if self.recalls else maps))

    def _maps(self, height: int, width: int) -> NDArray[np.float64]:
        return np.array([height * width, height + width, 1.0]) @ self.terms


def kept(
    config: FitConfig, step: Callable[[FitConfig, Problem], Differentiable], recalls: bool
) -> Kept:
    """Find out what the maps of one fit take.

    Args:
        config: How it is fitted.
        step: Prepares a problem.
        recalls: Whether maps are made anew where that can be; see `flashdip.kernels.recall`.
    """
    least = max(config.network.network_size(SMALLEST_SIDE, SMALLEST_SIDE))
    sides = [least + more * (1 << config.network.levels) for more in range(3)]
    with kept_pages():  # which are given back at the end
        seen = [_seen(step(config, _blank(config, side)), recalls) for side in sides]
    # Through three points there is one parabola.
    terms = np.polyfit(sides, seen, 2)
    terms[1] /= 2
    return Kept(terms, recalls)


def state(config: FitConfig, shape: tuple[int, int, int], wide: int) -> int:
    """Return the bytes that a fit keeps beside the network's maps.

    Args:
        config: How it is fitted.
        shape: Of the image: channels, height, width.
        wide: Bytes of a parameter and of a pixel.
    """
    values = torch.Size(shape).numel()
    height, width = config.network.network_size(*shape[1:])
    searching, moving = bool({"es-wmv", "es-emv"} & set(config.stop)), "es-emv" in config.stop
    # Parameters, gradients, two moments; three of these in the good state, one in the best.
    trained = (7 + searching) * sum(
        torch.Size(parameter.shape).numel() for parameter in Skip(config.network).parameters
    )
    images = (_IMAGES + searching + 2 * moving) * values
    window = config.window * len(spread(values)) if "es-wmv" in config.stop else 0
    z = config.network.inputs * height * width
    return wide * (trained + images + window + z + noise.TABLE_SIZE)


def _blank(config: FitConfig, side: int) -> Problem:
    shape = config.network.outputs, side, side
    return Problem(torch.zeros(1, *shape), shape)


def _seen(step: Differentiable, recalls: bool) -> list[int]:
    """Return the bytes of each map that autograd keeps in one iteration, in order."""
    own = step.parameters.untyped_storage().data_ptr()
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with recalling(note) if recalls else saved_tensors_hooks(note, lambda tensor: tensor):
        step.advance(1)
    return list(storages.values())
