"""Forward convolution as an implicit matrix product, for every geometry.

A program computes a tile of pixels of one group of outputs (see `geometry`) times a block of
channels. A tile is so many pixels in a row, line after line: only a group's last one is not full,
whatever the size of the map; its work is `conv_fprop.fprop`. What happens on the way:

    in front:  a map that is still raw is scaled, activated and rounded as it is loaded; one that
               is a value goes to the matrix units untouched.
    behind:    a thin skip's conv3x3 (one more product), something to add, rounding, and the
               statistics of the normalisation that follows.
    split:     where tiles are few, several programs share a sum; see `conv_split`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.conv_fprop import fprop
from flashdip.kernels.fused.geometry import Geometry
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import scratch_shapes


@triton.jit(do_not_specialize=["H", "W", "splits"])
def _conv_forward(
    H, W, x_ptr, x_affine_ptr, weight_ptr, weights, y_ptr, add_ptr,
    skip_ptr, skip_affine_ptr, skip_weight_ptr, splits, parts_ptr, arrivals_ptr,
    gamma_ptr, beta_ptr, parameters, affine_ptr, statistics_ptr, counters_ptr,
    IN: tl.constexpr, OUT: tl.constexpr, SKIP: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
    SKIP_ACT: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    fprop(
        tl.program_id(0), tl.program_id(1), tl.num_programs(1), H, W, x_ptr, x_affine_ptr,
        weight_ptr, weights, y_ptr, add_ptr, skip_ptr, skip_affine_ptr, skip_weight_ptr, splits,
        parts_ptr, arrivals_ptr, gamma_ptr, beta_ptr, parameters, affine_ptr, statistics_ptr,
        counters_ptr, IN, OUT, SKIP, KIND, K, S, BEFORE, PAD, ACT, SKIP_ACT, PIXELS, OUTPUTS,
        INPUTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "W", "programs", "splits", "splits2"])
def _forward_pair(
    H, W, x_ptr, x_affine_ptr, programs,
    weight_ptr, weights, y_ptr, splits, parts_ptr, arrivals_ptr, gamma_ptr, beta_ptr, parameters,
    affine_ptr, statistics_ptr, counters_ptr,
    weight_ptr2, weights2, y_ptr2, splits2, parts_ptr2, arrivals_ptr2, gamma_ptr2, beta_ptr2,
    parameters2, affine_ptr2, statistics_ptr2, counters_ptr2,
    IN: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
    OUT: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr,
    PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    OUT2: tl.constexpr, K2: tl.constexpr, S2: tl.constexpr, BEFORE2: tl.constexpr,
    PIXELS2: tl.constexpr, OUTPUTS2: tl.constexpr, INPUTS2: tl.constexpr,
):  # fmt: skip
    pid, fit, fits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if pid < programs:
        fprop(
            pid, fit, fits, H, W, x_ptr, x_affine_ptr, weight_ptr, weights, y_ptr, None, None,
            None, None, splits, parts_ptr, arrivals_ptr, gamma_ptr, beta_ptr, parameters,
            affine_ptr, statistics_ptr, counters_ptr, IN, OUT, 0, "conv", K, S, BEFORE, PAD, ACT,
            "none", PIXELS, OUTPUTS, INPUTS,
        )  # fmt: skip
    else:
        fprop(
            pid - programs, fit, fits, H, W, x_ptr, x_affine_ptr, weight_ptr2, weights2, y_ptr2,
            None, None, None, None, splits2, parts_ptr2, arrivals_ptr2, gamma_ptr2, beta_ptr2,
            parameters2, affine_ptr2, statistics_ptr2, counters_ptr2, IN, OUT2, 0, "conv", K2, S2,
            BEFORE2, PAD, ACT, "none", PIXELS2, OUTPUTS2, INPUTS2,
        )  # fmt: skip


class Convolution(NamedTuple):
    """A convolution of `x`, [F, H, W, I], with what follows in the same launch.

    Attributes:
        x: The input.
        weight: [F, K, K, I, O]; of the folded kinds [F, 2, 2, 2, 2, I, O] (group, then slot, y
            before x). In the storage type; rows of fits may be apart.
        geometry: How the output lies over the input.
        y: [F, side(H), side(W), O], in the storage type, written.
        tile: How the work is cut.
        norm: The normalisation whose statistics are taken; not with "bilinear", where a filter is
            still to come.
        affine: [F, 4, O] float32, written where there is a norm.
        skip: Added to y: conv3x3 of this map [F, 2 H, 2 W, Cs], 9 Cs <= 64; only with "nearest".
        skip_weight: [F, 9 Cs rounded up to a multiple of 16, O], in the storage type; row
            (ky * 3 + kx) * Cs + c.
        add: Added to y, like it.
    """

    x: Map
    weight: Tensor
    geometry: Geometry
    y: Tensor
    tile: Tile
    norm: Norm | None = None
    affine: Tensor | None = None
    skip: Map | None = None
    skip_weight: Tensor | None = None
    add: Tensor | None = None

    @property
    def tiles(self) -> int:
        """Tiles of pixels of a fit, those of all groups together."""
        down, across = (self.geometry.members(side) for side in self.x.raw.shape[1:3])
        return int(triton.cdiv(down * across, self.tile.pixels) * self.geometry.groups**2)

    @property
    def jobs(self) -> int:
        """Tiles of a fit, of pixels and channels."""
        return int(self.tiles * triton.cdiv(self.y.shape[3], self.tile.outputs))

    @property
    def programs(self) -> int:
        """Programs of a fit."""
        return self.jobs * self.tile.splits

    @property
    def flops(self) -> int:
        """Operations, twice the multiply-adds that are left after the folding of taps."""
        products = self.geometry.size**2 * self.x.raw.shape[3]
        if self.skip is not None:
            products += 9 * self.skip.raw.shape[3]
        return 2 * products * self.y.numel()

    @property
    def bytes(self) -> int:
        """Traffic, less that of the input."""
        norm = () if self.norm is None else (self.norm.gamma, self.norm.beta)
        skip = () if self.skip is None else (self.skip.raw, self.skip.affine, self.skip_weight)
        return size(self.weight, self.y, self.affine, self.add, *norm, *skip)

    def arguments(self, memory: Allocator) -> dict[str, Any]:
        """Return the kernel's arguments, less those about the input."""
        fits, outputs, norm, splits = self.y.shape[0], self.y.shape[3], self.norm, self.tile.splits
        parts = arrivals = statistics = counters = None
        if splits > 1:
            shape = (fits * self.jobs, splits, self.tile.pixels, self.tile.outputs)
            parts, arrivals = (
                memory.share(shape, torch.float32),
                memory.keep(shape[:1], torch.int32),
            )
        if norm is not None:
            lengths = scratch_shapes(fits, self.tiles, outputs, self.tile.outputs)
            statistics = memory.share(lengths[:1], torch.float32)
            counters = memory.keep(lengths[1:], torch.int32)
        return dict(
            weight_ptr=self.weight,
            weights=self.weight.stride(0),
            y_ptr=self.y,
            splits=splits,
            parts_ptr=parts,
            arrivals_ptr=arrivals,
            gamma_ptr=norm and norm.gamma,
            beta_ptr=norm and norm.beta,
            parameters=norm and norm.gamma.stride(0),
            affine_ptr=self.affine,
            statistics_ptr=statistics,
            counters_ptr=counters,
        )

    def constants(self) -> dict[str, Any]:
        """Return the compile-time constants, less those about the input."""
        return dict(
            OUT=self.y.shape[3],
            K=self.geometry.size,
            S=self.geometry.stride,
            BEFORE=self.geometry.before,
            PIXELS=self.tile.pixels,
            OUTPUTS=self.tile.outputs,
            INPUTS=self.tile.inputs,
        )


def forward(
    name: str,
    x: Map,
    weight: Tensor,
    geometry: Geometry,
    y: Tensor,
    tile: Tile,
    memory: Allocator,
    *,
    norm: Norm | None = None,
    affine: Tensor | None = None,
    skip: Map | None = None,
    skip_weight: Tensor | None = None,
    add: Tensor | None = None,
) -> Launch:
    """Convolve; `Convolution` says what the arguments are."""
    c = Convolution(x, weight, geometry, y, tile, norm, affine, skip, skip_weight, add)
    fits, height, width, inputs = x.raw.shape
    return Launch(
        name=name,
        kernel=_conv_forward,
        grid=(c.programs, fits, 1),
        arguments=dict(
            H=height,
            W=width,
            x_ptr=x.raw,
            x_affine_ptr=x.affine,
            add_ptr=add,
            skip_ptr=skip and skip.raw,
            skip_affine_ptr=skip and skip.affine,
            skip_weight_ptr=skip_weight,
            **c.arguments(memory),
        ),
        constants=dict(
            IN=inputs,
            KIND=geometry.kind,
            PAD=geometry.pad,
            ACT=x.act,
            SKIP=skip.raw.shape[3] if skip else 0,
            SKIP_ACT=skip.act if skip else "none",
            **c.constants(),
        ),
        warps=tile.warps,
        stages=tile.stages,
        flops=c.flops,
        bytes=size(x.raw, x.affine) + c.bytes,
        gemm=True,
        options=tile.options,
    )


def forward_pair(name: str, first: Convolution, second: Convolution, memory: Allocator) -> Launch:
    """Convolve one input twice in one launch: "conv", the same padding, no skip, nothing to add.

    Programs of the first come first; warps, stages and registers are those of its tile.
    """
    x = first.x
    fits, height, width, inputs = x.raw.shape
    arguments, constants = first.arguments(memory), first.constants()
    arguments |= {f"{key}2": value for key, value in second.arguments(memory).items()}
    constants |= {f"{key}2": value for key, value in second.constants().items()}
    return Launch(
        name=name,
        kernel=_forward_pair,
        grid=(first.programs + second.programs, fits, 1),
        arguments=dict(
            H=height,
            W=width,
            x_ptr=x.raw,
            x_affine_ptr=x.affine,
            programs=first.programs,
            **arguments,
        ),
        constants=dict(IN=inputs, PAD=first.geometry.pad, ACT=x.act, **constants),
        warps=first.tile.warps,
        stages=first.tile.stages,
        flops=first.flops + second.flops,
        bytes=size(x.raw, x.affine) + first.bytes + second.bytes,
        gemm=True,
        options=first.tile.options,
    )
