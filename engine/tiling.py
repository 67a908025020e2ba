"""A picture cut into tiles that overlap, and put together again by cross-fading.

All tiles have one size, so that each can begin with its neighbour's weights. They are cut on the
grid of the observation; where the image is larger (super-resolution), theirs are as many times.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdip.engine.errors import ConfigError, InputError
from flashdip.engine.operators import Downsample, Identity, Mask
from flashdip.engine.problems import SMALLEST_SIDE, Problem

WARM_SHARE = 0.5  # of the iterations, for a tile that begins with its neighbour's weights
LEAST = 2 * SMALLEST_SIDE  # pixels of a side
OVERLAP = 8  # a tile's side over that of its overlap with the next one


@dataclass(frozen=True)
class Tile:
    """Where a tile lies.

    Attributes:
        index: Its place in the order of the fits: row by row, from the left.
        row: Of the grid of tiles.
        column: Of the grid of tiles.
        top: Its first row of pixels, in the observation.
        left: Its first column of pixels.
    """

    index: int
    row: int
    column: int
    top: int
    left: int


class Seam(NamedTuple):
    """Where two tiles overlap.

    Attributes:
        tiles: Their indices.
        squared: Mean squared difference of their images there.
        values: How many values that is taken over.
    """

    tiles: tuple[int, int]
    squared: float
    values: int


@dataclass(frozen=True)
class Tiling:
    """A grid of tiles.

    Attributes:
        size: Height and width of the observation.
        side: Height and width of a tile, at most the size.
        overlap: The least number of pixels that neighbours share, less than a side.
        factor: How many times larger the image is than the observation.
    """

    size: tuple[int, int]
    side: tuple[int, int]
    overlap: int
    factor: int = 1

    @classmethod
    def of(cls, shape: tuple[int, int, int], factor: int, tile: int) -> "Tiling":
        """Return the tiling of an image [C, H, W] by tiles with sides of `tile` of its pixels.

        Sides are rounded down to multiples of the factor.

        Raises:
            ConfigError: Such tiles are too small.
        """
        if tile < LEAST:
            raise ConfigError(f"tile: expected a side of at least {LEAST} pixels, got {tile}")
        size = shape[1] // factor, shape[2] // factor
        small = tile // factor
        side = min(small, size[0]), min(small, size[1])
        return cls(size, side, max(1, small // OVERLAP), factor)

    @property
    def rows(self) -> list[int]:
        """The first row of pixels of each row of tiles."""
        return _starts(self.size[0], self.side[0], self.overlap)

    @property
    def columns(self) -> list[int]:
        """The first column of pixels of each column of tiles."""
        return _starts(self.size[1], self.side[1], self.overlap)

    @property
    def tiles(self) -> list[Tile]:
        """All tiles, in the order of their fits."""
        places = itertools.product(enumerate(self.rows), enumerate(self.columns))
        return [
            Tile(index, row, column, top, left)
            for index, ((row, top), (column, left)) in enumerate(places)
        ]

    def neighbour(self, tile: Tile) -> Tile | None:
        """Return the tile before it whose weights it begins with: to its left, else above."""
        if tile.column:
            return self.tiles[tile.index - 1]
        return self.tiles[tile.index - len(self.columns)] if tile.row else None

    @property
    def image_side(self) -> tuple[int, int]:
        """Height and width of a tile in the image."""
        return self.factor * self.side[0], self.factor * self.side[1]

    def iterations(self, tile: Tile, most: int) -> int:
        """Return how many of the most iterations a tile gets: fewer if it begins with weights."""
        return most if self.neighbour(tile) is None else max(1, round(WARM_SHARE * most))

    def tightened(self, unit: int) -> "Tiling":
        """Return as many tiles, as small as they can be.

        Args:
            unit: Sides are multiples of it, where that leaves them smaller.
        """

        def least(length: int, side: int) -> int:
            count = len(_starts(length, side, self.overlap))
            needed = -(-(length + (count - 1) * self.overlap) // count)
            return min(side, -(-needed // unit) * unit)

        sides = (least(*pair) for pair in zip(self.size, self.side, strict=True))
        height, width = sides
        return replace(self, side=(height, width))

    def check(self, problem: Problem) -> None:
        """Refuse a problem that cannot be cut so.

        Raises:
            InputError: Its operator reaches too far, or a tile holds nothing that was measured.
        """
        factor_of(problem)
        if problem.measured is None:
            return
        measured = problem.measured.expand(*problem.measured.shape[:-2], *self.size)
        for tile in self.tiles:
            rows, columns = slice(tile.top, tile.top + self.side[0]), slice(tile.left, None)
            if not (measured[..., rows, columns][..., : self.side[1]] > 0).any():
                raise InputError(
                    f"tile: expected known pixels in each of the {len(self.tiles)} tiles of "
                    f"{self.side[1]}x{self.side[0]}, got none in that from row {tile.top}, column "
                    f"{tile.left}: take larger ones (--tile, --memory)"
                )

    def window(self, tile: Tile) -> tuple[slice, slice]:
        """Return the rows and columns of the image that a tile covers."""
        return (
            slice(self.factor * tile.top, self.factor * (tile.top + self.side[0])),
            slice(self.factor * tile.left, self.factor * (tile.left + self.side[1])),
        )

    def pairs(self) -> Iterator[tuple[Tile, Tile]]:
        """Return the tiles that lie side by side or one below the other."""
        tiles, across = self.tiles, len(self.columns)
        for tile in tiles:
            if tile.column:
                yield tiles[tile.index - 1], tile
            if tile.row:
                yield tiles[tile.index - across], tile

    def blend(self, channels: int, image: Callable[[Tile], Tensor]) -> Tensor:
        """Return the whole image, [C, H, W] float32.

        Args:
            channels: Of the image.
            image: Returns that of a tile, [C, h, w]; asked for each once.
        """
        height, width = (self.factor * side for side in self.size)
        whole = torch.zeros(channels, height, width)
        down = _fades(self.rows, self.side[0], self.overlap, self.factor)
        across = _fades(self.columns, self.side[1], self.overlap, self.factor)
        for tile in self.tiles:
            weight = torch.from_numpy(np.outer(down[tile.row], across[tile.column]))
            rows, columns = self.window(tile)
            whole[:, rows, columns] += weight * image(tile)
        return whole

    def disagreement(self, image: Callable[[Tile], Tensor]) -> list["Seam"]:
        """Return how far each two neighbours differ where they overlap.

        Args:
            image: Returns that of a tile, [C, h, w].
        """
        found = []
        for one, other in self.pairs():
            both = image(one), image(other)
            top, left = self.factor * (other.top - one.top), self.factor * (other.left - one.left)
            height, width = both[0].shape[1] - top, both[0].shape[2] - left
            difference = both[0][:, top:, left:] - both[1][:, :height, :width]
            mean = float(difference.square().mean(dtype=torch.float64))
            found.append(Seam((one.index, other.index), mean, difference.numel()))
        return found


def factor_of(problem: Problem) -> int:
    """Return how many times larger the image of a problem is than its observation.

    Raises:
        InputError: Its operator is none that can be cut.
    """
    operator = problem.operator
    if isinstance(operator, Identity | Mask):
        return 1
    if isinstance(operator, Downsample):
        return operator.factor
    raise InputError(
        f"tile: expected an operator that acts nearby (Identity, Mask or Downsample), got "
        f"{type(operator).__name__}: fit the picture as a whole, or cut it yourself"
    )


def cut(problem: Problem, tiling: Tiling, tile: Tile) -> Problem:
    """Return the problem of one tile, in memory of its own."""
    top, left = tile.top, tile.left
    small = slice(top, top + tiling.side[0]), slice(left, left + tiling.side[1])
    large = tiling.window(tile)

    def part(tensor: Tensor | None, window: tuple[slice, slice]) -> Tensor | None:
        if tensor is None:
            return None
        # An axis of 1 is the same for all pixels.
        rows, columns = (
            each if side > 1 else slice(None)
            for each, side in zip(window, tensor.shape[-2:], strict=True)
        )
        return tensor[..., rows, columns].contiguous().clone()

    observation = part(problem.observation, small)
    assert observation is not None
    operator = problem.operator
    if isinstance(operator, Mask):
        mask = part(operator.mask, large)
        assert mask is not None
        operator = Mask(mask)
    return replace(
        problem,
        observation=observation,
        shape=(problem.shape[0], *tiling.image_side),
        operator=operator,
        measured=part(problem.measured, small),
        known=part(problem.known, large),
        pasted=part(problem.pasted, large),
    )


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Return where tiles begin along an axis: evenly spread, with at least this overlap."""
    if side >= length:
        return [0]
    count = -(-(length - overlap) // (side - overlap))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _fades(starts: list[int], side: int, overlap: int, factor: int) -> list[NDArray[np.float32]]:
    """Return the weights of the tiles along an axis of the image, which sum to 1 at each pixel."""
    length = factor * (starts[-1] + side)
    ramp = np.minimum(np.arange(factor * side) + 0.5, factor * overlap)
    weights = np.zeros((len(starts), length))
    for index, start in enumerate(starts):
        rise = ramp if index else np.full_like(ramp, ramp.max())
        fall = ramp[::-1] if index + 1 < len(starts) else np.full_like(ramp, ramp.max())
        weights[index, factor * start : factor * (start + side)] = np.minimum(rise, fall)
    weights /= weights.sum(0)
    return [
        row[factor * start : factor * (start + side)].astype(np.float32)
        for row, start in zip(weights, starts, strict=True)
    ]
