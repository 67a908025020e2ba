"""Backward of a convolution: both gradients, of every geometry, in one launch.

dgrad and wgrad share nothing but their inputs, so each has programs of its own. Those of wgrad come
first: they are the longer ones, and what is left over of the GPU when they end goes to dgrad's. A
1x1 convolution of the same input may ride along: its part of dx is one more product of dgrad, its
dweight the work of a few more programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.conv_dgrad import dgrad, tiles
from flashdip.kernels.fused.conv_wgrad import wgrad
from flashdip.kernels.fused.geometry import Geometry
from flashdip.kernels.fused.launch import Allocator, Gradient, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import scratch_shapes


class Side(NamedTuple):
    """A 1x1 convolution of the same input, with few outputs.

    Attributes:
        dy: The gradient of its result, [F, H, W, Cs].
        weight: [F, 1, 1, I, Cs] in the storage type.
        dweight: [F, splits, 1, 1, I, Cs] float32, written: partial sums.
    """

    dy: Gradient
    weight: Tensor
    dweight: Tensor


class Scale(NamedTuple):
    """The join's scale, which a weight was multiplied by.

    Attributes:
        master: The weight without it, [F, 3, 3, I, O] float32; the last two axes contiguous.
        affine: [F, 3, I] float32: mean, 1 / standard deviation, scale.
        gradient: [F, I] float32, written.
        dgamma: [F, I] float32, written; rows may lie apart.
    """

    master: Tensor
    affine: Tensor
    gradient: Tensor
    dgamma: Tensor


def backward(
    name: str,
    x: Map,
    weight: Tensor,
    dy: Tensor,
    geometry: Geometry,
    tile_dgrad: Tile,
    tile_wgrad: Tile,
    memory: Allocator,
    *,
    dx: Tensor | None,
    dweight: Tensor,
    norm: Norm | None = None,
    pull: Tensor | None = None,
    add: Tensor | None = None,
    side: Side | None = None,
    scale: Scale | None = None,
    value: Map | None = None,
) -> Launch:
    """Compute the gradients of a convolution's input and weight.

    Args:
        x: The input, [F, H, W, I].
        weight: [F, K, K, I, O], or folded [F, 2, 2, 2, 2, I, O], in the storage type.
        dy: The gradient of the result, [F, geometry.side(H), geometry.side(W), O], in the storage
            type.
        tile_dgrad: So many pixels and `outputs` channels of x a program, `inputs` channels of dy a
            product.
        tile_wgrad: `rows * columns` pairs of slot and channel of x and `outputs` channels of dy a
            program, `inputs` pixels a product. A launch has as many warps as the tile that asks for
            more.
        dx: [F, H, W, I] in the storage type, written: the gradient before x's activation, or
            without `norm` that of x's value. None: not wanted.
        dweight: [F, splits, <shape of weight without F>] float32, written: partial sums.
        norm: The normalisation of the layer that made x; its gradients are written. None, like
            `pull`, where x has no affine, dx is None, or others have yet to add to it.
        pull: [F, 3, I] float32, written; see `flashdip.kernels.fused.norm`.
        add: [F, H, W, I] in the storage type: what others gave to the gradient of x's value.
        side: Of the same x.
        value: x as the sums over its pixels read it, where its value is stored; None: x.
        scale: Of a join's weights: what the loss gains by it is written.
    """
    value = x if value is None else value
    fits, height, width, inputs = x.raw.shape
    outputs, splits = weight.shape[-1], dweight.shape[1]
    groups, matrix = geometry.groups**2, geometry.size**2 * inputs
    members = geometry.members(height), geometry.members(width)
    columns = min(16, tile_wgrad.inputs, triton.next_power_of_2(members[1]))
    block_r, block_o = _block(tile_wgrad.pixels, matrix), _block(tile_wgrad.outputs, outputs)
    shares = triton.cdiv(outputs, block_o) * groups * splits
    programs = triton.cdiv(matrix, block_r) * shares
    arguments: dict[str, Tensor | int | float | None] = {
        "x_ptr": x.raw,
        "affine_ptr": x.affine,
        "value_ptr": value.raw,
        "value_affine_ptr": value.affine,
        "weight_ptr": weight,
        "weights": weight.stride(0),
        "dy_ptr": dy,
        "dx_ptr": dx,
        "dweight_ptr": dweight,
        "H": height,
        "W": width,
        "splits": splits,
        "dgrad_splits": tile_dgrad.splits,
        "wgrads": programs,
    }
    arguments |= dict.fromkeys(_OPTIONAL) | {"add_ptr": add}
    products = fits * members[0] * members[1] * groups * matrix * outputs * (1 + (dx is not None))
    traffic = size(
        *x[:2],
        None if value is x else value.raw,
        dy,
        dx,
        add,
        dweight,
        None if dx is None else weight,
    )
    if scale is not None:
        arguments |= {
            "master_ptr": scale.master,
            "masters": scale.master.stride(0),
            "taps": scale.master.stride(2),
            "join_ptr": scale.affine,
            "ds_ptr": scale.gradient,
            "join_dgamma_ptr": scale.dgamma,
            "join_parameters": scale.dgamma.stride(0),
            "shares_ptr": memory.share((fits * shares * matrix,), torch.float32),
            "arrivals_ptr": memory.keep((fits,), torch.int32),
        }
        traffic += size(*scale)
    if side is not None:
        side_splits, few = side.dweight.shape[1], side.weight.shape[-1]
        programs += triton.cdiv(inputs, _block(tile_wgrad.pixels, inputs)) * side_splits
        arguments |= {
            "side_du_ptr": side.dy.du,
            "side_y_ptr": side.dy.y,
            "side_pull_ptr": side.dy.pull,
            "side_weight_ptr": side.weight,
            "side_weights": side.weight.stride(0),
            "side_dweight_ptr": side.dweight,
            "side_splits": side_splits,
        }
        products += fits * height * width * inputs * few * (1 + (dx is not None))
        traffic += size(*side.dy, side.dweight, None if dx is None else side.weight)
    block_dx = _block(tile_dgrad.outputs, inputs)
    if dx is not None:
        count = tiles(geometry, height, width, tile_dgrad.pixels)
        jobs = count * triton.cdiv(inputs, block_dx)
        programs += jobs * tile_dgrad.splits
        if tile_dgrad.splits > 1:
            shape = (fits * jobs, tile_dgrad.splits, tile_dgrad.pixels, block_dx)
            arguments |= {
                "terms_ptr": memory.share(shape, torch.float32),
                "terms_arrivals_ptr": memory.keep(shape[:1], torch.int32),
            }
        if norm is not None:
            parts, counters = scratch_shapes(fits, count, inputs, block_dx)
            arguments |= {
                "parts_ptr": memory.share((parts,), torch.float32),
                "counters_ptr": memory.keep((counters,), torch.int32),
                "pull_ptr": pull,
                "dgamma_ptr": norm.dgamma,
                "dbeta_ptr": norm.dbeta,
                "parameters": norm.dgamma.stride(0),
            }
            traffic += size(pull, norm.dgamma, norm.dbeta)
    return Launch(
        name,
        _backward,
        (programs, fits, 1),
        arguments,
        {
            "IN": inputs,
            "OUT": outputs,
            "SIDE": 0 if side is None else side.weight.shape[-1],
            "ACT": x.act,
            "VALUE_ACT": value.act,
            "KIND": geometry.kind,
            "K": geometry.size,
            "S": geometry.stride,
            "BEFORE": geometry.before,
            "PAD": geometry.pad,
            "PIXELS": tile_dgrad.pixels,
            "BLOCK_DX": block_dx,
            "BLOCK_DY": _block(tile_dgrad.inputs, outputs),
            "STAGES": tile_dgrad.stages,
            "SUM_ROWS": tile_wgrad.inputs // columns,
            "SUM_COLUMNS": columns,
            "BLOCK_R": block_r,
            "BLOCK_O": block_o,
            "SUM_STAGES": tile_wgrad.stages,
        },
        warps=max(tile_dgrad.warps, tile_wgrad.warps),
        stages=tile_dgrad.stages,
        flops=2 * products,
        bytes=traffic,
        gemm=True,
    )


def _block(wanted: int, channels: int) -> int:
    """Return how many channels to take at a time: no more than there are, but 16."""
    return max(16, min(wanted, int(triton.next_power_of_2(channels))))


_OPTIONAL = (
    "master_ptr", "masters", "taps", "join_ptr", "ds_ptr", "join_dgamma_ptr", "join_parameters",
    "shares_ptr", "arrivals_ptr", "side_du_ptr", "side_y_ptr", "side_pull_ptr", "side_weight_ptr",
    "side_weights", "side_dweight_ptr", "side_splits", "terms_ptr", "terms_arrivals_ptr",
    "parts_ptr", "counters_ptr", "pull_ptr", "dgamma_ptr", "dbeta_ptr", "parameters",
)  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "H", "W", "splits", "dgrad_splits", "wgrads", "join_parameters", "side_splits",
        "parameters",
    ]
)  # fmt: skip
def _backward(
    x_ptr, affine_ptr, value_ptr, value_affine_ptr, weight_ptr, weights, dy_ptr, dx_ptr,
    dweight_ptr, H, W, splits, dgrad_splits, wgrads, master_ptr, masters, taps, join_ptr, ds_ptr,
    join_dgamma_ptr, join_parameters, shares_ptr, arrivals_ptr, side_du_ptr, side_y_ptr,
    side_pull_ptr, side_weight_ptr, side_weights,
    side_dweight_ptr, side_splits, add_ptr, terms_ptr, terms_arrivals_ptr, parts_ptr, counters_ptr,
    pull_ptr, dgamma_ptr, dbeta_ptr, parameters, IN: tl.constexpr, OUT: tl.constexpr,
    SIDE: tl.constexpr, ACT: tl.constexpr, VALUE_ACT: tl.constexpr, KIND: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_DX: tl.constexpr,
    BLOCK_DY: tl.constexpr, STAGES: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, SUM_STAGES: tl.constexpr,
):  # fmt: skip
    pid, fit = tl.program_id(0), tl.program_id(1)
    BLOCK_I: tl.constexpr = max(16, min(BLOCK_R, triton.next_power_of_2(IN)))
    sides = 0
    if side_du_ptr is not None:
        sides = tl.cdiv(IN, BLOCK_I) * side_splits
    if pid < wgrads:
        wgrad(
            pid, fit, H, W, value_ptr, value_affine_ptr, dy_ptr, None, None, dweight_ptr, splits,
            master_ptr, masters, taps, join_ptr, ds_ptr, join_dgamma_ptr, join_parameters,
            shares_ptr, arrivals_ptr,
            IN, OUT, VALUE_ACT, KIND, K, S, BEFORE, PAD, SUM_ROWS, SUM_COLUMNS, BLOCK_R, BLOCK_O,
            SUM_STAGES,
        )  # fmt: skip
    elif pid < wgrads + sides:
        if side_du_ptr is not None:
            wgrad(
                pid - wgrads, fit, H, W, value_ptr, value_affine_ptr, side_du_ptr, side_y_ptr,
                side_pull_ptr, side_dweight_ptr, side_splits,
                None, None, None, None, None, None, None, None, None,
                IN, SIDE, VALUE_ACT, "conv", 1, 1, 0, PAD, SUM_ROWS, SUM_COLUMNS, BLOCK_I,
                max(16, triton.next_power_of_2(SIDE)), SUM_STAGES,
            )  # fmt: skip
    else:
        if dx_ptr is not None:
            dgrad(
                pid - wgrads - sides, fit, tl.num_programs(1), H, W, x_ptr, affine_ptr,
                weight_ptr, weights, dy_ptr, dx_ptr, side_du_ptr, side_y_ptr, side_pull_ptr,
                side_weight_ptr, side_weights, add_ptr, dgrad_splits, terms_ptr,
                terms_arrivals_ptr, parts_ptr, counters_ptr, pull_ptr, dgamma_ptr, dbeta_ptr,
                parameters, IN, OUT, SIDE, ACT, KIND, K, S, BEFORE, PAD, PIXELS, BLOCK_DX, BLOCK_DY,
                STAGES,
            )  # fmt: skip
