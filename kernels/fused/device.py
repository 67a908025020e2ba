"""What the kernels share: rounding, products, activations, and who is the last to arrive.

Triton's interpreter computes wrongly with bfloat16 (it multiplies bit patterns and truncates where
it should round), so 16-bit values are widened as soon as they are loaded, and rounded in one place.
"""

import triton
import triton.language as tl

from flashdip.kernels import opset

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
EPS = tl.constexpr(opset.EPS)
SLOPE = tl.constexpr(opset.SLOPE)
FEW = tl.constexpr(32)  # channels that are finished at a time


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round float32 values to DTYPE, to the nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def exist(c, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return which of a BLOCK of channels are below C: all, and known to be, in whole blocks."""
    if (C + BLOCK - 1) // BLOCK * BLOCK == C:
        return c == c
    else:
        return c < C


@triton.jit
def dot(a, b, accumulator):
    """Return accumulator + a b in float32; float32 factors are not shortened to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def activate(u, ACT: tl.constexpr):
    """Apply an activation function to float32 values."""
    if ACT == "LeakyReLU":
        return tl.maximum(u, SLOPE * u)
    elif ACT == "Swish":
        return u * tl.sigmoid(u)
    elif ACT == "ELU":
        return tl.where(u > 0, u, tl.exp(tl.minimum(u, 0.0)) - 1)
    else:
        tl.static_assert(ACT == "none")
        return u


@triton.jit
def slope(u, ACT: tl.constexpr):
    """Return the derivative of the activation function at u; at a kink, the left one."""
    if ACT == "LeakyReLU":
        return tl.where(u > 0, 1.0, SLOPE)
    elif ACT == "Swish":
        s = tl.sigmoid(u)
        return s * (1 + u * (1 - s))
    elif ACT == "ELU":
        return tl.where(u > 0, 1.0, tl.exp(tl.minimum(u, 0.0)))
    else:
        tl.static_assert(ACT == "none")
        return tl.full(u.shape, 1.0, tl.float32)


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """Return whether this is the last of `expected` programs to call; the counter is then 0 again.

    What the others stored before is visible to the last one, loaded past the L1 cache (".cg"). The
    counting of retired blocks is that of NVIDIA's threadFenceReduction sample.
    """
    tl.debug_barrier()  # all warps have stored
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def halves(x):
    """Return the first and the second half of the columns of x, [rows, columns].

    What follows a product takes many registers: less if it goes over half of the result at a time.
    """
    x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(x, [0, 2, 1]))


@triton.jit
def whole(first, second):
    """Return two vectors as one."""
    return tl.reshape(tl.permute(tl.join(first, second), [1, 0]), [2 * first.shape[0]])
