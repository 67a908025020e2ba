"""Layers that compute nothing: they record what a network asks for, to be planned as launches.

See `flashdip.kernels.opset` for what the operations mean. Parameters are handed in as tensors on
the meta device and only told apart; maps are the nodes themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    def pooled(self) -> bool:
        """Whether the full result is computed, and then averaged."""
        return self.stride == 2 and self.down == "avg"


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


def unsupported(nodes: Sequence[Node]) -> list[str]:
    """Return what of a recorded network has no kernel; empty if all has."""
    reasons = set()
    for node in nodes:
        if isinstance(node, Conv) and node.stride == 2 and node.down not in ("stride", "avg"):
            reasons.add(f"downsampling by {node.down}")
        if isinstance(node, Join):
            if node.weight.shape[-1] != 3:
                reasons.add(f"an upward kernel of size {node.weight.shape[-1]}")
            if node.pad == "zero":
                reasons.add("zero padding behind a join")
    return sorted(reasons)
