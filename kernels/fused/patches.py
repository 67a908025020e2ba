"""Maps cut into patches, and what bilinear enlargement makes of them.

A program has a tile of pixels and a block of channels. The tile is cut into patches, one to a lane:
a lane goes through its patch pixel by pixel, so that what neighbours have in common is loaded and
computed once. Of a map that is not smoothed a patch is one pixel.

Bilinear enlargement A matters to a join by A'A / 4, which smooths a map by [3, 10, 3] / 16 along
each axis, its border replicated.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused import norm
from flashdip.kernels.fused.device import activate, narrow
from flashdip.kernels.fused.launch import Allocator, Map, Tile

IN_PATCHES = 4  # elements to a thread: each stands for a few rows of pixels


class Cut(NamedTuple):
    """How a map is cut into the work of programs.

    Attributes:
        rows: Rows of pixels of a program.
        columns: Columns of them.
        high: Rows of a patch.
        wide: Columns of it.
        block: Channels of a program, a power of 2: fewer of them are made up for by columns.
        programs: Programs for the map.
        parts: Scratch; see `norm.scratch_shapes`. Like the rest, None of no map.
        counters: Likewise.
    """

    rows: int = 1
    columns: int = 1
    high: int = 1
    wide: int = 1
    block: int = 1
    programs: int = 0
    parts: Tensor | None = None
    counters: Tensor | None = None

    @property
    def constants(self) -> dict[str, int]:
        """The cut as a kernel is told it."""
        names = ("rows", "columns", "high", "wide", "block")
        return {name.upper(): getattr(self, name) for name in names}


def cut(x: Map | None, tile: Tile, smooth: bool, memory: Allocator, *, elements: int = 16) -> Cut:
    """Cut a map as large as x, `tile.outputs` channels at a time.

    Args:
        x: The map, [F, H, W, C]; None of no map.
        tile: Pixels (`rows` x `columns`) and channels (`outputs`) of a program, at most.
        smooth: Whether the map is smoothed.
        memory: Where scratch comes from.
        elements: To a thread, where patches are single pixels.
    """
    if x is None:
        return Cut()
    fits, height, width, channels = x.raw.shape
    block = min(triton.next_power_of_2(channels), tile.outputs)
    at_once = min(
        (IN_PATCHES if smooth else elements) * 32 * tile.warps, tile.pixels * tile.outputs
    )
    lanes, rows, columns, high, wide = at_once // block, tile.rows, tile.columns, 1, 1
    if smooth:
        while high * wide * lanes < rows * columns:  # nearly square patches have fewest neighbours
            if wide == columns or (high <= wide and high < rows):
                high *= 2
            else:
                wide *= 2
    else:
        rows = min(rows, lanes)
        columns = lanes // rows
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    parts, counters = norm.scratch_shapes(fits, tiles, channels, block)
    return Cut(
        rows,
        columns,
        high,
        wide,
        block,
        tiles * triton.cdiv(channels, block),
        memory.share((parts,), torch.float32),
        memory.keep((counters,), torch.int32),
    )


@triton.jit
def corners(
    tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Return the row and the column of the first pixel of each of a tile's patches, [lanes]."""
    ACROSS: tl.constexpr = COLUMNS // WIDE
    tiles_across = tl.cdiv(width, COLUMNS)
    i = tl.arange(0, ROWS // HIGH * ACROSS)
    y = tile // tiles_across * ROWS + i // ACROSS * HIGH
    x = tile % tiles_across * COLUMNS + i % ACROSS * WIDE
    return y, x


@triton.jit
def pending(affine_ptr, fit, c, C: tl.constexpr):
    """Return scale and shift of a `Map` at channels c; of one without affine, 1 and 0."""
    scale, shift = tl.full(c.shape, 1.0, tl.float32), tl.zeros(c.shape, tl.float32)
    if affine_ptr is not None:
        scale = tl.load(affine_ptr + fit * 4 * C + c, c < C, other=0.0)
        shift = tl.load(affine_ptr + (fit * 4 + 1) * C + c, c < C, other=0.0)
    return scale, shift


@triton.jit
def row_of(
    raw_ptr, y, x, height, width, c, live, scale, shift, C: tl.constexpr, ACT: tl.constexpr,
    WIDE: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Return the values of a row of patches, and the same smoothed along the row if SMOOTH.

    Args:
        raw_ptr: Of the fit, [height, width, C].
        y: The row, [lanes]; of rows and columns beyond the border the outermost is taken.
        x: The first column, [lanes].
        c: The channels, [channels].
        live: Which of them exist; values of others are act(shift).
        scale: See `Map`, [channels]; `shift` likewise.

    Returns:
        Twice WIDE tensors [lanes, channels] float32, rounded as they are stored; those that are
        smoothed are not.
    """
    EDGE: tl.constexpr = 1 if SMOOTH else 0
    row = tl.minimum(tl.maximum(y, 0), height - 1) * width
    values = ()
    for j in tl.static_range(-EDGE, WIDE + EDGE):
        column = tl.minimum(tl.maximum(x + j, 0), width - 1)
        raw = tl.load(raw_ptr + (row + column)[:, None] * C + c[None, :], live[None, :], other=0.0)
        u = raw.to(tl.float32) * scale[None, :] + shift[None, :]
        value = narrow(activate(u, ACT), raw_ptr.dtype.element_ty).to(tl.float32)
        values += (value,)  # type: ignore[assignment]
    inner, smoothed = values, values
    if SMOOTH:
        inner, smoothed = (), ()
        for j in tl.static_range(WIDE):
            inner += (values[j + 1],)  # type: ignore[assignment]
            smoothed += (smooth(values[j], values[j + 1], values[j + 2]),)  # type: ignore[assignment]
    return inner, smoothed


@triton.jit
def smooth(before, centre, after):
    """Smooth three neighbours by [3, 10, 3] / 16."""
    return (before + after) * 0.1875 + centre * 0.625
