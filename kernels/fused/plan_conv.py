"""Planning of convolutions, forward and backward."""

import torch
import triton
from torch import Tensor

from flashdip.kernels.fused import apply, conv, conv_backward, pointwise, pool, smooth_backward
from flashdip.kernels.fused.conv import Convolution
from flashdip.kernels.fused.conv_backward import Side
from flashdip.kernels.fused.geometry import Geometry
from flashdip.kernels.fused.plan import Plan
from flashdip.kernels.fused.record import Conv


def forward(plan: Plan, node: Conv) -> None:
    """Plan a convolution, its norm's statistics, and the one that rides along."""
    if node.carrier is not None:
        return  # planned with the one that carries it
    rider, own = node.rider, _convolution(plan, node)
    name = f"{plan.name(node)} forward"
    if rider is None:
        x, weight, geometry, y, tile, norm, affine, *_ = own
        launch = conv.forward(
            name, x, weight, geometry, y, tile, plan.memory, norm=norm, affine=affine
        )
    else:
        launch = conv.forward_pair(name, own, _convolution(plan, rider), plan.memory)
    plan.launches.append(launch)
    for each in (node, rider):
        if each is not None and not each.pooled:
            _count(plan, each)
    if node.pooled:
        made = plan.made[node]
        assert made.map.affine is not None
        if node.down == "max":
            made.largest = plan.memory.share(tuple(made.map.raw.shape), torch.uint8)
        plan.launches.append(
            pool.forward(
                f"{plan.name(node)} pooling",
                own.y,
                made.map.raw,
                node.down,
                made.largest,
                made.norm,
                made.map.affine,
                plan.tiles.elementwise(own.y.shape[3], 2048),
                plan.memory,
            )
        )


def _count(plan: Plan, node: Conv) -> None:
    """Plan the statistics of a result, where its convolution leaves them."""
    map, norm = plan.made[node].map, plan.made[node].norm
    if plan.tiles.counts(*map.raw.shape[1:3]):
        assert map.affine is not None
        tile = plan.tiles.elementwise(map.raw.shape[3])
        name = f"{plan.name(node)} statistics"
        plan.launches.append(apply.count(name, map.raw, norm, map.affine, tile, plan.memory))


def _convolution(plan: Plan, node: Conv) -> Convolution:
    x, geometry = plan.read(node), _geometry(node)
    size, inputs, outputs = node.shape
    height, width = (geometry.members(side) for side in x.raw.shape[1:3])
    tile = plan.tiles.product(height, width, outputs, inputs, size**2)
    weight = plan.weight(node.weight)
    if node.pooled:
        assert height % 2 == width % 2 == 0
        plan.make(node, height // 2, width // 2)
        full = plan.memory.share((plan.fits, height, width, outputs), plan.dtype)
        return Convolution(x, weight, geometry, full, tile)
    made = plan.make(node, height, width)
    affine = made.map.affine
    if plan.tiles.counts(height, width):
        return Convolution(x, weight, geometry, made.map.raw, tile)
    return Convolution(x, weight, geometry, made.map.raw, tile, made.norm, affine)


def backward(plan: Plan, node: Conv) -> None:
    """Plan the gradients of a convolution's weights and input."""
    if node.carrier is not None:
        return  # planned with the one that carries it
    if node.pointwise:
        _backward_pointwise(plan, node)
        return
    geometry, x = _geometry(node), plan.map(node.x)
    size, inputs, outputs = node.shape
    name, (height, width) = plan.name(node), x.raw.shape[1:3]
    members = tuple(geometry.members(side) for side in (height, width))
    dy = _settle(plan, node, (plan.fits, *members, outputs))
    pixels = members[0] * members[1]
    tile = plan.tiles.weights(pixels, size**2 * inputs, outputs)
    rider, side = node.rider, None
    if rider is not None:
        other = plan.made[rider].gradient
        few = rider.shape[2]
        splits = plan.tiles.weights(height * width, inputs, few).splits
        dweight = plan.partial(rider.weight, splits)
        side = Side(other, plan.weight(rider.weight), dweight)
    norm, pull, dx, add = plan.receive(node, node.x)
    down, across = (triton.cdiv(n, geometry.stride) for n in (height, width))
    plan.launches.append(
        conv_backward.backward(
            f"{name} backward",
            x,
            plan.weight(node.weight),
            dy,
            geometry,
            plan.tiles.product(down, across, inputs, outputs, size**2, geometry.stride**2),
            tile,
            plan.memory,
            dx=dx,
            dweight=plan.partial(node.weight, tile.splits),
            norm=norm,
            pull=pull,
            add=add,
            side=side,
            value=plan.read(node),
        )
    )


def _settle(plan: Plan, node: Conv, shape: tuple[int, ...]) -> Tensor:
    """Plan dy of a convolution out of its pending gradient."""
    dy = plan.memory.share(shape, plan.dtype)
    name, gradient = f"{plan.name(node)} gradient", plan.made[node].gradient
    memory, elementwise = plan.memory, plan.tiles.elementwise
    if node.pooled:
        largest, tile = plan.made[node].largest, elementwise(shape[3], 2048)
        launch = pool.backward(name, gradient, dy, node.down, largest, tile, memory)
    else:
        tile = elementwise(shape[3])
        launch = smooth_backward.backward(name, gradient, dy, tile, memory, bilinear=False)
    plan.launches.append(launch)
    return dy


def _backward_pointwise(plan: Plan, node: Conv) -> None:
    x = plan.map(node.x)
    _, inputs, outputs = node.shape
    tile = plan.tiles.stream(x.raw.shape[1] * x.raw.shape[2], max(inputs, outputs))
    norm, pull, dx = plan.take(node.x)
    assert dx is not None
    plan.launches.append(
        pointwise.backward(
            f"{plan.name(node)} backward",
            x,
            plan.weight(node.weight),
            plan.made[node].gradient,
            dx,
            norm,
            pull,
            plan.partial(node.weight, tile.splits),
            tile,
            plan.memory,
        )
    )


def _geometry(node: Conv) -> Geometry:
    size = node.shape[0]
    return Geometry("conv", size, 1 if node.pooled else node.stride, (size - 1) // 2, node.pad)
