"""From a recorded network to the launches of one step, in order, with all their memory.

Forward a level of the network is five launches, with bilinear enlargement six; backward it is
eight. A skip connection too wide for that is convolved by launches of its own, and pooling is one
more each way.
"""

from collections.abc import Sequence

from flashdip.kernels.fused import plan_concat, plan_conv, plan_join
from flashdip.kernels.fused.plan import Plan
from flashdip.kernels.fused.record import Conv, Join, Node


def forward(plan: Plan, nodes: Sequence[Node]) -> None:
    """Plan all nodes between input and head."""
    for node in nodes:
        match node:
            case Conv():
                plan_conv.forward(plan, node)
            case Join():
                (plan_join if _folds(plan, node) else plan_concat).forward(plan, node)


def backward(plan: Plan, nodes: Sequence[Node]) -> None:
    """Plan the way back from the head's input, whose gradient is there."""
    for node in reversed(nodes):
        match node:
            case Conv():
                plan_conv.backward(plan, node)
            case Join():
                (plan_join if node in plan.joined else plan_concat).backward(plan, node)


def _folds(plan: Plan, node: Join) -> bool:
    height, width = plan.map(node.deep).raw.shape[1:3]
    return node.foldable and plan.tiles.folds(height, width, node.up)
