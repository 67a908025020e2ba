"""The join ahead of a convolution, backward: gradients of both joined maps and of the weights.

With the join folded into the weights, W' = s W, the convolution's backward pass gives gradients
with respect to W' and, for a fixed s, to the joined maps. The rest is done here: dW = s dW', and
since s = gamma / sqrt(variance + EPS) depends on its map, the map's gradient has a second part,

    dv += ds (-gamma inverse^3) (v - mean) / n

with ds = <dW', W> and n the pixels of the deep map, or of the skip connection's. Of a bilinearly
enlarged map, v is smoothed for this as in `flashdip.kernels.fused.join`. The gradient then passes
the map's activation, and is summed for the normalisation before it.
"""

import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import exist, narrow, slope
from flashdip.kernels.fused.geometry import targets
from flashdip.kernels.fused.launch import Allocator, Launch, Map, Norm, Tile, size
from flashdip.kernels.fused.norm import finish_sums
from flashdip.kernels.fused.patches import Cut, corners, cut, pending, row_of, smooth
from flashdip.kernels.opset import Up

AT_ONCE = 8192  # partial sums of weights that a program loads together: 64 to a thread


@triton.jit
def _gather(
    taps_ptr, y, x, height, width, c, mask, C: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of a thin skip over the pixels that saw y, x through any of nine taps.

    Pixels are seen by reflection only if they lie near the border.
    """
    g = tl.zeros(mask.shape, tl.float32)
    for ky in range(3):
        rows, seen_y, far_rows, far_y = targets(0, y, ky, height, "conv", 3, 1, 1, "reflection")
        for kx in tl.static_range(3):
            columns, seen_x, far_columns, far_x = targets(
                0, x, kx, width, "conv", 3, 1, 1, "reflection"
            )
            tap_ptr = taps_ptr + (ky * 3 + kx) * C
            g += _tap(tap_ptr, rows, columns, seen_y & seen_x, width, c, mask, C)
            if BORDER:
                g += _tap(tap_ptr, rows, far_columns, seen_y & far_x, width, c, mask, C)
                g += _tap(tap_ptr, far_rows, columns, far_y & seen_x, width, c, mask, C)
                g += _tap(tap_ptr, far_rows, far_columns, far_y & far_x, width, c, mask, C)
    return g


@triton.jit
def _tap(tap_ptr, rows, columns, seen, width, c, mask, C: tl.constexpr):
    at = (rows * width + columns)[:, None] * (9 * C) + c[None, :]
    return tl.load(tap_ptr + at, mask & seen[:, None], other=0.0).to(tl.float32)


@triton.jit
def _pass_on(
    program, g_ptr, raw_ptr, pending_ptr, affine_ptr, ds_ptr, du_ptr, pull_ptr, dgamma_ptr,
    dbeta_ptr, parameters, parts_ptr, counters_ptr, height, width, C: tl.constexpr,
    ACT: tl.constexpr, SMOOTH: tl.constexpr, THIN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Complete the gradient of one of the joined maps and take it through its activation."""
    fit, fits = tl.program_id(1), tl.num_programs(1)
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(height, ROWS) * across
    blocks = tl.cdiv(C, BLOCK)
    tile = program // blocks
    c = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = exist(c, C, BLOCK)
    y, x = corners(tile, height, width, ROWS, COLUMNS, HIGH, WIDE)
    base = fit.to(tl.int64) * height * width * C
    g_ptr += base * (9 if THIN else 1)
    raw_ptr += base
    du_ptr += base
    scale, shift = pending(pending_ptr, fit, c, C)
    affine_ptr += fit * 3 * C + c
    mean = tl.load(affine_ptr, live, other=0.0)
    inverse = tl.load(affine_ptr + C, live, other=0.0)
    s = tl.load(affine_ptr + 2 * C, live, other=0.0)
    ds = tl.load(ds_ptr + fit * C + c, live, other=0.0)
    pull = -s * inverse * inverse * ds / (height * width)
    centre = tl.zeros([BLOCK], tl.float32)
    if pending_ptr is not None:
        centre = tl.load(pending_ptr + (fit * 4 + 2) * C + c, live, other=0.0)

    top, left = tile // across * ROWS, tile % across * COLUMNS
    border = (top <= 1) | (left <= 1)
    border |= (top + ROWS >= height - 1) | (left + COLUMNS >= width - 1)
    tl.static_assert(SMOOTH or HIGH * WIDE == 1)
    plain = tl.zeros([y.shape[0], BLOCK], tl.float32)
    along = tl.zeros([y.shape[0], BLOCK], tl.float32)
    if SMOOTH:
        _, before = row_of(
            raw_ptr, y - 1, x, height, width, c, live, scale, shift, C, ACT, WIDE, SMOOTH
        )
    values, here = row_of(raw_ptr, y, x, height, width, c, live, scale, shift, C, ACT, WIDE, SMOOTH)
    for i in tl.static_range(HIGH):
        given = ()
        for j in tl.static_range(WIDE):
            mask = ((y + i < height) & (x + j < width))[:, None] & live[None, :]
            if THIN:
                if border:
                    g = _gather(g_ptr, y + i, x + j, height, width, c, mask, C, True)
                else:
                    g = _gather(g_ptr, y + i, x + j, height, width, c, mask, C, False)
            else:
                at = ((y + i) * width + x + j)[:, None] * C + c[None, :]
                g = tl.load(g_ptr + at, mask, other=0.0).to(tl.float32)
            given += (g,)  # type: ignore[assignment]
        if SMOOTH:
            _, after = row_of(
                raw_ptr, y + (i + 1), x, height, width, c, live, scale, shift, C, ACT, WIDE, SMOOTH
            )
        tl.debug_barrier()  # all warps have loaded g, where du may be written
        for j in tl.static_range(WIDE):
            at = ((y + i) * width + x + j)[:, None] * C + c[None, :]
            mask = ((y + i < height) & (x + j < width))[:, None] & live[None, :]
            near = smooth(before[j], here[j], after[j]) if SMOOTH else values[j]
            raw = tl.load(raw_ptr + at, mask, other=0.0).to(tl.float32)
            u = raw * scale[None, :] + shift[None, :]
            g = given[j] + pull[None, :] * (near - mean[None, :])
            du = narrow(tl.where(mask, g * slope(u, ACT), 0.0), du_ptr.dtype.element_ty)
            tl.store(du_ptr + at, du, mask)
            du = du.to(tl.float32)
            plain += du
            along += du * (raw - centre[None, :])
        if SMOOTH:
            before, here = here, after
    if pending_ptr is not None:
        deviation = tl.load(pending_ptr + (fit * 4 + 3) * C + c, live, other=0.0)
        finish_sums(
            tl.sum(plain, 0), tl.sum(along, 0) * deviation, c, tile, tiles, fit, fits,
            height * width, parts_ptr, counters_ptr, pending_ptr, pull_ptr, dgamma_ptr, dbeta_ptr,
            parameters, C,
        )  # fmt: skip


@triton.jit
def _unfold(
    program, dfolded_ptr, affine_ptr, dweight_ptr, splits, C: tl.constexpr, ALL: tl.constexpr,
    OUT: tl.constexpr, PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Sum what splits and groups give to one tap of a block of the deep channels' weights."""
    tap = program % 9
    i = program // 9 * ELEMENTS + tl.arange(0, ELEMENTS)  # of [C, OUT]
    s = tl.load(affine_ptr + 2 * C + i // OUT, i < C * OUT, other=0.0)
    total = tl.zeros([ELEMENTS], tl.float32)
    for first in range(0, 4 * splits, PARTS):
        part = first + tl.arange(0, PARTS)  # of [splits, group_y, group_x]
        slot_y = (tap // 3 > part // 2 % 2).to(tl.int32)  # as in geometry.FOLDED
        slot_x = (tap % 3 > part % 2).to(tl.int32)
        at = ((part * 2 + slot_y) * 2 + slot_x)[:, None] * (C * OUT) + i[None, :]
        mask = (part < 4 * splits)[:, None] & (i < C * OUT)[None, :]
        total += tl.sum(tl.load(dfolded_ptr + at, mask, other=0.0), 0)
    tl.store(dweight_ptr + tap * ALL * OUT + i, s * total, i < C * OUT)


@triton.jit
def _unscale(
    program, dskip_ptr, affine_ptr, dweight_ptr, parts, ROWS: tl.constexpr, C: tl.constexpr,
    ALL: tl.constexpr, OUT: tl.constexpr, PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of a block of the skip channels' weights."""
    i = program * ELEMENTS + tl.arange(0, ELEMENTS)  # of [9, C, OUT]
    live = i < 9 * C * OUT
    c = i // OUT % C
    s = tl.load(affine_ptr + 2 * C + c, live, other=0.0)
    total = tl.zeros([ELEMENTS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & live[None, :]
        at = part[:, None] * (ROWS * OUT) + i[None, :]
        total += tl.sum(tl.load(dskip_ptr + at, mask, other=0.0), 0)
    at = (i // OUT // C * ALL + c) * OUT + i % OUT
    tl.store(dweight_ptr + at, s * total, live)


@triton.jit(do_not_specialize=["height", "width", "splits", "skip_splits"])
def _backward_kernel(
    deep_g_ptr, deep_ptr, deep_pending_ptr, deep_affine_ptr, deep_ds_ptr, deep_du_ptr,
    deep_pull_ptr, deep_dgamma_ptr, deep_dbeta_ptr, deep_parameters, deep_parts_ptr,
    deep_counters_ptr,
    skip_g_ptr, skip_ptr, skip_pending_ptr, skip_affine_ptr, skip_ds_ptr, skip_du_ptr,
    skip_pull_ptr, skip_dgamma_ptr, skip_dbeta_ptr, skip_parameters, skip_parts_ptr,
    skip_counters_ptr,
    dfolded_ptr, dskip_ptr, dweight_ptr, height, width, splits, skip_splits,
    dweight_fit,
    DEEP: tl.constexpr, SKIP: tl.constexpr, OUT: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    BILINEAR: tl.constexpr, THIN: tl.constexpr, DEEP_ACT: tl.constexpr, SKIP_ACT: tl.constexpr,
    DEEP_ROWS: tl.constexpr, DEEP_COLUMNS: tl.constexpr, DEEP_HIGH: tl.constexpr,
    DEEP_WIDE: tl.constexpr, DEEP_BLOCK: tl.constexpr, SKIP_ROWS: tl.constexpr,
    SKIP_COLUMNS: tl.constexpr, SKIP_HIGH: tl.constexpr, SKIP_WIDE: tl.constexpr,
    SKIP_BLOCK: tl.constexpr, DEEP_PARTS: tl.constexpr, DEEP_AT_ONCE: tl.constexpr,
    SKIP_PARTS: tl.constexpr, SKIP_AT_ONCE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    fit = tl.program_id(1).to(tl.int64)
    dweight_ptr += fit * dweight_fit
    unfold = 9 * tl.cdiv(DEEP * OUT, DEEP_AT_ONCE)
    unscale = unfold + tl.cdiv(9 * SKIP * OUT, SKIP_AT_ONCE)
    tiles = tl.cdiv(height, DEEP_ROWS) * tl.cdiv(width, DEEP_COLUMNS)
    deep = unscale + tiles * tl.cdiv(DEEP, DEEP_BLOCK)
    if program < unfold:
        _unfold(
            program, dfolded_ptr + fit * splits * 16 * DEEP * OUT, deep_affine_ptr + fit * 3 * DEEP,
            dweight_ptr + SKIP * OUT, splits, DEEP, SKIP + DEEP, OUT, DEEP_PARTS, DEEP_AT_ONCE,
        )  # fmt: skip
    elif program < unscale:
        if SKIP > 0:
            _unscale(
                program - unfold, dskip_ptr + fit * skip_splits * WEIGHT_ROWS * OUT,
                skip_affine_ptr + fit * 3 * SKIP, dweight_ptr, skip_splits, WEIGHT_ROWS, SKIP,
                SKIP + DEEP, OUT, SKIP_PARTS, SKIP_AT_ONCE,
            )  # fmt: skip
    elif program < deep:
        _pass_on(
            program - unscale, deep_g_ptr, deep_ptr, deep_pending_ptr, deep_affine_ptr, deep_ds_ptr,
            deep_du_ptr, deep_pull_ptr, deep_dgamma_ptr, deep_dbeta_ptr, deep_parameters,
            deep_parts_ptr, deep_counters_ptr, height, width, DEEP, DEEP_ACT, BILINEAR, False,
            DEEP_ROWS, DEEP_COLUMNS, DEEP_HIGH, DEEP_WIDE, DEEP_BLOCK,
        )  # fmt: skip
    elif SKIP > 0:
        _pass_on(
            program - deep, skip_g_ptr, skip_ptr, skip_pending_ptr, skip_affine_ptr, skip_ds_ptr,
            skip_du_ptr, skip_pull_ptr, skip_dgamma_ptr, skip_dbeta_ptr, skip_parameters,
            skip_parts_ptr, skip_counters_ptr, 2 * height, 2 * width, SKIP, SKIP_ACT, False, THIN,
            SKIP_ROWS, SKIP_COLUMNS, SKIP_HIGH, SKIP_WIDE, SKIP_BLOCK,
        )  # fmt: skip


def backward(
    name: str,
    g: Tensor,
    deep: Map,
    deep_norm: Norm | None,
    deep_pull: Tensor | None,
    deep_du: Tensor,
    deep_affine: Tensor,
    deep_ds: Tensor,
    dfolded: Tensor,
    skip: Map | None,
    skip_norm: Norm | None,
    skip_pull: Tensor | None,
    skip_du: Tensor | None,
    skip_affine: Tensor | None,
    skip_ds: Tensor | None,
    skip_g: Tensor | None,
    dskip: Tensor | None,
    up: Up,
    dweight: Tensor,
    tile: Tile,
    memory: Allocator,
) -> Launch:
    """Plan the backward pass of a join.

    Args:
        name: Of the launch.
        g: Gradient of the deep map's value for fixed weights, [F, h, w, Cd], in the storage type.
        deep: The map that was enlarged, [F, h, w, Cd].
        deep_norm: The normalisation that `deep.affine` stands for; None without one.
        deep_pull: Written: see `Gradient`; None without a norm.
        deep_du: Written: gradient before the activation, [F, h, w, Cd], in the storage type; it may
            lie where g does.
        deep_affine: Mean, inverse, s of the deep channels, [F, 3, Cd] float32.
        deep_ds: Gradient of s, [F, Cd] float32.
        dfolded: Gradient of the folded weights in partial sums, [F, splits, 2, 2, 2, 2, Cd, O]
            float32.
        skip: The map ahead of it, [F, 2h, 2w, Cs], if any.
        skip_norm: As for the deep map, like all that follows.
        skip_pull: Written.
        skip_du: Written.
        skip_affine: [F, 3, Cs] float32.
        skip_ds: [F, Cs] float32.
        skip_g: In the storage type, [F, 2h, 2w, Cs]; or [F, 2h, 2w, 9, Cs]: what each pixel of the
            convolution's result gives to those it saw through each tap.
        dskip: Gradient of the skip's weights in partial sums, [F, splits, ...] float32, with rows
            as `skip_weight` has them in `join.forward`.
        up: How the deep map was enlarged.
        dweight: Written: gradient of the convolution's weights, [F, 3, 3, Cs + Cd, O] float32.
        tile: Pixels of the deep map (`rows` x `columns`) and channels (`outputs`) of a program.
        memory: Where scratch comes from.
    """
    fits, height, width, channels = deep.raw.shape
    shallow, outputs = dweight.shape[-2] - channels, dweight.shape[-1]
    of_deep = cut(deep, tile, up == "bilinear", memory)
    thin = skip_g is not None and skip_g.ndim == 5
    # A thin skip's gradient is gathered from nine taps at once.
    of_skip = cut(skip, tile, False, memory, elements=8 if thin else 16)
    splits, skip_splits = dfolded.shape[1], 0 if dskip is None else dskip.shape[1]
    parts = min(32, triton.next_power_of_2(4 * splits))
    skip_parts = min(256, triton.next_power_of_2(max(1, skip_splits)))
    programs = 9 * triton.cdiv(channels * outputs, AT_ONCE // parts)
    programs += triton.cdiv(9 * shallow * outputs, AT_ONCE // skip_parts)
    programs += of_deep.programs + of_skip.programs
    return Launch(
        name,
        _backward_kernel,
        (programs, fits, 1),
        {
            **_arguments(
                "deep", g, deep, deep_norm, deep_pull, deep_du, deep_affine, deep_ds, of_deep
            ),
            **_arguments(
                "skip", skip_g, skip, skip_norm, skip_pull, skip_du, skip_affine, skip_ds, of_skip
            ),
            "dfolded_ptr": dfolded,
            "dskip_ptr": dskip,
            "dweight_ptr": dweight,
            "height": height,
            "width": width,
            "splits": splits,
            "skip_splits": skip_splits,
            "dweight_fit": dweight.stride(0),
        },
        {
            "DEEP": channels,
            "SKIP": shallow,
            "OUT": outputs,
            "WEIGHT_ROWS": 0 if dskip is None else dskip[0, 0].numel() // outputs,
            "BILINEAR": up == "bilinear",
            "THIN": thin,
            "DEEP_ACT": deep.act,
            "SKIP_ACT": "none" if skip is None else skip.act,
            **{f"DEEP_{name}": number for name, number in of_deep.constants.items()},
            **{f"SKIP_{name}": number for name, number in of_skip.constants.items()},
            "DEEP_PARTS": parts,
            "DEEP_AT_ONCE": AT_ONCE // parts,
            "SKIP_PARTS": skip_parts,
            "SKIP_AT_ONCE": AT_ONCE // skip_parts,
        },
        tile.warps,
        tile.stages,
        bytes=size(
            g, deep.raw, deep_du, dfolded, skip and skip.raw, skip_g, skip_du, dskip, dweight
        ),
    )


def _arguments(
    prefix: str,
    g: Tensor | None,
    x: Map | None,
    norm: Norm | None,
    pull: Tensor | None,
    du: Tensor | None,
    affine: Tensor | None,
    ds: Tensor | None,
    of: Cut,
) -> dict[str, Tensor | int | None]:
    """Return what the kernel is given for one of the joined maps."""
    arguments = {
        "g_ptr": g,
        "ptr": None if x is None else x.raw,
        "pending_ptr": None if x is None else x.affine,
        "affine_ptr": affine,
        "ds_ptr": ds,
        "du_ptr": du,
        "pull_ptr": pull,
        "dgamma_ptr": None if norm is None else norm.dgamma,
        "dbeta_ptr": None if norm is None else norm.dbeta,
        "parameters": 0 if norm is None else norm.dgamma.stride(0),
        "parts_ptr": of.parts,
        "counters_ptr": of.counters,
    }
    return {f"{prefix}_{name}": argument for name, argument in arguments.items()}
