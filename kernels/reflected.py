"""What reflecting a map of doubled pixels adds to the outer lines of its 3x3 convolution.

The bilinear path of `flashdip.kernels.enlarged` needs the convolution one pixel beyond the doubled
map's border. Its phases see the small map x, padded by replication, so that they have x[0] where
reflection about the doubled map's outermost pixel has x[1]. What that differs by is a convolution
along each side of the strip x[1] - x[0], doubled, with the outermost taps: two phases, each of two
neighbours. At the ends of a side the strip is taken as replicated, as it is everywhere; by how much
reflection along the other side differs there is one product more for each of the four corners.

A strip lies as [pixels, channels], where a pixel and its next are one row: nothing is unfolded.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import recall
from flashdip.kernels.phases import SEEN


def frame(x: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Pad x by replication; beside it, what reflection adds to the outer lines.

    Args:
        x: The small map, [F, C, H, W]; H and W at least 2.
        sums: Of the weights' taps, as `TAPS` has it, [F, 20, O, C].

    Returns:
        [F, C, H + 2, W + 2], and the lines above, below, left and right, [F, 4, 2 L + 2, O], where
        L is the longer of H and W; what follows the end of a shorter line means nothing.
    """
    framed: tuple[Tensor, Tensor] = _Frame.apply(x, sums.to(x.dtype))  # type: ignore[no-untyped-call]
    return framed


def _taps() -> Tensor:
    """Return what each side sees, [side, phase, pixel] in 16 rows, and each corner, [20, 9].

    As rows for `fitwise.combine`.
    """
    first, last = torch.eye(3)[[0, 2]]
    seen = SEEN.flip(0).flatten(0, 1)  # the earlier phase comes first
    sides = [torch.kron(end[None], seen) for end in (first, last)]
    sides += [torch.kron(seen, end[None]) for end in (first, last)]
    corners = [torch.kron(row, column)[None] for row in (first, last) for column in (first, last)]
    return torch.cat(sides + corners)


TAPS = _taps()


def replicated(x: Tensor) -> Tensor:
    """Pad a map by its own border, by one pixel."""
    return F.pad(x, (1,) * 4, mode="replicate")


class _Frame(torch.autograd.Function):
    """See `frame`; takes what the sides and corners see, [F, 20, O, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        padded = recall.made(replicated(x), replicated, x)
        ctx.save_for_backward(padded, taps)  # the former is kept by the convolution as well
        strips = _strips(padded)
        lines = torch.bmm(_windows(strips), _matrices(taps)).view(len(x), 4, -1, taps.shape[2])
        width = x.shape[3]
        corners = taps[:, 16:].unflatten(1, (2, 2)) @ _turns(strips, width)[..., None]
        _ends(lines, width).add_(corners[..., 0])
        return padded, lines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_padded: Tensor, d_lines: Tensor) -> tuple[Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        x, strips = padded[:, :, 1:-1, 1:-1], _strips(padded)
        channels, _, width = x.shape[1:]
        rows = d_lines.reshape(4 * len(x), -1, 2 * taps.shape[2])
        d_matrices = torch.bmm(_windows(strips).mT, rows)
        d_windows = torch.bmm(rows, _matrices(taps).mT).unflatten(0, (-1, 4))
        d_strips = torch.zeros_like(strips)
        d_strips[:, :, :-1] += d_windows[..., :channels]
        d_strips[:, :, 1:] += d_windows[..., channels:]

        ends = _ends(d_lines, width)  # [F, 2, 2, O]
        d_corners = ends[..., None] * _turns(strips, width)[..., None, :]
        d_turns = (ends[..., None, :] @ taps[:, 16:].unflatten(1, (2, 2)))[..., 0, :]
        for turn, inner, edge in ((0, 2, 1), (1, width - 1, width)):
            d_strips[:, :2, inner] += d_turns[:, :, turn]
            d_strips[:, :2, edge] -= d_turns[:, :, turn]

        dx = torch.ops.aten.replication_pad2d_backward(d_padded, x, (1,) * 4)
        for side, (second, first) in enumerate(zip(_lines(dx, 1), _lines(dx, 0), strict=True)):
            length = second.shape[1]
            strip = d_strips[:, side, 1 : length + 1]
            strip[:, 0] += d_strips[:, side, 0]
            strip[:, -1] += d_strips[:, side, length + 1]
            second += strip
            first -= strip
        d_sides = d_matrices.view(len(x), 4, 2, channels, 2, -1).permute(0, 1, 4, 2, 5, 3)
        return dx, torch.cat([d_sides.flatten(1, 3), d_corners.flatten(1, 2)], 1)


def _strips(padded: Tensor) -> Tensor:
    """Return how the second lines of a padded map differ from its first, [F, 4, L + 2, C]."""
    fits, channels, height, width = padded.shape
    strips = padded.new_zeros(fits, 4, max(height, width), channels)
    for side, (inner, edge) in enumerate(zip(_lines(padded, 2), _lines(padded, 1), strict=True)):
        torch.sub(inner, edge, out=strips[:, side, : inner.shape[1]])
    return strips


def _lines(x: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """View the lines at a depth from above, below, left and right, each [F, pixels, C]."""
    end = -1 - depth
    return x[:, :, depth].mT, x[:, :, end].mT, x[..., depth].mT, x[..., end].mT


def _windows(strips: Tensor) -> Tensor:
    """View each pixel of a strip with its next, [4 F, L + 1, 2 C]."""
    fits, sides, length, channels = strips.shape
    shape = (fits * sides, length - 1, 2 * channels)
    return strips.as_strided(shape, (length * channels, channels, 1))


def _matrices(taps: Tensor) -> Tensor:
    """Return what windows are multiplied by, [4 F, 2 C, 2 O]."""
    sides: Tensor = taps[:, :16].unflatten(1, (4, 2, 2)).permute(0, 1, 3, 5, 2, 4)
    return sides.reshape(4 * len(taps), 2 * taps.shape[3], -1)


def _turns(strips: Tensor, width: int) -> Tensor:
    """Return by how much the strips above and below change at their ends, [F, 2, 2, C]."""
    lying = strips[:, :2]
    left, right = lying[:, :, 2] - lying[:, :, 1], lying[:, :, width - 1] - lying[:, :, width]
    return torch.stack([left, right], 2)


def _ends(lines: Tensor, width: int) -> Tensor:
    """View both ends of the lines above and below, [F, 2, 2, O]."""
    return lines[:, :2, : 2 * width + 2 : 2 * width + 1]
