"""What a reading decided about the state of each fit: keep it, go back, select it as the best."""

import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused.device import narrow
from flashdip.kernels.fused.launch import Launch, size

_ELEMENTS = 1024  # parameters, and of an image, that one program copies


@triton.jit
def _copy(to_ptr, from_ptr, at, live):
    tl.store(to_ptr + at, tl.load(from_ptr + at, live), live)


@triton.jit(do_not_specialize=["count"])
def _keep_kernel(
    actions_ptr, parameters_ptr, moment1_ptr, moment2_ptr, copies_ptr, output_ptr, average_ptr,
    mean_ptr, variance_ptr, good_parameters_ptr, good_moment1_ptr, good_moment2_ptr,
    good_output_ptr, good_average_ptr, good_mean_ptr, good_variance_ptr, best_parameters_ptr,
    best_image_ptr, P, count, AVERAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = tl.program_id(1)
    action = tl.load(actions_ptr + fit)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_p, live_p = fit.to(tl.int64) * P + i, i < P
    of_image, live = fit.to(tl.int64) * count + i, i < count
    if action & 1:
        _copy(good_parameters_ptr, parameters_ptr, of_p, live_p)
        _copy(good_moment1_ptr, moment1_ptr, of_p, live_p)
        _copy(good_moment2_ptr, moment2_ptr, of_p, live_p)
        _copy(good_output_ptr, output_ptr, of_image, live)
        _copy(good_average_ptr, average_ptr, of_image, live)
        if mean_ptr is not None:
            _copy(good_mean_ptr, mean_ptr, of_image, live)
            if tl.program_id(0) == 0:
                tl.store(good_variance_ptr + fit, tl.load(variance_ptr + fit))
    if action & 2:
        parameters = tl.load(good_parameters_ptr + of_p, live_p)
        tl.store(parameters_ptr + of_p, parameters, live_p)
        if copies_ptr is not None:
            tl.store(copies_ptr + of_p, narrow(parameters, copies_ptr.dtype.element_ty), live_p)
        _copy(moment1_ptr, good_moment1_ptr, of_p, live_p)
        _copy(moment2_ptr, good_moment2_ptr, of_p, live_p)
        _copy(output_ptr, good_output_ptr, of_image, live)
        _copy(average_ptr, good_average_ptr, of_image, live)
        if mean_ptr is not None:
            _copy(mean_ptr, good_mean_ptr, of_image, live)
            if tl.program_id(0) == 0:
                tl.store(variance_ptr + fit, tl.load(good_variance_ptr + fit))
    if best_parameters_ptr is not None and action & 4:
        _copy(best_parameters_ptr, parameters_ptr, of_p, live_p)
        if AVERAGED:
            _copy(best_image_ptr, average_ptr, of_image, live)
        else:
            _copy(best_image_ptr, output_ptr, of_image, live)


def keep(
    name: str,
    actions: Tensor,
    state: dict[str, Tensor],
    good: dict[str, Tensor],
    best: dict[str, Tensor],
    copies: Tensor | None,
    *,
    averaged: bool,
) -> Launch:
    """Do what a reading decided: keep the state of a fit, go back to what was kept, or select it.

    Args:
        actions: [F] int32, 1: keep, 2: go back, + 4: select as the best; 0: nothing.
        state: All float32: "parameters", "moment1" and "moment2", [F, P]; "output" and "average",
            [F, C, h, w]; "moving_mean" likewise and "moving_variance", [F], if they are watched.
        good: The same, kept.
        best: "parameters", and the "image" that is to be returned; empty if nothing is selected.
        copies: The parameters in the storage type, [F, P]; None where that is float32.
        averaged: Whether the image to be returned is the average.
    """
    fits, parameters = state["parameters"].shape
    count = state["output"][0].numel()
    of_image = ("output", "average", "moving_mean", "moving_variance")
    short = {"moving_mean": "mean", "moving_variance": "variance"}
    names = ("parameters", "moment1", "moment2", *of_image)
    arguments: dict[str, Tensor | int | float | None] = {"actions_ptr": actions}
    for each in names:
        arguments[f"{short.get(each, each)}_ptr"] = state.get(each)
        arguments[f"good_{short.get(each, each)}_ptr"] = good.get(each)
    return Launch(
        name,
        _keep_kernel,
        (triton.cdiv(max(parameters, count), _ELEMENTS), fits, 1),
        {
            **arguments,
            "copies_ptr": copies,
            "best_parameters_ptr": best.get("parameters"),
            "best_image_ptr": best.get("image"),
            "P": parameters,
            "count": count,
        },
        {"AVERAGED": averaged, "BLOCK": _ELEMENTS},
        bytes=2 * size(*(state[each] for each in names if each in state)),
    )
