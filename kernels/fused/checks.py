"""What must hold of every kernel on every architecture; each breach is a line of text.

Where a breach is meant, ALLOWED says so with the reason.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashdip.kernels.fused.inspect import Compiled
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.tiles import ARCHITECTURES

ASYNC_FROM = 16  # channels; fewer do not fill a copy of 16 bytes for each thread

# (kernel, architecture, check): reason. Names of checks are those of `breaches`.
ALLOWED: dict[tuple[str, str, str], str] = {
    (kernel, arch, check): reason
    for arch in ARCHITECTURES
    for kernel, check, reason in (
        (
            "_pointwise_backward",
            "layout",
            "dy is computed, and has to lie in shared memory for both products; x comes and its "
            "gradient goes in rows of channels, whose products have columns",
        ),
        ("_smooth_forward", "layout", "results are turned once, to be written in whole lines"),
        (
            "_smooth_backward",
            "layout",
            "dy is computed, is a factor of several products, and is turned to be written in whole "
            "lines; memory takes longer",
        ),
        (
            "_smooth_backward",
            "async",
            "du and y are only read to make dy in registers; loads ahead of their turn were slower "
            "in the model",
        ),
    )
} | {
    (
        "_conv_forward",
        "sm_120",
        "spill",
    ): "six registers of the folded nearest kind on small maps, once "
    "a program, while parts of a split sum are on their way; fewer at a time would wait longer",
}

# Modelled seconds of a step of the default network, float16, as last recorded: (GPU, side).
RECORDED: dict[tuple[str, int], float] = {
    ("H100 SXM", 256): 0.0006048,
    ("H100 SXM", 512): 0.001376,
    ("H100 SXM", 1024): 0.00449,
    ("A100 80GB", 256): 0.0009356,
    ("A100 80GB", 512): 0.002367,
    ("A100 80GB", 1024): 0.008073,
    ("RTX 4090", 256): 0.001378,
    ("RTX 4090", 512): 0.003943,
    ("RTX 4090", 1024): 0.01379,
}
SLACK = 1.01

LAUNCHES = 80  # of a step of the default network, at most
SPECIALISATIONS = 80  # of the default network at all sizes, for one architecture, at most


def breaches(launch: Launch, compiled: Compiled) -> dict[str, str]:
    """Return what a launch breaches that it should not: name of the check, and what was found."""
    found = {}
    nvidia = compiled.arch.startswith("sm_")
    limit = ARCHITECTURES[compiled.arch].shared
    gemm = launch.gemm and _narrow(launch)
    if compiled.spills or compiled.stack:
        found["spill"] = f"{compiled.spills} spills, {compiled.stack} bytes of stack"
    if gemm and not compiled.matrix_instructions:
        found["matrix"] = "no matrix instructions"
    if gemm and nvidia and not compiled.code.copies and _channels(launch) >= ASYNC_FROM:
        found["async"] = "no asynchronous copies"
    if compiled.shared > limit:
        found["shared"] = f"{compiled.shared} bytes of shared memory, {limit} at most"
    if gemm and compiled.conversions:
        found["layout"] = f"{compiled.conversions} layout conversions in main loops"
    return {
        check: text
        for check, text in found.items()
        if (compiled.kernel, compiled.arch, check) not in ALLOWED
    }


def slower(steps: Mapping[tuple[str, int], float]) -> list[str]:
    """Say which modelled steps, in seconds by GPU and side, are slower than recorded."""
    return [
        f"{gpu}, {side}x{side}: modelled {seconds * 1e3:.3f} ms, recorded {recorded * 1e3:.3f} ms"
        for (gpu, side), seconds in steps.items()
        if (recorded := RECORDED.get((gpu, side))) and seconds > recorded * SLACK
    ]


def too_many(launches: Mapping[tuple[str, int], int], codes: Mapping[str, int]) -> list[str]:
    """Say where there are more of something than should be.

    Args:
        launches: Of a step, by architecture and side of the image.
        codes: Compiled functions, by architecture.
    """
    return [
        f"{arch}, {side}x{side}: {count} launches a step, {LAUNCHES} at most"
        for (arch, side), count in launches.items()
        if count > LAUNCHES
    ] + [
        f"{arch}: {count} kernels to compile, {SPECIALISATIONS} at most"
        for arch, count in codes.items()
        if count > SPECIALISATIONS
    ]


def _narrow(launch: Launch) -> bool:
    """Whether products are of 16-bit numbers; float32 ones use no matrix units, on purpose."""
    kinds = (torch.float16, torch.bfloat16)
    return any(isinstance(a, Tensor) and a.dtype in kinds for a in launch.arguments.values())


def _channels(launch: Launch) -> int:
    """Return the most channels that a 16-bit activation of the launch has."""
    return max(
        (
            a.shape[-1]
            for a in launch.arguments.values()
            if isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16)
        ),
        default=0,
    )
