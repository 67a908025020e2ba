"""Total variation on pixels: the explicit prior that the paper argues against, for any linear task.

The problem is convex, so that there is nothing to stop and nothing to seed: what comes out depends
on the weight alone.
"""

import torch
from torch import Tensor

from flashdip.engine.operators import Operator

ITERATIONS = 500
_STEP = 0.2  # of the pixels; chosen for images in [0, 1], only the pace depends on it


def least_variation(
    operator: Operator,
    observation: Tensor,
    shape: tuple[int, int, int],
    *,
    weight: float = 0.0,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Return the image x in [0, 1] that minimises TV(x) + |A x - y|^2 / (2 weight).

    TV is isotropic and taken channel by channel. Solved by the primal-dual method of Chambolle and
    Pock (2011) with a dual variable each for the gradient and for the measurement.

    Args:
        operator: Takes [1, C, H, W] to the observation's shape.
        observation: What was measured, y, [1, ...].
        shape: Channels, height and width of the image.
        weight: Of TV against the measurement; 0: A x = y exactly.
        iterations: Of the method.

    Returns:
        [1, C, H, W].
    """
    norm = _norm(operator, observation.new_zeros(1, *shape))
    goal, weight = observation / norm, weight / norm**2
    dual_step = 1 / (9 * _STEP)  # 8 bounds the squared norm of the gradient, 1 that of A / norm
    x = operator.adjoint(observation) / norm**2
    lead = x
    p = x.new_zeros(2, *x.shape)
    q = torch.zeros_like(goal)
    for _ in range(iterations):
        p = p + dual_step * _gradient(lead)
        p = p / p.square().sum(0).sqrt().clamp(min=1)
        q = (q + dual_step * (operator(lead) / norm - goal)) / (1 + dual_step * weight)
        previous = x
        x = (x - _STEP * (_divergence(p) + operator.adjoint(q) / norm)).clamp(0, 1)
        lead = 2 * x - previous
    return x


def _gradient(x: Tensor) -> Tensor:
    """Return forward differences down and across, [2, 1, C, H, W]; 0 at the far edges."""
    gradient = x.new_zeros(2, *x.shape)
    gradient[0, ..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    gradient[1, ..., :-1] = x[..., 1:] - x[..., :-1]
    return gradient


def _divergence(p: Tensor) -> Tensor:
    """Return the transpose of `_gradient`."""
    image = torch.zeros_like(p[0])
    image[..., 1:, :] += p[0, ..., :-1, :]
    image[..., :-1, :] -= p[0, ..., :-1, :]
    image[..., 1:] += p[1, ..., :-1]
    image[..., :-1] -= p[1, ..., :-1]
    return image


def _norm(operator: Operator, like: Tensor, iterations: int = 30) -> float:
    """Return the operator's norm by the power method, from above as far as it goes."""
    x = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    norm = 1.0
    for _ in range(iterations):
        x = x / x.norm()
        x = operator.adjoint(operator(x))
        norm = float(x.norm()) ** 0.5
    return 1.01 * norm
