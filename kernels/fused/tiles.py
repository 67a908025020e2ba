"""How the work is cut, per architecture: pure functions of shapes.

A pixel tile is as large as leaves every multiprocessor something to do; where even small tiles
leave some idle, programs share the sum of a tile. Where somebody looked closer, an architecture's
table has a better tile than these rules: `flashdip.bench.tune` fills it.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Concatenate, NamedTuple, ParamSpec

import torch
import triton

from flashdip.kernels.fused import tables
from flashdip.kernels.fused.launch import Tile
from flashdip.kernels.opset import Up


class Architecture(NamedTuple):
    """What the choice of tiles depends on.

    Attributes:
        name: As the compiler calls it: "sm_90".
        processors: Multiprocessors of the GPU.
        shared: Bytes of shared memory that a program may take.
        warpgroups: Whether four warps multiply together (WGMMA, tcgen05).
        warps: Warps of a program that multiplies. Out of tensor memory (tcgen05) a thread gets a
            whole row of sums if four warps share them: more than it has registers for.
        stores: Maps of at least so many pixels, all fits together, are stored normalised and
            activated where convolutions read them; None: no map is.
        counts: Results of at least so many pixels have their statistics taken by a launch of its
            own; None: no result has.
        registers: Most that a thread of a forward convolution may have, where the compiler has to
            be told: else it spills for the sake of one more program to a multiprocessor, for which
            there is no shared memory.
        table: Tiles that are better than those of the rules, by `Tiles.key`.
    """

    name: str
    processors: int
    shared: int
    warpgroups: bool = False
    warps: int = 4
    registers: int | None = None
    stores: int | None = None
    counts: int | None = None
    table: Mapping[str, Tile] = MappingProxyType({})


ARCHITECTURES = {
    each.name: each._replace(table=tables.read(each.name))
    for each in (
        Architecture("sm_80", 108, 166912),
        Architecture("sm_86", 84, 101376, registers=255),
        Architecture("sm_89", 128, 101376, registers=255),
        Architecture("sm_90", 132, 232448, True),
        Architecture("sm_100", 148, 232448, True, 8, 255),
        Architecture("sm_120", 170, 101376),
        Architecture("gfx942", 304, 65536),
        # One processor: nothing is gained there by cutting small.
        Architecture("interpreter", 1, 1 << 30),
    )
}


_SMALL = 256  # pixels; modelled times of both ways cross between this and 1024


def power(n: int, least: int = 1) -> int:
    """Return the next power of 2, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


P = ParamSpec("P")


def _tunable(
    rule: Callable[Concatenate["Tiles", P], Tile],
) -> Callable[Concatenate["Tiles", P], Tile]:
    """Let the architecture's table overrule a rule, and note what was asked for."""
    signature = inspect.signature(rule)

    @functools.wraps(rule)
    def choose(self: "Tiles", *args: P.args, **kwargs: P.kwargs) -> Tile:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        key = self.key(rule.__name__, *list(bound.arguments.values())[1:])
        tile = self.architecture.table.get(key)
        self.chosen[key] = rule(self, *args, **kwargs) if tile is None else tile
        return self.chosen[key]

    return choose  # type: ignore[return-value]  # `self` is positional


class Tiles:
    """The tiles of one plan.

    Args:
        architecture: Of the GPU.
        dtype: Storage type.
        fits: Fits in one launch.

    Attributes:
        chosen: Every tile that was asked for, by `key`.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype, fits: int) -> None:
        self.chosen: dict[str, Tile] = {}
        self.architecture, self.dtype, self.fits = architecture, dtype, fits
        # Float32 products run without matrix units, and hold twice the registers.
        self.wide = dtype == torch.float32 and architecture.name != "interpreter"

    def key(self, rule: str, *shape: int) -> str:
        """Return what a tile is kept under: the rule, its arguments, storage type and fits."""
        kind = str(self.dtype).removeprefix("torch.")
        return " ".join([rule, *(str(int(n)) for n in shape), kind, f"F{self.fits}"])

    @_tunable
    def product(
        self, rows: int, columns: int, outputs: int, inputs: int, sums: int, groups: int = 1
    ) -> Tile:
        """Cut a convolution, forward or with respect to its input.

        Args:
            rows: Rows of pixels of one group of outputs.
            columns: Columns of them.
            outputs: Channels computed.
            inputs: Channels summed over at each slot.
            sums: Slots.
            groups: Groups of rows and columns together.
        """
        block = _block(outputs, 64 if self.wide else 128)
        depth = _block(inputs, 16 if self.wide else 64)
        steps = sums * triton.cdiv(inputs, depth)
        processors = self.architecture.processors
        pixels, programs = 64, 1
        for pixels in (64,) if self.wide else (128, 64):
            high, across = _cut(pixels, rows, columns)
            tiles = triton.cdiv(rows * columns, high * across) * groups * self.fits
            programs = tiles * triton.cdiv(outputs, block)
            if programs >= 3 * processors // 2:
                break
        splits = max(1, min(8, steps // 2, 2 * processors // programs))
        high, across = _cut(pixels, rows, columns)
        depth, stages = self._stages(pixels, block, depth)
        warps, registers = self.architecture.warps, self.architecture.registers
        return Tile(high, across, block, depth, splits, warps, stages, registers)

    @_tunable
    def weights(self, pixels: int, matrix: int, outputs: int, groups: int = 1) -> Tile:
        """Cut the gradient of a convolution's weights: a block of a matrix, summed over pixels.

        Args:
            pixels: Pixels of one group of outputs.
            matrix: Rows of the weight of a group, seen as a matrix: slots times inputs.
            outputs: Its columns.
            groups: Groups of rows and columns together.

        Returns:
            `rows` is the block of rows (with `columns` 1), `inputs` the pixels of one product.
        """
        most = 64 if self.wide else 128
        depth = 16 if self.wide else 64
        rows, block = _block(matrix, most), _block(outputs, most)
        tiles = triton.cdiv(matrix, rows) * triton.cdiv(outputs, block) * groups * self.fits
        # One program a processor: others do dgrad, and every split is read once more.
        room = self.architecture.processors // tiles
        splits = max(1, min(room, triton.cdiv(pixels, 4 * depth)))
        depth, stages = self._stages(rows, block, depth)
        return Tile(rows, 1, block, depth, splits, self.architecture.warps, stages)

    @_tunable
    def stream(self, pixels: int, channels: int) -> Tile:
        """Cut a pass over all pixels by programs that each take a contiguous range.

        Each program leaves a sum behind, to be written and read once more: fewer than there could
        be, and those with several tiles, where the map is small.
        """
        processors = self.architecture.processors
        warpgroups = self.architecture.warpgroups and not self.wide
        # Where a warp multiplies by itself, its factors take registers, and fewer pixels fit.
        tile = 32 if warpgroups else 16
        block = 16 if self.wide else power(channels, 16)
        tiles = triton.cdiv(pixels, tile)
        turns = max(1, round(tiles**0.5 / 5))
        programs = max(1, min(triton.cdiv(tiles, turns), processors // self.fits))
        # Half as many warps hold half of the inputs, and leave room for a program with the others.
        halved = warpgroups and 2 * programs * self.fits <= processors
        return Tile(1, tile, block, block, programs, 4 if halved or channels < 64 else 8, 2)

    @_tunable
    def head(self, pixels: int, channels: int) -> Tile:
        """Cut the head: a pass over all pixels whose sums are small, two programs a processor."""
        tile, block = 16, power(channels, 16)
        places = 2 * self.architecture.processors // self.fits
        programs = max(1, min(triton.cdiv(pixels, tile), places))
        return Tile(1, tile, block, block, programs, 8 if self.wide or block > 128 else 4, 2)

    @_tunable
    def elementwise(self, channels: int, elements: int = 8192) -> Tile:
        """Cut a pass that takes each pixel by itself, so many numbers a program."""
        block = power(channels, 16)
        return Tile(1, max(1, elements // block), block, block, 1, 4, 1)

    @_tunable
    def patches(self, rows: int, columns: int, channels: int, *, whole: bool = False) -> Tile:
        """Cut a pass that memory bounds, over patches of pixels that see their neighbours.

        Args:
            rows: Rows of the map.
            columns: Columns of it.
            channels: Channels.
            whole: Whether a program needs all channels of a pixel.

        Returns:
            `splits` is how many programs share the patches.
        """
        high, across, block, warps = 4, 8, power(channels, 16), 4
        if self.wide:
            high, block, warps = (2, block, 8) if whole else (4, min(block, 32), 4)
        elif self.architecture.warpgroups and not whole:  # these multiply 64 rows
            high, block = 8, min(block, 64)
        patches = triton.cdiv(rows, high) * triton.cdiv(columns, across)
        if whole:  # each program leaves sums that others read: two patches at least
            patches = triton.cdiv(patches, 2)
        blocks = triton.cdiv(channels, block)
        most = max(1, 2 * self.architecture.processors // (blocks * self.fits))
        return Tile(high, across, block, block, min(patches, most), warps, 1 if whole else 2)

    @_tunable
    def join(self, rows: int, columns: int, channels: int) -> Tile:
        """Cut the passes of a join: small blocks of channels, for their weights' sake."""
        block, pixels = 16, 64
        elements = rows * columns * channels * self.fits
        for pixels in (512, 256, 128, 64):
            if elements >= 2 * self.architecture.processors * pixels * block:
                break
        high, across = _cut(pixels, rows, columns)
        return Tile(high, across, block, 16, 1, 4, 1)

    def stores(self, rows: int, columns: int) -> bool:
        """Return whether a map is stored as convolutions read it; see `apply`."""
        least = self.architecture.stores
        return least is not None and self.fits * rows * columns >= least

    def counts(self, rows: int, columns: int) -> bool:
        """Return whether a convolution leaves the statistics of its result to `apply.count`."""
        least = self.architecture.counts
        return least is not None and self.fits * rows * columns >= least

    def folds(self, rows: int, columns: int, up: Up) -> bool:
        """Return whether to fold a join that can be folded.

        It saves products and bytes; bilinear enlargement then takes a launch more, for its filter,
        which of small maps costs more than all that.

        Args:
            rows: Rows of the map that is enlarged.
            columns: Columns of it.
            up: How it is enlarged.
        """
        small = self.fits * rows * columns <= _SMALL and self.architecture.processors > 1
        return up == "nearest" or not small

    @_tunable
    def concat(self, rows: int, columns: int, channels: int) -> Tile:
        """Cut a join that is not folded: pixels of the map that is enlarged."""
        high, across = _cut(64, rows, columns)
        return Tile(high, across, min(power(channels, 16), 32), 16, 1, 8, 1)

    def _stages(self, first: int, second: int, depth: int) -> tuple[int, int]:
        """Return a depth, and 2 to 4 stages, that let two programs share a multiprocessor."""
        room = (self.architecture.shared + 1024) // 2 - 1024
        stage = (first + second) * depth * self.dtype.itemsize
        # Where a warp multiplies by itself, its factors take registers, which a large tile lacks.
        if not self.architecture.warpgroups and first * second >= 16384 and depth > 32:
            depth, stage = 32, stage * 32 // depth
        buffers = room // stage + (not self.architecture.warpgroups)
        return depth, max(2, min(4, buffers))


def _block(channels: int, most: int) -> int:
    """Return how many channels to take at a time, a power of 2.

    Masks of a block that is not full take registers, which a large tile lacks: then half as many.
    """
    if channels > most and channels % most:
        most //= 2
    return max(16, min(power(channels), most))


def _cut(pixels: int, rows: int, columns: int) -> tuple[int, int]:
    across = min(power(columns), 16, pixels)
    high = min(power(rows), pixels // across)
    return max(high, 16 // across), across
