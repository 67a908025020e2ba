"""Planning of joins that are not folded: what follows them is an ordinary convolution."""

from flashdip.kernels.fused import concat, concat_backward
from flashdip.kernels.fused.plan import Plan
from flashdip.kernels.fused.record import Concat


def forward(plan: Plan, node: Concat) -> None:
    """Plan the joined map and its norm's statistics."""
    deep = plan.map(node.deep)
    skip = None if node.skip is None else plan.map(node.skip)
    height, width = deep.raw.shape[1:3]
    assert skip is None or skip.raw.shape[1:3] == (2 * height, 2 * width)
    made = plan.make(node, 2 * height, 2 * width)
    assert made.map.affine is not None
    plan.launches.append(
        concat.forward(
            f"{plan.name(node)} forward",
            deep,
            skip,
            node.up,
            made.map.raw,
            made.norm,
            made.map.affine,
            plan.tiles.join(height, width, made.map.raw.shape[3]),
            plan.memory.keep,
        )
    )


def backward(plan: Plan, node: Concat) -> None:
    """Plan the gradients of the maps that were put together."""
    deep, deep_add = plan.map(node.deep), None
    skip = None if node.skip is None else plan.map(node.skip)
    skip_norm = skip_pull = skip_du = skip_add = None
    if node.skip is not None:
        skip_norm, skip_pull, skip_du, skip_add = plan.receive(node, node.skip)
    deep_norm, deep_pull, deep_du, deep_add = plan.receive(node, node.deep)
    assert deep_add is None and skip_add is None  # a join is the last to read its maps
    plan.launches.append(
        concat_backward.backward(
            f"{plan.name(node)} backward",
            plan.made[node].gradient,
            deep,
            deep_norm,
            deep_pull,
            deep_du,
            skip,
            skip_norm,
            skip_pull,
            skip_du,
            node.up,
            plan.tiles.join(*deep.raw.shape[1:]),
            plan.memory.keep,
        )
    )
    plan.release(node)
