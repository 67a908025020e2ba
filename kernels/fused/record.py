"""Layers that compute nothing: they record what a network asks for, to be planned as launches.

See `flashdip.kernels.opset` for what the operations mean. Parameters are handed in as tensors on
the meta device and only told apart; maps are the nodes themselves.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flashdip.kernels.opset import Activation, Down, Pad, Up

THIN = 7  # channels of a skip connection whose nine taps make one product of 64; more are wide


@dataclass(eq=False)
class Node:
    """A map, and where it comes from; `users` are the nodes that read it."""

    users: list["Node"] = field(default_factory=list, init=False)


@dataclass(eq=False)
class Input(Node):
    """The perturbed input of the network, `channels` deep."""

    channels: int


@dataclass(eq=False)
class Conv(Node):
    """A convolution, its norm and activation; see `OpSet.conv_norm_act`."""

    x: Node
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    stride: int
    down: Down
    pad: Pad
    act: Activation

    @property
    def shape(self) -> tuple[int, int, int]:
        """Kernel size, inputs and outputs."""
        return _shape(self.weight)

    @property
    def pooled(self) -> bool:
        """Whether the full result is computed, and then halved."""
        return self.stride == 2 and self.down != "stride"

    @property
    def pointwise(self) -> bool:
        """Whether both its gradients are one stream of pixels."""
        alone = not isinstance(self.x, Input) and len(self.x.users) == 1
        return alone and self.stride == 1 and self.shape[0] == 1

    @property
    def carrier(self) -> "Conv | None":
        """The convolution in whose launches a thin 1x1 one of the same input takes part."""
        size, _, outputs = self.shape
        if size == 1 and self.stride == 1 and outputs <= THIN:
            for user in self.x.users:
                if isinstance(user, Conv) and user.stride == 2 and user.pad == self.pad:
                    return user
        return None

    @property
    def rider(self) -> "Conv | None":
        """The convolution that takes part in this one's launches."""
        for user in self.x.users:
            if isinstance(user, Conv) and user.carrier is self:
                return user
        return None


@dataclass(eq=False)
class Join(Node):
    """A join and its convolution; see `OpSet.join_conv`."""

    skip: Node | None
    deep: Node
    join_gamma: Tensor
    join_beta: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    up: Up
    pad: Pad
    act: Activation

    @property
    def shape(self) -> tuple[int, int, int]:
        """Kernel size, inputs and outputs."""
        return _shape(self.weight)

    @property
    def foldable(self) -> bool:
        """Whether join and convolution can be folded into one."""
        return self.shape[0] == 3 and self.pad == "reflection"

    def apart(self) -> tuple["Concat", Conv]:
        """Return the join by itself and the convolution of it."""
        joined = Concat(self.skip, self.deep, self.join_gamma, self.join_beta, self.up)
        conv = Conv(joined, self.weight, self.gamma, self.beta, 1, "stride", self.pad, self.act)
        joined.users.append(conv)
        return joined, conv


@dataclass(eq=False)
class Concat(Node):
    """A join by itself: `deep` enlarged twofold, put behind `skip`, and normalised."""

    skip: Node | None
    deep: Node
    gamma: Tensor
    beta: Tensor
    up: Up
    act: ClassVar[Activation] = "none"


@dataclass(eq=False)
class Head(Node):
    """The convolution that draws the image; see `OpSet.head`."""

    x: Node
    weight: Tensor
    bias: Tensor | None
    sigmoid: bool


class Recorder:
    """`Layers` whose operations return nodes, kept in order in `nodes`."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def input(self, channels: int) -> Input:
        """Return the node of the network's input."""
        node = Input(channels)
        self.nodes.append(node)
        return node

    def conv_norm_act(
        self,
        x: Node,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        *,
        stride: int = 1,
        down: Down = "stride",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Node:
        """Record a convolution; its bias has no effect."""
        return self._keep(Conv(x, weight, gamma, beta, stride, down, pad, act), x)

    def join_conv(
        self,
        skip: Node | None,
        deep: Node,
        join_gamma: Tensor,
        join_beta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        *,
        up: Up = "bilinear",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> Node:
        """Record a join."""
        node = Join(skip, deep, join_gamma, join_beta, weight, gamma, beta, up, pad, act)
        return self._keep(node, deep, *([] if skip is None else [skip]))

    def head(
        self,
        x: Node,
        weight: Tensor,
        bias: Tensor | None,
        *,
        pad: Pad = "reflection",
        sigmoid: bool = True,
    ) -> Tensor:
        """Record the head; the image it returns is empty."""
        self._keep(Head(x, weight, bias, sigmoid), x)
        return torch.empty(0, device="meta")

    def _keep(self, node: Node, *read: Node) -> Node:
        self.nodes.append(node)
        for each in read:
            each.users.append(node)
        return node


def _shape(weight: Tensor) -> tuple[int, int, int]:
    outputs, inputs, size = weight.shape[1:4]
    return size, inputs, outputs
