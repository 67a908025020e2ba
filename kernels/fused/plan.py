"""What planning a step keeps track of: launches so far, and where every tensor lies.

Parameters stay; maps, gradients and partial sums share memory (`flashdip.kernels.fused.memory`).
Where several layers read a map, each but the last to be planned backward leaves the gradient of the
map's value, which the next one adds to its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdip.kernels.fused import apply
from flashdip.kernels.fused.launch import Gradient, Launch, Map, Norm
from flashdip.kernels.fused.layout import BLOCK, Layout
from flashdip.kernels.fused.memory import Memory
from flashdip.kernels.fused.record import Concat, Conv, Head, Input, Join, Node
from flashdip.kernels.fused.step import Sum
from flashdip.kernels.fused.tiles import Tiles


@dataclass
class Made:
    """What a layer left behind, and where its gradient lies.

    Attributes:
        map: Its value, as consumers see it.
        norm: Its normalisation.
        pull: [F, 3, C] float32; see `Gradient`.
        du: Its gradient before the activation, once the backward pass got there.
        largest: What pooling by the largest needs for its gradient.
    """

    map: Map
    norm: Norm
    pull: Tensor
    du: Tensor | None = None
    largest: Tensor | None = None

    @property
    def gradient(self) -> Gradient:
        """The gradient with respect to the raw result."""
        assert self.du is not None
        return Gradient(self.du, self.map.raw, self.pull)


@dataclass
class Joined:
    """What a folded join left behind: the deep map's value, statistics, folded weights."""

    value: Map
    deep_affine: Tensor  # [F, 3, Cd]: mean, 1 / standard deviation, scale
    folded: Tensor
    skip_affine: Tensor | None
    skip_weight: Tensor | None


class Plan:
    """The launches from the perturbed input to the head, and back, and their memory.

    Args:
        names: Of the parameter tensors, in order.
        parameters: The tensors that the network was recorded with, in order.
        layout: How they lie in flat memory.
        fits: Number of fits, F.
        input: The perturbed input, [F, H, W, C] in the storage type; sides are multiples of 2 at
            every level.
        tiles: How work is cut.
        memory: Where tensors come from.

    Attributes:
        launches: What was planned so far.
        masters: Flat parameters, [F, P] float32.
        copies: The same in the storage type.
        gradients: [F, P] float32; 0 where no launch writes.
        parts: By index of a parameter, the partial sums of its gradient, [F, parts, ...] float32;
            all other gradients are written to `gradients` themselves.
        made: By node, what it left behind.
        joined: By node, what a folded join left behind beside that.
        apart: By node, the two that stand for a join that is not folded.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        layout: Layout,
        input: Tensor,
        tiles: Tiles,
        memory: Memory,
    ) -> None:
        self.layout, self.input, self.tiles, self.memory = layout, input, tiles, memory
        self.fits, self.dtype = fits, dtype = len(input), input.dtype
        self.launches: list[Launch] = []
        self.masters = memory.keep((fits, layout.size), torch.float32)
        self.gradients = memory.keep((fits, layout.size), torch.float32)
        wide = dtype == torch.float32
        self.copies = self.masters if wide else memory.keep((fits, layout.size), dtype)
        self.parts: dict[int, Tensor] = {}
        self._names = names
        self._index = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.made: dict[Node, Made] = {}
        self.joined: dict[Node, Joined] = {}
        self.apart: dict[Node, tuple[Concat, Conv]] = {}
        self._values: dict[Node, Map] = {}
        self._shared: dict[Node, Tensor] = {}  # gradients of values to which others will add

    def map(self, node: Node) -> Map:
        """Return a node's value as consumers see it."""
        if isinstance(node, Input):
            return Map(self.input)
        return self.made[node].map

    def read(self, reader: Conv) -> Map:
        """Return what a convolution reads: its input's value, or that which it makes one of.

        One of a single slot, unless it rides along with another one, reads each pixel once: for it
        nothing is gained by storing the value.
        """
        node, x = reader.x, self.map(reader.x)
        wide = (reader.carrier or reader).shape[0] > 1
        if x.affine is None or not wide or not self.tiles.stores(*x.raw.shape[1:3]):
            return x
        if node not in self._values:
            stored = self.memory.share(tuple(x.raw.shape), self.dtype)
            self._values[node] = Map(stored)
            tile = self.tiles.elementwise(x.raw.shape[3])
            self.launches.append(apply.store(f"{self.name(node)} value", x, stored, tile))
        return self._values[node]

    def take(self, node: Node) -> tuple[Norm | None, Tensor | None, Tensor | None]:
        """Return where a consumer leaves the gradient of a node: norm, pull and du."""
        if isinstance(node, Input):
            return None, None, None
        made = self.made[node]
        made.du = self.memory.share(tuple(made.map.raw.shape), self.dtype)
        return made.norm, made.pull, made.du

    def receive(
        self, reader: Node, x: Node
    ) -> tuple[Norm | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return where a reader of x leaves the gradient of x, and what it adds: see `take`."""
        add = self._shared.pop(x, None)
        readers = [u for u in x.users if not isinstance(u, Conv) or u.carrier is None]
        if isinstance(x, Input) or reader is readers[0]:  # the last one, backward
            return *self.take(x), add
        shared = self.memory.share(tuple(self.map(x).raw.shape), self.dtype)
        self._shared[x] = shared
        return None, None, shared, add

    def make(self, node: Conv | Join | Concat, height: int, width: int) -> Made:
        """Take memory for a result that a norm follows."""
        shape, share = (self.fits, height, width, node.gamma.shape[1]), self.memory.share
        raw = share(shape, self.dtype)
        affine = share((self.fits, 4, shape[3]), torch.float32)
        pull = share((self.fits, 3, shape[3]), torch.float32)
        norm = Norm(
            self.master(node.gamma),
            self.master(node.beta),
            self.gradient(node.gamma),
            self.gradient(node.beta),
        )
        self.made[node] = Made(Map(raw, affine, node.act), norm, pull)
        return self.made[node]

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
        # Adam reads blocks in full, beyond the last one's end.
        tensor = self.memory.share((count + BLOCK,), torch.float32)[:count]
        self.parts[self._index[id(parameter)]] = tensor = tensor.view(self.fits, parts, *shape)
        return tensor

    def sums(self) -> list[Sum]:
        """Return where the gradient of each block of parameters lies in the block of memory."""
        sums, whole = [], int(self.gradients.storage_offset())
        for index, (offset, shape) in enumerate(
            zip(self.layout.offsets, self.layout.shapes, strict=True)
        ):
            if offset is None:
                continue
            parts = self.parts.get(index)
            count = torch.Size(shape).numel()
            for start in range(0, count, BLOCK):
                live = min(BLOCK, count - start)
                if parts is None:
                    begin = whole + offset + start
                    sums.append(Sum(begin, fits=self.layout.size, live=live))
                else:
                    begin = int(parts.storage_offset()) + start
                    sums.append(Sum(begin, parts.shape[1], parts.stride(1), parts.stride(0), live))
        return sums

    def name(self, node: Node) -> str:
        """Return a layer's name, such as "level0.down"."""
        assert isinstance(node, Conv | Join | Concat | Head)
        first = node.gamma if isinstance(node, Concat) else node.weight
        return self._names[self._index[id(first)]].rpartition(".")[0]
