"""Planning of joins that are not folded: what follows them is an ordinary convolution."""

from flashdip.kernels.fused import concat, concat_backward, plan_conv
from flashdip.kernels.fused.concat_backward import Target
from flashdip.kernels.fused.plan import Plan
from flashdip.kernels.fused.record import Join, Node


def forward(plan: Plan, node: Join) -> None:
    """Plan the joined map with its norm's statistics, and the convolution."""
    joined, conv = plan.apart[node] = node.apart()
    deep = plan.map(node.deep)
    skip = None if node.skip is None else plan.map(node.skip)
    height, width = deep.raw.shape[1:3]
    assert skip is None or skip.raw.shape[1:3] == (2 * height, 2 * width)
    made = plan.make(joined, 2 * height, 2 * width)
    assert made.map.affine is not None
    plan.launches.append(
        concat.forward(
            f"{plan.name(joined)} forward",
            deep,
            skip,
            node.up,
            made.map.raw,
            made.norm,
            made.map.affine,
            plan.tiles.concat(height, width, made.map.raw.shape[3]),
            plan.memory,
        )
    )
    plan_conv.forward(plan, conv)
    plan.made[node] = plan.made[conv]


def backward(plan: Plan, node: Join) -> None:
    """Plan the convolution's gradients, and those of the maps that were put together."""
    joined, conv = plan.apart[node]
    plan_conv.backward(plan, conv)
    deep, skip = _target(plan, node, node.deep), None
    if node.skip is not None:
        skip = _target(plan, node, node.skip)
    plan.launches.append(
        concat_backward.backward(
            f"{plan.name(joined)} backward",
            plan.made[joined].gradient,
            deep,
            skip,
            node.up,
            plan.tiles.concat(*deep.map.raw.shape[1:]),
            plan.memory,
        )
    )


def _target(plan: Plan, node: Join, x: Node) -> Target:
    norm, pull, du, add = plan.receive(node, x)
    assert add is None  # a join is the last to read its maps
    return Target(plan.map(x), norm, pull, du)
