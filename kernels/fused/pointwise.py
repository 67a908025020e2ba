"""Backward of a 1x1 convolution: both gradients in one kernel, which reads its inputs once.

dgrad and wgrad of a 1x1 convolution share everything they read. So a program streams a range of
pixels, turns the gradient behind the normalisation into dy once, in registers, multiplies it by the
weight for the input's gradient and by the input for the weight's, and keeps the latter in registers
to the end.

Channels go down and pixels across where x and its gradient are: a thread then meets few channels,
whose constants it holds. What is summed over pixels is summed tile upon tile, and across a tile
only when a program ends.

Registers bound the part of dW that a program holds, [inputs, outputs]: it has all outputs, for they
are summed over in dgrad, and as many inputs as fit. Programs with the other inputs of the same
pixels lie beside it in the grid and find dy's operands in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import activate, dot, narrow, slope
from flashdip.kernels.fused.launch import Allocator, Gradient, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_sums, load_pull, pulled_gradient, scratch_shapes

ACCUMULATORS = 64  # registers of a thread that may hold dW


def backward(
    name: str,
    x: Map,
    weight: Tensor,
    dy: Gradient,
    dx: Tensor,
    norm: Norm | None,
    pull: Tensor | None,
    dweight: Tensor,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Compute the gradients of a 1x1 convolution's input and weight.

    Args:
        x: The input, [F, H, W, I].
        weight: [F, 1, 1, I, O] in the storage type.
        dy: The gradient of the convolution's result, [F, H, W, O].
        dx: [F, H, W, I] in the storage type, written: the gradient before x's activation, or of x
            itself where x has no affine.
        norm: The normalisation of the layer that made x; its gradients are written. None, like
            `pull`, where x has no affine.
        pull: [F, 3, I] float32, written; see `flashdip.kernels.fused.norm`.
        dweight: [F, programs, 1, 1, I, O] float32, written: partial sums, one of each program.
        tile: `pixels` at a time; at most `outputs` channels of x a program.
    """
    fits, height, width, inputs = x.raw.shape
    outputs, programs, pixels = weight.shape[-1], dweight.shape[1], height * width
    padded = max(16, triton.next_power_of_2(outputs))
    held = triton.next_power_of_2(ACCUMULATORS * 32 * tile.warps // padded + 1) // 2
    block = max(16, min(tile.outputs, held, triton.next_power_of_2(inputs)))
    arguments: dict[str, Tensor | int | float | None] = {
        "raw_ptr": x.raw,
        "affine_ptr": x.affine,
        "weight_ptr": weight,
        "du_ptr": dy.du,
        "y_ptr": dy.y,
        "dy_pull_ptr": dy.pull,
        "dx_ptr": dx,
        "dweight_ptr": dweight,
        "pull_ptr": pull,
        "pixels": pixels,
        "programs": programs,
        "weight_row": weight.stride(0),
        "parts_ptr": None,
        "counters_ptr": None,
        "dgamma_ptr": None,
        "dbeta_ptr": None,
        "parameters": 0,
    }
    if norm is not None:
        parts, counters = scratch_shapes(fits, programs, inputs, block)
        arguments |= {
            "parts_ptr": memory.share((parts,), torch.float32),
            "counters_ptr": memory.keep((counters,), torch.int32),
            "dgamma_ptr": norm.dgamma,
            "dbeta_ptr": norm.dbeta,
            "parameters": norm.dgamma.stride(0),
        }
    return Launch(
        name,
        _pointwise_backward,
        (programs * triton.cdiv(inputs, block), fits, 1),
        arguments,
        {
            "IN": inputs,
            "OUT": outputs,
            "PIXELS": tile.pixels,
            "BLOCK_I": block,
            "BLOCK_O": padded,
            "ACT": x.act,
        },
        warps=tile.warps,
        stages=tile.stages,
        flops=4 * fits * pixels * inputs * outputs,
        bytes=size(*x[:2], weight, *dy, dx, pull, dweight),
        gemm=True,
    )


@triton.jit(do_not_specialize=["pixels", "programs", "parameters"])
def _pointwise_backward(
    raw_ptr, affine_ptr, weight_ptr, du_ptr, y_ptr, dy_pull_ptr, dx_ptr, dweight_ptr, pull_ptr,
    pixels, programs, weight_row, parts_ptr, counters_ptr, dgamma_ptr, dbeta_ptr, parameters,
    IN: tl.constexpr, OUT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(IN, BLOCK_I)
    block, program = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    fit = tl.program_id(1)
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    live_i = i < IN

    base = fit.to(tl.int64)
    raw_ptr += base * pixels * IN
    dx_ptr += base * pixels * IN
    du_ptr += base * pixels * OUT
    y_ptr += base * pixels * OUT
    of_weight = i[:, None] * OUT + o[None, :]
    live_weight = live_i[:, None] & (o < OUT)[None, :]
    weight = tl.load(weight_ptr + base * weight_row + of_weight, live_weight, other=0.0)
    a, b, c = load_pull(dy_pull_ptr + fit * 3 * OUT, o, OUT)
    if affine_ptr is not None:
        of_affine = affine_ptr + fit * 4 * IN + i
        scale = tl.load(of_affine, live_i, other=0.0)[:, None]
        shift = tl.load(of_affine + IN, live_i, other=0.0)[:, None]
        mean = tl.load(of_affine + 2 * IN, live_i, other=0.0)[:, None]
    dweight = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    plain = tl.zeros([BLOCK_I, PIXELS], tl.float32)
    along = tl.zeros([BLOCK_I, PIXELS], tl.float32)
    tiles = tl.cdiv(pixels, PIXELS)
    for tile in range(program * tiles // programs, (program + 1) * tiles // programs):
        pixel = tile * PIXELS + tl.arange(0, PIXELS)
        exists = pixel < pixels
        dy = pulled_gradient(du_ptr, y_ptr, a, b, c, pixel, exists, o, OUT)
        of_x, live_x = i[:, None] + pixel[None, :] * IN, live_i[:, None] & exists[None, :]
        value = tl.load(raw_ptr + of_x, live_x, other=0.0)
        dx = dot(weight, tl.trans(dy), tl.zeros([BLOCK_I, PIXELS], tl.float32))
        if affine_ptr is not None:
            # Where no pixel exists both are 0. Taking that of dx makes the compiler bring raw, in
            # 16 bits, to the registers where dx is, and not what comes of it to where raw is.
            raw = tl.where(exists[None, :], value.to(tl.float32), dx)
            u = raw * scale + shift
            value = narrow(activate(u, ACT), raw_ptr.dtype.element_ty)
            dx *= slope(u, ACT)
        stored = narrow(dx, raw_ptr.dtype.element_ty)
        tl.store(dx_ptr + of_x, stored, live_x)
        if affine_ptr is not None:
            stored = stored.to(tl.float32)  # 0 at pixels that do not exist, as dy is
            plain += stored
            along += stored * (raw - mean)
        dweight = dot(value, dy, dweight)

    dweight_ptr += (base * programs + program) * IN * OUT
    tl.store(dweight_ptr + of_weight, dweight, live_weight)
    if affine_ptr is not None:
        inverse = tl.load(of_affine + 3 * IN, live_i, other=0.0)
        finish_sums(
            tl.sum(plain, 1), tl.sum(along, 1) * inverse, i, program, programs, fit,
            tl.num_programs(1), pixels, parts_ptr, counters_ptr, affine_ptr, pull_ptr, dgamma_ptr,
            dbeta_ptr, parameters, IN,
        )  # fmt: skip
