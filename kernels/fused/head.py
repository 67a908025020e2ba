"""The head: the last 1x1 convolution, the image it draws, the loss, and the way back.

Programs stream contiguous ranges of pixels, read the map once and write its gradient once; what is
summed over pixels stays in registers until the end. The image's few channels are padded to the
least that a matrix product takes.

Where the operator in front of the loss keeps pixels apart (none, or a mask) one launch does it all.
Else `draw` makes the image, the operator turns it into the loss's gradient with respect to the
image, and `backward` draws again, but writes the gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import activate, dot, narrow, slope
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_sums, scratch_shapes
from flashdip.kernels.fused.rows import row_of, sum_rows, sum_shapes

# Arguments that are not there in every launch.
_IMAGES = ("target_ptr", "mask_ptr", "doutput_ptr", "output_ptr", "average_ptr")
_OPTIONAL = (
    *(*_IMAGES, "loss_ptr", "dx_ptr", "pull_ptr", "dgamma_ptr", "dbeta_ptr", "dweight_ptr"),
    *("dbias_ptr", "parts_ptr", "parts_counters_ptr", "rows_ptr", "rows_counters_ptr"),
)


@triton.jit(do_not_specialize=["pixels", "W", "h", "w", "weights", "gradients"])
def _head_kernel(
    raw_ptr, affine_ptr, weight_ptr, bias_ptr, target_ptr, mask_ptr, doutput_ptr, output_ptr,
    average_ptr, loss_ptr, dx_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, dweight_ptr, dbias_ptr,
    parts_ptr, parts_counters_ptr, rows_ptr, rows_counters_ptr, pixels, W, h, w, weights,
    gradients, share, gain, BACKWARD: tl.constexpr, SIGMOID: tl.constexpr, ACT: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program, programs, fit = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    base = fit.to(tl.int64)
    i, o = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    live_i, live_o = i < IN, o < OUT
    of_weight, live = i[:, None] * OUT + o[None, :], live_i[:, None] & live_o[None, :]
    raw_ptr += base * pixels * IN
    if BACKWARD:
        dx_ptr += base * pixels * IN
    weight = tl.load(weight_ptr + base * weights + of_weight, live, other=0.0)
    of_affine = affine_ptr + fit * 4 * IN + i
    scale = tl.load(of_affine, live_i, other=0.0)[:, None]
    shift = tl.load(of_affine + IN, live_i, other=0.0)[:, None]
    mean = tl.load(of_affine + 2 * IN, live_i, other=0.0)[:, None]
    dweight = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
    dbias = tl.zeros([BLOCK_O, PIXELS], tl.float32)
    squares = tl.zeros([BLOCK_O, PIXELS], tl.float32)
    plain = tl.zeros([BLOCK_I], tl.float32)
    along = tl.zeros([BLOCK_I], tl.float32)
    first = base * OUT * h * w  # of this fit's in all images
    tiles = tl.cdiv(pixels, PIXELS)
    for tile in range(program * tiles // programs, (program + 1) * tiles // programs):
        pixel = tile * PIXELS + tl.arange(0, PIXELS)
        of_x = i[:, None] + pixel[None, :] * IN
        live_x = live_i[:, None] & (pixel < pixels)[None, :]
        # Channels go down and pixels across: a thread then meets few channels. What three products
        # and the sums need of raw, each in its own layout, comes out of shared memory each time.
        raw = tl.load(raw_ptr + of_x, live_x, other=0.0).to(tl.float32)
        u = raw * scale + shift
        value = narrow(activate(u, ACT), raw_ptr.dtype.element_ty)
        output = dot(tl.trans(weight), value, tl.zeros([BLOCK_O, PIXELS], tl.float32))
        if bias_ptr is not None:
            output += tl.load(bias_ptr + base * weights + o, live_o, other=0.0)[:, None]
        if SIGMOID:
            output = tl.sigmoid(output)

        y, x = pixel // W, pixel % W
        inside = live_o[:, None] & ((pixel < pixels) & (y < h) & (x < w))[None, :]
        of_image = o[:, None] * (h * w) + (y * w + x)[None, :]
        if output_ptr is not None:
            tl.store(output_ptr + first + of_image, output, inside)
        if average_ptr is not None:
            average = tl.load(average_ptr + first + of_image, inside, other=0.0)
            tl.store(average_ptr + first + of_image, average + share * (output - average), inside)
        if BACKWARD:
            if doutput_ptr is not None:
                dy = gain * tl.load(doutput_ptr + first + of_image, inside, other=0.0)
            else:
                target = tl.load(target_ptr + first + of_image, inside, other=0.0)
                if mask_ptr is not None:
                    seen = tl.load(mask_ptr + first + of_image, inside, other=0.0)
                    residual = seen * output - target
                    dy = 2 * gain * seen * residual
                else:
                    residual = tl.where(inside, output - target, 0.0)
                    dy = 2 * gain * residual
                squares += residual * residual
            if SIGMOID:
                dy *= output * (1 - output)
            dbias += dy
            dy = narrow(dy, raw_ptr.dtype.element_ty)
            dweight = dot(value, tl.trans(dy), dweight)
            du = dot(weight, dy, tl.zeros([BLOCK_I, PIXELS], tl.float32))
            du *= slope(u, ACT)
            du = narrow(du, raw_ptr.dtype.element_ty)
            tl.store(dx_ptr + of_x, du, live_x)
            du = du.to(tl.float32)  # 0 at pixels that do not exist, as dy is
            plain += tl.sum(du, 1)
            along += tl.sum(du * (raw - mean), 1)

    if BACKWARD:
        inverse = tl.load(of_affine + 3 * IN, live_i, other=0.0)
        finish_sums(
            plain, along * inverse, i, program, programs, fit, tl.num_programs(1), pixels,
            parts_ptr, parts_counters_ptr, affine_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, gradients,
            IN,
        )  # fmt: skip
        # A row is laid out as dweight [IN, OUT], dbias [OUT], sum of squares.
        row = row_of(rows_ptr, program, programs, fit, WIDTH)
        tl.store(row + of_weight, dweight, live)
        tl.store(row + IN * OUT + o, tl.sum(dbias, 1), live_o)
        tl.store(row + (IN + 1) * OUT, tl.sum(squares))
        last, total_ptr = sum_rows(rows_ptr, rows_counters_ptr, program, programs, fit, WIDTH)
        if last:
            at = tl.arange(0, WIDTH)
            total = tl.load(total_ptr + at, cache_modifier=".cg")
            tl.store(dweight_ptr + base * gradients + at, total, at < IN * OUT)
            at -= IN * OUT
            if bias_ptr is not None:
                tl.store(dbias_ptr + base * gradients + at, total, (at >= 0) & (at < OUT))
            if loss_ptr is not None:
                loss = tl.sum(tl.where(at == OUT, total, 0.0)) / (OUT * h * w).to(tl.float32)
                tl.store(loss_ptr + fit, loss)


def head(
    name: str,
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    output: Tensor,
    average: Tensor | None,
    loss: Tensor,
    dx: Tensor,
    norm: Norm,
    pull: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    *,
    decay: float | None,
    loss_scale: float,
    sigmoid: bool,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Draw the image, compare it, and compute all gradients, which are multiplied by `loss_scale`.

    The image is the top left part of what x is large enough for; the rest of x has no gradient.

    Args:
        x: What is drawn from, [F, H, W, I], with an affine.
        weight: [F, 1, 1, I, O] in the storage type. Its fits are as far apart as those of every
            other parameter; so are those of all gradients.
        bias: [F, O] float32, if any.
        target: What was measured, [F, O, h, w] float32.
        mask: Factor on the image in the loss, [F, O, h, w] float32, if any.
        output: The image, [F, O, h, w] float32, written.
        average: [F, O, h, w] float32; becomes decay average + (1 - decay) output.
        loss: Mean of (mask output - target)^2, [F] float32, written.
        dx: The gradient before x's activation, [F, H, W, I] in the storage type, written.
        norm: The normalisation of the layer that made x; its gradients are written.
        pull: [F, 3, I] float32, written; see `flashdip.kernels.fused.norm`.
        dweight: [F, 1, 1, I, O] float32, written.
        dbias: [F, O] float32, written, if there is a bias.
        decay: Of the average; None, like `average`, for none.
        sigmoid: Whether the output passes a sigmoid.
        tile: At most `pixels` at a time, by at most `splits` programs of each fit.
    """
    return _launch(
        name,
        x,
        weight,
        bias,
        output,
        {
            "target_ptr": target,
            "mask_ptr": mask,
            "output_ptr": output,
            "average_ptr": average,
            "loss_ptr": loss,
            "share": 0.0 if decay is None else 1 - decay,
            "gain": loss_scale / output[0].numel(),
            **_gradients(x, dx, norm, pull, dweight, dbias, tile, memory),
        },
        sigmoid,
        tile,
    )


def draw(
    name: str,
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    average: Tensor | None,
    *,
    decay: float | None,
    sigmoid: bool,
    tile: Tile,
) -> Launch:
    """Only draw the image and average it; see `head`."""
    given = {
        "output_ptr": output,
        "average_ptr": average,
        "share": 0.0 if decay is None else 1 - decay,
    }
    return _launch(name, x, weight, bias, output, given, sigmoid, tile)


def backward(
    name: str,
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    doutput: Tensor,
    dx: Tensor,
    norm: Norm,
    pull: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    *,
    loss_scale: float,
    sigmoid: bool,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Only compute the gradients; see `head`.

    Args:
        doutput: The loss's gradient with respect to the image, [F, O, h, w] float32, not yet
            multiplied by `loss_scale`.
    """
    given = {
        "doutput_ptr": doutput,
        "gain": loss_scale,
        **_gradients(x, dx, norm, pull, dweight, dbias, tile, memory),
    }
    return _launch(name, x, weight, bias, doutput, given, sigmoid, tile)


def _pixels(x: Map, tile: Tile) -> int:
    """Return how many pixels at a time leave a thread with no more values than registers hold."""
    values = 32 if x.raw.element_size() == 2 else 8
    return max(16, min(tile.pixels, tile.warps * 32 * values // _block(x.raw.shape[3])))


def _programs(x: Map, tile: Tile) -> int:
    return min(tile.splits, int(triton.cdiv(x.raw[0, ..., 0].numel(), _pixels(x, tile))))


def _row(weight: Tensor) -> int:
    """Return how wide the row of sums is: of the weight, the bias, the squares; a power of 2."""
    inputs, outputs = weight.shape[-2:]
    return int(triton.next_power_of_2((inputs + 1) * outputs + 1))


def _gradients(
    x: Map,
    dx: Tensor,
    norm: Norm,
    pull: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    tile: Tile,
    memory: Allocator,
) -> dict[str, Tensor | int | float | None]:
    """Return the arguments that only a backward pass has."""
    fits, _, _, inputs = x.raw.shape
    programs = _programs(x, tile)
    parts, counters = scratch_shapes(fits, programs, inputs, _block(inputs))
    rows, rows_counters = sum_shapes(fits, programs, _row(dweight))
    return {
        "dx_ptr": dx,
        "pull_ptr": pull,
        "dgamma_ptr": norm.dgamma,
        "dbeta_ptr": norm.dbeta,
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "parts_ptr": memory.share((parts,), torch.float32),
        "parts_counters_ptr": memory.keep((counters,), torch.int32),
        "rows_ptr": memory.share(rows, torch.float32),
        "rows_counters_ptr": memory.keep(rows_counters, torch.int32),
        "gradients": dweight.stride(0),
    }


def _block(channels: int) -> int:
    return max(16, int(triton.next_power_of_2(channels)))


def _launch(
    name: str,
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    image: Tensor,
    given: dict[str, Tensor | int | float | None],
    sigmoid: bool,
    tile: Tile,
) -> Launch:
    fits, height, width, inputs = x.raw.shape
    outputs, back = weight.shape[-1], "dx_ptr" in given
    optional = [given.get(key) for key in (*_IMAGES, "average_ptr", "dx_ptr")]  # the average twice
    moved = [x.raw, weight, *(t for t in optional if isinstance(t, Tensor))]
    return Launch(
        name,
        _head_kernel,
        (_programs(x, tile), fits, 1),
        {
            "raw_ptr": x.raw,
            "affine_ptr": x.affine,
            "weight_ptr": weight,
            "bias_ptr": bias,
            **dict.fromkeys(_OPTIONAL),
            "pixels": height * width,
            "W": width,
            "h": image.shape[2],
            "w": image.shape[3],
            "weights": weight.stride(0),
            "gradients": 0,
            "share": 0.0,
            "gain": 0.0,
            **given,
        },
        {
            "BACKWARD": back,
            "SIGMOID": sigmoid,
            "ACT": x.act,
            "IN": inputs,
            "OUT": outputs,
            "PIXELS": _pixels(x, tile),
            "BLOCK_I": _block(inputs),
            "BLOCK_O": _block(outputs),
            "WIDTH": _row(weight),
        },
        warps=tile.warps,
        stages=tile.stages,
        flops=(6 if back else 2) * fits * height * width * inputs * outputs,
        bytes=size(*moved),
    )
