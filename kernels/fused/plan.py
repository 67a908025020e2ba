"""From a recorded network to the launches of one step, in order, with all their memory.

Forward a level of the network is five launches, with bilinear enlargement six; backward it is
eight. A skip connection too wide for that is convolved by launches of its own, and pooling is one
more each way. What a layer leaves behind for the backward pass is kept; gradients are temporaries
that share memory.

Where several layers read a map, each but the last to be planned backward leaves the gradient of the
map's value, which the next one adds to its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flashdip.kernels.fused import (
    conv,
    conv_backward,
    join,
    join_backward,
    pointwise,
    pool,
    smooth,
    smooth_backward,
)
from flashdip.kernels.fused.conv import Convolution
from flashdip.kernels.fused.conv_backward import Scale, Side
from flashdip.kernels.fused.geometry import Geometry
from flashdip.kernels.fused.launch import Gradient, Launch, Map, Norm
from flashdip.kernels.fused.layout import BLOCK, Layout
from flashdip.kernels.fused.memory import Memory
from flashdip.kernels.fused.record import THIN, Conv, Head, Input, Join, Node
from flashdip.kernels.fused.step import Sum
from flashdip.kernels.fused.tiles import Tiles


@dataclass
class Made:
    """What a convolution left behind, and where its gradient lies.

    Attributes:
        map: Its value, as consumers see it.
        norm: Its normalisation.
        pull: [F, 3, C] float32; see `Gradient`.
        du: Its gradient before the activation, once the backward pass got there.
    """

    map: Map
    norm: Norm
    pull: Tensor
    du: Tensor | None = None

    @property
    def gradient(self) -> Gradient:
        """The gradient with respect to the convolution's result."""
        assert self.du is not None
        return Gradient(self.du, self.map.raw, self.pull)


@dataclass
class Joined:
    """What a join left behind: the deep map's value, statistics, folded weights."""

    value: Map
    deep_affine: Tensor  # [F, 3, Cd]: mean, 1 / standard deviation, scale
    folded: Tensor
    skip_affine: Tensor | None
    skip_weight: Tensor | None


class Planner:
    """Plans the launches from the perturbed input to the head, and back.

    Args:
        names: Of the parameter tensors, in order.
        parameters: The tensors that the network was recorded with, in order.
        layout: How they lie in flat memory.
        fits: Number of fits, F.
        size: (H, W) of the network's input, multiples of 2 at every level.
        dtype: Storage type.
        tiles: How work is cut.
        memory: Where tensors come from.
        arena: Where gradients lie, [G] float32: at first those of all parameters, then partial
            sums; see `used`. On the meta device it may have any size.

    Attributes:
        launches: What was planned so far.
        masters: Flat parameters, [F, P] float32.
        copies: The same in the storage type.
        gradients: [F, P] float32, the first part of the arena.
        parts: By index of a parameter, the partial sums of its gradient, [F, parts, ...] float32 in
            the arena; all other gradients are written to `gradients` themselves.
        used: Elements of the arena that are used.
        input: The perturbed input, [F, H, W, C], to be written before the forward pass.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        layout: Layout,
        fits: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        tiles: Tiles,
        memory: Memory,
        arena: Tensor,
    ) -> None:
        self.layout, self.fits, self.size, self.dtype = layout, fits, size, dtype
        self.tiles, self.memory = tiles, memory
        self.launches: list[Launch] = []
        self.masters = memory.keep((fits, layout.size), torch.float32)
        self.used = fits * layout.size
        self._arena = arena
        self.gradients = arena[: self.used].view(fits, layout.size)
        wide = dtype == torch.float32
        self.copies = self.masters if wide else memory.keep((fits, layout.size), dtype)
        self.parts: dict[int, Tensor] = {}
        self.input: Tensor | None = None
        self._names = names
        self._index = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._made: dict[Node, Made] = {}
        self._joined: dict[Node, Joined] = {}
        self._shared: dict[Node, Tensor] = {}  # gradients of values to which others will add

    def forward(self, nodes: Sequence[Node]) -> None:
        """Plan all nodes before the head."""
        for node in nodes:
            match node:
                case Input():
                    shape = (self.fits, *self.size, node.channels)
                    self.input = self.memory.keep(shape, self.dtype)
                case Conv():
                    self._forward_conv(node)
                case Join():
                    self._forward_join(node)

    def backward(self, nodes: Sequence[Node]) -> None:
        """Plan the way back from the head's input, whose gradient is there."""
        for node in reversed(nodes):
            match node:
                case Conv() if self._carrier(node) is not None:
                    pass  # planned with the one that carries it
                case Conv() if self._pointwise(node):
                    self._backward_pointwise(node)
                case Conv():
                    self._backward_conv(node)
                case Join():
                    self._backward_join(node)

    def map(self, node: Node) -> Map:
        """Return a node's value as consumers see it."""
        if isinstance(node, Input):
            assert self.input is not None
            return Map(self.input)
        return self._made[node].map

    def take(self, node: Node) -> tuple[Norm | None, Tensor | None, Tensor | None]:
        """Return where a consumer leaves the gradient of a node: norm, pull and du."""
        if isinstance(node, Input):
            return None, None, None
        made = self._made[node]
        made.du = self.memory.borrow(tuple(made.map.raw.shape), self.dtype)
        return made.norm, made.pull, made.du

    def release(self, node: Node) -> None:
        """Let others have the memory of a node's gradient."""
        made = self._made[node]
        self.memory.give_back(made.du)
        made.du = None

    def weight(self, parameter: Tensor) -> Tensor:
        """Return a parameter in the storage type, as the kernels see it."""
        return self.layout.view(self.copies, self._index[id(parameter)])

    def master(self, parameter: Tensor) -> Tensor:
        """Return a parameter in float32, as the kernels see it."""
        return self.layout.view(self.masters, self._index[id(parameter)])

    def gradient(self, parameter: Tensor) -> Tensor:
        """Return where the whole gradient of a parameter is written."""
        return self.layout.view(self.gradients, self._index[id(parameter)])

    def partial(self, parameter: Tensor, parts: int) -> Tensor:
        """Return memory for partial sums of a parameter's gradient, [F, parts, ...] float32."""
        shape = self.master(parameter).shape[1:]
        count = self.fits * parts * shape.numel()
        tensor = self._arena[self.used : self.used + count].view(self.fits, parts, *shape)
        self.used += -(-count // BLOCK) * BLOCK
        self.parts[self._index[id(parameter)]] = tensor
        return tensor

    def sums(self) -> list[Sum]:
        """Return where the gradient of each block of parameters lies in the arena."""
        sums = []
        for index, (offset, shape) in enumerate(
            zip(self.layout.offsets, self.layout.shapes, strict=True)
        ):
            if offset is None:
                continue
            parts = self.parts.get(index)
            for start in range(0, torch.Size(shape).numel(), BLOCK):
                if parts is None:
                    sums.append(Sum(offset + start, fits=self.layout.size))
                else:
                    begin = int(parts.storage_offset() - self._arena.storage_offset()) + start
                    sums.append(Sum(begin, parts.shape[1], parts.stride(1), parts.stride(0)))
        return sums

    def name(self, node: Node) -> str:
        """Return a layer's name, such as "level0.down"."""
        assert isinstance(node, Conv | Join | Head)
        return self._names[self._index[id(node.weight)]].removesuffix(".weight")

    # Convolutions.

    def _shape(self, node: Conv | Join) -> tuple[int, int, int]:
        """Return kernel size, inputs and outputs."""
        outputs, inputs, size = node.weight.shape[1:4]
        return size, inputs, outputs

    def _carrier(self, node: Conv) -> Conv | None:
        """Return the convolution in whose launches a thin 1x1 one of the same input takes part."""
        size, _, outputs = self._shape(node)
        if size == 1 and node.stride == 1 and outputs <= THIN:
            for user in node.x.users:
                if isinstance(user, Conv) and user.stride == 2 and user.pad == node.pad:
                    return user
        return None

    def _rider(self, node: Conv) -> Conv | None:
        """Return the convolution that takes part in this one's launches."""
        for user in node.x.users:
            if isinstance(user, Conv) and self._carrier(user) is node:
                return user
        return None

    def _pointwise(self, node: Conv) -> bool:
        """Return whether both gradients of a convolution are one stream of pixels."""
        alone = not isinstance(node.x, Input) and len(node.x.users) == 1
        return alone and node.stride == 1 and self._shape(node)[0] == 1

    def _norm(self, gamma: Tensor, beta: Tensor) -> Norm:
        return Norm(
            self.master(gamma), self.master(beta), self.gradient(gamma), self.gradient(beta)
        )

    def _make(self, node: Conv | Join, height: int, width: int) -> Made:
        """Keep memory for the result of a convolution."""
        _, _, outputs = self._shape(node)
        keep = self.memory.keep
        raw = keep((self.fits, height, width, outputs), self.dtype)
        affine = keep((self.fits, 4, outputs), torch.float32)
        pull = keep((self.fits, 3, outputs), torch.float32)
        norm = self._norm(node.gamma, node.beta)
        self._made[node] = Made(Map(raw, affine, node.act), norm, pull)
        return self._made[node]

    def _convolution(self, node: Conv) -> Convolution:
        x, geometry = self.map(node.x), _geometry(node)
        size, inputs, outputs = self._shape(node)
        height, width = (geometry.members(side) for side in x.raw.shape[1:3])
        tile = self.tiles.product(height, width, outputs, inputs, size**2)
        weight = self.weight(node.weight)
        if node.pooled:
            assert height % 2 == width % 2 == 0
            self._make(node, height // 2, width // 2)
            full = self.memory.borrow((self.fits, height, width, outputs), self.dtype)
            return Convolution(x, weight, geometry, full, tile)
        made = self._make(node, height, width)
        affine = made.map.affine
        return Convolution(x, weight, geometry, made.map.raw, tile, made.norm, affine)

    def _forward_conv(self, node: Conv) -> None:
        if self._carrier(node) is not None:
            return  # planned with the one that carries it
        rider, own = self._rider(node), self._convolution(node)
        name = f"{self.name(node)} forward"
        if rider is None:
            x, weight, geometry, y, tile, norm, affine, *_ = own
            launch = conv.forward(
                name, x, weight, geometry, y, tile, self.memory.keep, norm=norm, affine=affine
            )
        else:
            launch = conv.forward_pair(name, own, self._convolution(rider), self.memory.keep)
        self.launches.append(launch)
        if node.pooled:
            made = self._made[node]
            assert made.map.affine is not None
            self.launches.append(
                pool.forward(
                    f"{self.name(node)} pooling",
                    own.y,
                    made.map.raw,
                    made.norm,
                    made.map.affine,
                    self.tiles.elementwise(own.y.shape[3]),
                    self.memory.keep,
                )
            )
            self.memory.give_back(own.y)

    def _backward_conv(self, node: Conv) -> None:
        geometry, x = _geometry(node), self.map(node.x)
        size, inputs, outputs = self._shape(node)
        name, (height, width) = self.name(node), x.raw.shape[1:3]
        members = tuple(geometry.members(side) for side in (height, width))
        dy = self._settle(node, (self.fits, *members, outputs))
        pixels = members[0] * members[1]
        tile = self.tiles.weights(pixels, inputs, outputs, size**2)
        rider, side = self._rider(node), None
        if rider is not None:
            other = self._made[rider].gradient
            few = self._shape(rider)[2]
            splits = self.tiles.weights(height * width, inputs, few, 1).splits
            dweight = self.partial(rider.weight, splits)
            side = Side(other, self.weight(rider.weight), dweight)
        norm, pull, dx, add = self._receive(node)
        down, across = (triton.cdiv(n, geometry.stride) for n in (height, width))
        self.launches.append(
            conv_backward.backward(
                f"{name} backward",
                x,
                self.weight(node.weight),
                dy,
                geometry,
                self.tiles.product(down, across, inputs, outputs, size**2, geometry.stride**2),
                tile,
                self.memory.keep,
                dx=dx,
                dweight=self.partial(node.weight, tile.splits),
                norm=norm,
                pull=pull,
                add=add,
                side=side,
            )
        )
        self.memory.give_back(dy, add)
        if rider is not None:
            self.release(rider)

    def _receive(
        self, node: Conv
    ) -> tuple[Norm | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return where a convolution leaves its input's gradient, and what it adds: see `take`."""
        add = self._shared.pop(node.x, None)
        readers = [u for u in node.x.users if not isinstance(u, Conv) or self._carrier(u) is None]
        if isinstance(node.x, Input) or node is readers[0]:  # the last one, backward
            return *self.take(node.x), add
        shared = self.memory.borrow(tuple(self.map(node.x).raw.shape), self.dtype)
        self._shared[node.x] = shared
        return None, None, shared, add

    def _settle(self, node: Conv, shape: tuple[int, ...]) -> Tensor:
        """Plan dy of a convolution out of its pending gradient, which is released."""
        dy = self.memory.borrow(shape, self.dtype)
        name, gradient = f"{self.name(node)} gradient", self._made[node].gradient
        tile = self.tiles.elementwise(shape[3])
        if node.pooled:
            launch = pool.backward(name, gradient, dy, tile)
        else:
            launch = smooth_backward.backward(
                name, gradient, dy, tile, self.memory.keep, bilinear=False
            )
        self.launches.append(launch)
        self.release(node)
        return dy

    def _backward_pointwise(self, node: Conv) -> None:
        x = self.map(node.x)
        _, inputs, outputs = self._shape(node)
        tile = self.tiles.stream(x.raw.shape[1] * x.raw.shape[2], max(inputs, outputs))
        norm, pull, dx = self.take(node.x)
        assert dx is not None
        self.launches.append(
            pointwise.backward(
                f"{self.name(node)} backward",
                x,
                self.weight(node.weight),
                self._made[node].gradient,
                dx,
                norm,
                pull,
                self.partial(node.weight, tile.splits),
                tile,
                self.memory.keep,
            )
        )
        self.release(node)

    # Joins.

    def _forward_join(self, node: Join) -> None:
        keep, name = self.memory.keep, self.name(node)
        deep = self.map(node.deep)
        skip = None if node.skip is None else self.map(node.skip)
        fits, height, width, channels = deep.raw.shape
        _, _, outputs = self._shape(node)
        assert skip is None or skip.raw.shape[1:3] == (2 * height, 2 * width)
        joined = Joined(
            value=Map(keep((fits, height, width, channels), self.dtype)),
            deep_affine=keep((fits, 3, channels), torch.float32),
            folded=keep((fits, 2, 2, 2, 2, channels, outputs), self.dtype),
            skip_affine=None,
            skip_weight=None,
        )
        self._joined[node] = joined
        if skip is not None:
            few = skip.raw.shape[3]
            rows = (triton.cdiv(9 * few, 16) * 16,) if few <= THIN else (3, 3, few)
            joined.skip_affine = keep((fits, 3, few), torch.float32)
            joined.skip_weight = keep((fits, *rows, outputs), self.dtype)
        self.launches.append(
            join.forward(
                f"{name.removesuffix('.up')}.join forward",
                deep,
                skip,
                self.master(node.join_gamma),
                self.master(node.weight),
                node.up,
                joined.value.raw,
                joined.deep_affine,
                joined.skip_affine,
                joined.folded,
                joined.skip_weight,
                self.tiles.join(height, width, channels),
                keep,
            )
        )
        made = self._make(node, 2 * height, 2 * width)
        geometry = Geometry(node.up, 2, 1, 1, node.pad)
        members = geometry.members(height), geometry.members(width)
        tile = self.tiles.product(*members, outputs, channels, 4, 4)
        affine = made.map.affine
        assert affine is not None
        thin, add = skip, None
        if self._wide(node):
            thin, add = None, self._forward_skip(node)
        weight = None if thin is None else joined.skip_weight
        if node.up == "nearest":
            self.launches.append(
                conv.forward(
                    f"{name} forward",
                    joined.value,
                    joined.folded,
                    geometry,
                    made.map.raw,
                    tile,
                    keep,
                    norm=made.norm,
                    affine=affine,
                    skip=thin,
                    skip_weight=weight,
                    add=add,
                )
            )
            self.memory.give_back(add)
            return
        doubled = self.memory.borrow((fits, 2 * height + 2, 2 * width + 2, outputs), self.dtype)
        self.launches.append(
            conv.forward(
                f"{name} forward", joined.value, joined.folded, geometry, doubled, tile, keep
            )
        )
        self.launches.append(
            smooth.forward(
                f"{name} filter",
                doubled,
                made.map.raw,
                made.norm,
                affine,
                self.tiles.patches(2 * height, 2 * width, outputs),
                keep,
                skip=thin,
                skip_weight=weight,
                add=add,
            )
        )
        self.memory.give_back(doubled, add)

    def _wide(self, node: Join) -> bool:
        """Return whether a join's skip connection has convolutions of its own."""
        return node.skip is not None and self.map(node.skip).raw.shape[3] > THIN

    def _forward_skip(self, node: Join) -> Tensor:
        """Plan the convolution of a wide skip; return its result, borrowed."""
        assert node.skip is not None
        skip, weight = self.map(node.skip), self._joined[node].skip_weight
        assert weight is not None
        fits, height, width, channels = skip.raw.shape
        outputs = weight.shape[-1]
        y = self.memory.borrow((fits, height, width, outputs), self.dtype)
        self.launches.append(
            conv.forward(
                f"{self.name(node)} skip forward",
                skip,
                weight,
                Geometry("conv", 3, 1, 1, node.pad),
                y,
                self.tiles.product(height, width, outputs, channels, 9),
                self.memory.keep,
            )
        )
        return y

    def _backward_join(self, node: Join) -> None:
        keep, borrow, name = self.memory.keep, self.memory.borrow, self.name(node)
        joined, made, bilinear = self._joined[node], self._made[node], node.up == "bilinear"
        fits, height, width, channels = joined.value.raw.shape
        _, _, outputs = self._shape(node)
        skip = None if node.skip is None else self.map(node.skip)
        few = 0 if skip is None else skip.raw.shape[3]
        dgamma, master = self.gradient(node.join_gamma), self.master(node.weight)

        # dy, and what it means for a thin skip.
        border = 2 * bilinear
        dy = borrow((fits, 2 * height + border, 2 * width + border, outputs), self.dtype)
        tile = self.tiles.patches(2 * height + border, 2 * width + border, outputs, whole=True)
        thin = thin_weight = skip_g = dskip = skip_ds = None
        if skip is not None and joined.skip_weight is not None and not self._wide(node):
            thin, thin_weight = skip, joined.skip_weight
            skip_g = borrow((fits, 2 * height, 2 * width, 9, few), self.dtype)
            dskip = borrow((fits, tile.splits, 9 * few, outputs), torch.float32)
            skip_ds = borrow((fits, few), torch.float32)
        self.launches.append(
            smooth_backward.backward(
                f"{name} gradient",
                made.gradient,
                dy,
                tile if thin is not None or bilinear else self.tiles.elementwise(outputs),
                keep,
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
        if self._wide(node):
            skip_g, dskip, skip_ds = self._backward_skip(node, None if bilinear else dy)
        self.release(node)

        # The convolution of the small map.
        geometry = Geometry(node.up, 2, 1, 1, node.pad)
        members = geometry.members(height), geometry.members(width)
        tile = self.tiles.weights(members[0] * members[1], channels, outputs, 16)
        dfolded = borrow((fits, tile.splits, *joined.folded.shape[1:]), torch.float32)
        deep_ds = borrow((fits, channels), torch.float32)
        deep_norm, deep_pull, deep_du = self.take(node.deep)
        assert deep_du is not None
        self.launches.append(
            conv_backward.backward(
                f"{name} backward",
                joined.value,
                joined.folded,
                dy,
                geometry,
                self.tiles.product(height, width, channels, outputs, 16),
                tile,
                keep,
                dx=deep_du,
                dweight=dfolded,
                scale=Scale(master[:, :, :, few:], joined.deep_affine, deep_ds, dgamma[:, few:]),
            )
        )
        self.memory.give_back(dy)

        # The statistics, the activations, and the unfolded weights.
        skip_norm = skip_pull = skip_du = None
        if node.skip is not None:
            skip_norm, skip_pull, skip_du = self.take(node.skip)
        self.launches.append(
            join_backward.backward(
                f"{name.removesuffix('.up')}.join backward",
                deep_du,  # the gradient of the value is turned into that before the activation
                self.map(node.deep),
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
                self.gradient(node.weight),
                self.tiles.join(height, width, channels),
                keep,
            )
        )
        self.memory.give_back(skip_g, dskip, skip_ds, dfolded, deep_ds)

    def _backward_skip(self, node: Join, dy: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Plan the backward pass of a wide skip's convolution.

        Args:
            dy: The gradient of the join's result, if it is there at full resolution.

        Returns:
            The gradients of the skip's value, of its weights in partial sums, and of their scale:
            all borrowed.
        """
        assert node.skip is not None
        joined, borrow, name = self._joined[node], self.memory.borrow, self.name(node)
        skip, affine, weight = self.map(node.skip), joined.skip_affine, joined.skip_weight
        assert weight is not None and affine is not None
        fits, height, width, channels = skip.raw.shape
        outputs = weight.shape[-1]
        plain = None
        if dy is None:
            dy = plain = borrow((fits, height, width, outputs), self.dtype)
            self.launches.append(
                smooth_backward.backward(
                    f"{name} skip gradient",
                    self._made[node].gradient,
                    plain,
                    self.tiles.elementwise(outputs),
                    self.memory.keep,
                    bilinear=False,
                )
            )
        tile = self.tiles.weights(height * width, channels, outputs, 9)
        g = borrow((fits, height, width, channels), self.dtype)
        dskip = borrow((fits, tile.splits, *weight.shape[1:]), torch.float32)
        ds = borrow((fits, channels), torch.float32)
        master, dgamma = self.master(node.weight), self.gradient(node.join_gamma)
        self.launches.append(
            conv_backward.backward(
                f"{name} skip backward",
                skip,
                weight,
                dy,
                Geometry("conv", 3, 1, 1, node.pad),
                self.tiles.product(height, width, channels, outputs, 9),
                tile,
                self.memory.keep,
                dx=g,
                dweight=dskip,
                scale=Scale(master[:, :, :, :channels], affine, ds, dgamma[:, :channels]),
            )
        )
        self.memory.give_back(plain)
        return g, dskip, ds


def _geometry(node: Conv) -> Geometry:
    size = node.weight.shape[-1]
    return Geometry("conv", size, 1 if node.pooled else node.stride, (size - 1) // 2, node.pad)
