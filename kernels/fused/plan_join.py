"""Planning of joins that are folded into the convolution behind them, forward and backward."""

import torch
import triton
from torch import Tensor

from flashdip.kernels.fused import (
    conv,
    conv_backward,
    join,
    join_backward,
    smooth,
    smooth_backward,
)
from flashdip.kernels.fused.conv_backward import Scale
from flashdip.kernels.fused.geometry import Geometry
from flashdip.kernels.fused.launch import Map
from flashdip.kernels.fused.plan import Joined, Plan
from flashdip.kernels.fused.record import THIN, Join


def forward(plan: Plan, node: Join) -> None:
    """Plan statistics and folded weights, the convolution, and the filter behind it."""
    memory, name = plan.memory, plan.name(node)
    deep = plan.map(node.deep)
    skip = None if node.skip is None else plan.map(node.skip)
    fits, height, width, channels = deep.raw.shape
    _, _, outputs = node.shape
    assert skip is None or skip.raw.shape[1:3] == (2 * height, 2 * width)
    joined = Joined(
        value=Map(memory.share((fits, height, width, channels), plan.dtype)),
        deep_affine=memory.share((fits, 3, channels), torch.float32),
        folded=memory.share((fits, 2, 2, 2, 2, channels, outputs), plan.dtype),
        skip_affine=None,
        skip_weight=None,
    )
    plan.joined[node] = joined
    if skip is not None:
        few = skip.raw.shape[3]
        rows = (triton.cdiv(9 * few, 16) * 16,) if few <= THIN else (3, 3, few)
        joined.skip_affine = memory.share((fits, 3, few), torch.float32)
        joined.skip_weight = memory.share((fits, *rows, outputs), plan.dtype)
    plan.launches.append(
        join.forward(
            f"{name.removesuffix('.up')}.join forward",
            deep,
            skip,
            plan.master(node.join_gamma),
            plan.master(node.weight),
            node.up,
            joined.value.raw,
            joined.deep_affine,
            joined.skip_affine,
            joined.folded,
            joined.skip_weight,
            plan.tiles.join(height, width, channels),
            memory,
        )
    )
    made = plan.make(node, 2 * height, 2 * width)
    geometry = Geometry(node.up, 2, 1, 1, node.pad)
    members = geometry.members(height), geometry.members(width)
    tile = plan.tiles.product(*members, outputs, channels, 4, 4)
    affine = made.map.affine
    assert affine is not None
    thin, add = skip, None
    if _wide(plan, node):
        thin, add = None, _forward_skip(plan, node)
    weight = None if thin is None else joined.skip_weight
    if node.up == "nearest":
        plan.launches.append(
            conv.forward(
                f"{name} forward",
                joined.value,
                joined.folded,
                geometry,
                made.map.raw,
                tile,
                memory,
                norm=made.norm,
                affine=affine,
                skip=thin,
                skip_weight=weight,
                add=add,
            )
        )
        return
    doubled = memory.share((fits, 2 * height + 2, 2 * width + 2, outputs), plan.dtype)
    plan.launches.append(
        conv.forward(
            f"{name} forward", joined.value, joined.folded, geometry, doubled, tile, memory
        )
    )
    plan.launches.append(
        smooth.forward(
            f"{name} filter",
            doubled,
            made.map.raw,
            made.norm,
            affine,
            plan.tiles.patches(2 * height, 2 * width, outputs),
            memory,
            skip=thin,
            skip_weight=weight,
            add=add,
        )
    )


def _forward_skip(plan: Plan, node: Join) -> Tensor:
    """Plan the convolution of a wide skip; return its result."""
    assert node.skip is not None
    skip, weight = plan.map(node.skip), plan.joined[node].skip_weight
    assert weight is not None
    fits, height, width, channels = skip.raw.shape
    outputs = weight.shape[-1]
    y = plan.memory.share((fits, height, width, outputs), plan.dtype)
    plan.launches.append(
        conv.forward(
            f"{plan.name(node)} skip forward",
            skip,
            weight,
            Geometry("conv", 3, 1, 1, node.pad),
            y,
            plan.tiles.product(height, width, outputs, channels, 9),
            plan.memory,
        )
    )
    return y


def backward(plan: Plan, node: Join) -> None:
    """Plan the way back through all of them."""
    memory, name = plan.memory, plan.name(node)
    joined, made, bilinear = plan.joined[node], plan.made[node], node.up == "bilinear"
    fits, height, width, channels = joined.value.raw.shape
    _, _, outputs = node.shape
    skip = None if node.skip is None else plan.map(node.skip)
    few = 0 if skip is None else skip.raw.shape[3]
    dgamma, master = plan.gradient(node.join_gamma), plan.master(node.weight)

    # dy, and what it means for a thin skip.
    border = 2 * bilinear
    dy = memory.share((fits, 2 * height + border, 2 * width + border, outputs), plan.dtype)
    tile = plan.tiles.patches(2 * height + border, 2 * width + border, outputs, whole=True)
    thin = thin_weight = skip_g = dskip = skip_ds = None
    if skip is not None and joined.skip_weight is not None and not _wide(plan, node):
        thin, thin_weight = skip, joined.skip_weight
        skip_g = memory.share((fits, 2 * height, 2 * width, 9, few), plan.dtype)
        dskip = memory.share((fits, tile.splits, 9 * few, outputs), torch.float32)
        skip_ds = memory.share((fits, few), torch.float32)
    plan.launches.append(
        smooth_backward.backward(
            f"{name} gradient",
            made.gradient,
            dy,
            tile if thin is not None or bilinear else plan.tiles.elementwise(outputs),
            memory,
            bilinear=bilinear,
            skip=thin,
            skip_weight=thin_weight,
            taps=skip_g,
            dskip=dskip,
            ds_skip=skip_ds,
            dgamma_skip=None if thin is None else dgamma[:, :few],
            affine_skip=None if thin is None else joined.skip_affine,
            master=None if thin is None else master,
        )
    )
    if _wide(plan, node):
        skip_g, dskip, skip_ds = _backward_skip(plan, node, None if bilinear else dy)

    # The convolution of the small map.
    geometry = Geometry(node.up, 2, 1, 1, node.pad)
    members = geometry.members(height), geometry.members(width)
    tile = plan.tiles.weights(members[0] * members[1], 4 * channels, outputs, 4)
    dfolded = memory.share((fits, tile.splits, *joined.folded.shape[1:]), torch.float32)
    deep_ds = memory.share((fits, channels), torch.float32)
    deep_norm, deep_pull, deep_du = plan.take(node.deep)
    assert deep_du is not None
    plan.launches.append(
        conv_backward.backward(
            f"{name} backward",
            joined.value,
            joined.folded,
            dy,
            geometry,
            plan.tiles.product(height, width, channels, outputs, 16),
            tile,
            memory,
            dx=deep_du,
            dweight=dfolded,
            scale=Scale(master[:, :, :, few:], joined.deep_affine, deep_ds, dgamma[:, few:]),
        )
    )

    # The statistics, the activations, and the unfolded weights.
    skip_norm = skip_pull = skip_du = None
    if node.skip is not None:
        skip_norm, skip_pull, skip_du = plan.take(node.skip)
    plan.launches.append(
        join_backward.backward(
            f"{name.removesuffix('.up')}.join backward",
            deep_du,  # the gradient of the value is turned into that before the activation
            plan.map(node.deep),
            deep_norm,
            deep_pull,
            deep_du,
            joined.deep_affine,
            deep_ds,
            dfolded,
            skip,
            skip_norm,
            skip_pull,
            skip_du,
            joined.skip_affine,
            skip_ds,
            skip_g,
            dskip,
            node.up,
            plan.gradient(node.weight),
            plan.tiles.join(height, width, channels),
            memory,
        )
    )


def _backward_skip(plan: Plan, node: Join, dy: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Plan the backward pass of a wide skip's convolution.

    Args:
        dy: The gradient of the join's result, if it is there at full resolution.

    Returns:
        The gradients of the skip's value, of its weights in partial sums, and of their scale.
    """
    assert node.skip is not None
    joined, memory, name = plan.joined[node], plan.memory, plan.name(node)
    skip, affine, weight = plan.map(node.skip), joined.skip_affine, joined.skip_weight
    assert weight is not None and affine is not None
    fits, height, width, channels = skip.raw.shape
    outputs = weight.shape[-1]
    if dy is None:
        dy = memory.share((fits, height, width, outputs), plan.dtype)
        plan.launches.append(
            smooth_backward.backward(
                f"{name} skip gradient",
                plan.made[node].gradient,
                dy,
                plan.tiles.elementwise(outputs),
                memory,
                bilinear=False,
            )
        )
    tile = plan.tiles.weights(height * width, 9 * channels, outputs)
    g = memory.share((fits, height, width, channels), plan.dtype)
    dskip = memory.share((fits, tile.splits, *weight.shape[1:]), torch.float32)
    ds = memory.share((fits, channels), torch.float32)
    master, dgamma = plan.master(node.weight), plan.gradient(node.join_gamma)
    plan.launches.append(
        conv_backward.backward(
            f"{name} skip backward",
            skip,
            weight,
            dy,
            Geometry("conv", 3, 1, 1, node.pad),
            plan.tiles.product(height, width, channels, outputs, 9),
            tile,
            memory,
            dx=g,
            dweight=dskip,
            scale=Scale(master[:, :, :, :channels], affine, ds, dgamma[:, :channels]),
        )
    )
    return g, dskip, ds


def _wide(plan: Plan, node: Join) -> bool:
    """Return whether a join's skip connection has convolutions of its own."""
    return node.skip is not None and plan.map(node.skip).raw.shape[3] > THIN
