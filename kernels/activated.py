"""A norm and its activation in place, after which only the result is kept.

What the norm was given and what it made follow from the result, as both steps can be turned back:
so of a convolution, its norm and its activation one map is kept instead of two. After Rota Bulò,
Porzi and Kontschieder, "In-place activated BatchNorm for memory-optimized training of DNNs" (2018).

Where a channel's scale is nearly nothing beside its shift, the way back loses digits. What the norm
was given is kept of such channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import fitwise
from flashdip.kernels.opset import SLOPE

# The result is rounded relative to its shift, and what is wanted back is spread by its scale. So
# the scale has to be at least a part of the shift: what makes that error _ROUNDING, or in 16 bits a
# half, which makes it as large as that of storing a map.
_ROUNDING, _HALF = 0.5**18, 0.5


def norm_act(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise each channel of y over (H, W), and activate by LeakyReLU, in place.

    Neither y nor, in the backward pass, the result and its gradient may be of use to anyone else:
    they are overwritten.

    Args:
        y: [F, C, H, W] in channels-last memory.
        gamma: [F, C] in float32.
        beta: [F, C] in float32.
    """
    a: Tensor = _NormAct.apply(y, gamma, beta)  # type: ignore[no-untyped-call]
    return a


class _NormAct(torch.autograd.Function):
    """See `norm_act`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        least = min(torch.finfo(y.dtype).eps / _ROUNDING, _HALF)
        nothing = torch.finfo(gamma.dtype).tiny ** 0.5  # whose square is a number still
        poor = (gamma.abs() <= least * beta.abs() + nothing).any(0).nonzero().flatten()
        kept = y[:, poor]
        a = y.detach()
        mean, root = fitwise.norm_(a, gamma, beta)
        F.leaky_relu_(a, SLOPE)
        ctx.save_for_backward(a, gamma, beta, mean, root, poor, kept)
        return a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, gamma, beta, mean, root, poor, kept = ctx.saved_tensors
        z = F.leaky_relu_(a, 1 / SLOPE)
        dz = da.contiguous(memory_format=torch.channels_last)
        torch.ops.aten.leaky_relu_backward.grad_input(dz, z, SLOPE, False, grad_input=dz)
        # z is normalised again, by beta and gamma: to y's share of the gradient that is the same.
        dy, d_gamma, d_beta = fitwise.norm_gradients(
            dz, z, gamma.square() * root, beta, gamma.reciprocal()
        )
        if len(poor):
            own = gamma[:, poor], mean[:, poor], root[:, poor]
            d_kept, d_own, _ = fitwise.norm_gradients(dz[:, poor], kept, *own)
            dy[:, poor], d_gamma[:, poor] = d_kept, d_own
        return dy, d_gamma, d_beta
