"""What the Triton kernels are planned for: networks, architectures, and the memory of many fits."""

import dataclasses
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdip.engine.backends import tuned
from flashdip.engine.backends.observe import MOVING_RATE, spread
from flashdip.engine.config import FitConfig
from flashdip.engine.guard import CAREFUL, JUMP
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.kernels import noise

if TYPE_CHECKING:
    from flashdip.kernels.fused.launch import Launch
    from flashdip.kernels.fused.program import Images, Program, Recorded
    from flashdip.kernels.fused.tiles import Architecture

# Images on the device, of each fit: observation, what of it was measured, output, average, mask and
# truth; two more while it is read by torch; temporaries of the one that is judged.
_KEPT, _READ, _JUDGED = 6, 2, 10


def interpreted() -> bool:
    """Return whether Triton interprets its kernels: then they run on a CPU, very slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def record(network: Skip, fits: int) -> "Recorded":
    """Record a network for F fits."""
    from flashdip.kernels.fused.program import Recorded
    from flashdip.kernels.fused.record import Recorder

    parameters = [torch.empty((fits, *p.shape), device="meta") for p in network.parameters]
    recorder = Recorder()
    network.forward(recorder, parameters, recorder.input(network.config.inputs))
    return Recorded(recorder.nodes, [p.name for p in network.parameters], parameters)


def program(
    config: FitConfig,
    images: "Images",
    size: tuple[int, ...],
    dtype: torch.dtype,
    architecture: "Architecture",
) -> "Program":
    """Plan the fits whose images these are, [F, C, H, W] of `size` (H, W)."""
    from flashdip.kernels.fused.judge import Rules
    from flashdip.kernels.fused.program import Program, Settings

    rules = Rules(
        config.read_every,
        config.iterations,
        config.retries,
        JUMP,
        CAREFUL,
        config.discrepancy if "discrepancy" in config.stop else None,
        config.window,
        config.patience,
    )
    return Program(
        record(Skip(config.network), len(images.output)),
        Settings(config.perturbation, config.betas, config.eps, config.average, MOVING_RATE, rules),
        images,
        [config.rate(i) for i in range(1, config.iterations + 1)],
        config.network.network_size(*size),
        dtype,
        architecture,
    )


def planned(
    config: FitConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    architecture: "Architecture",
    fits: int = 1,
    device: torch.device | str = "meta",
) -> "Program":
    """Plan the denoising of F images of `size` (H, W): of zeros, or without memory."""
    from flashdip.kernels.fused.program import Images

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    shape = fits, config.network.outputs, *size
    samples = len(spread(config.network.outputs * size[0] * size[1]))
    windowed, moving = "es-wmv" in config.stop, "es-emv" in config.stop
    images = Images(
        output=empty(*shape),
        average=empty(*shape),
        loss=empty(fits),
        target=empty(*shape),
        window=empty(config.window, fits, samples) if windowed else None,
        sample=empty(samples, dtype=torch.int64) if windowed else None,
        moving_mean=empty(*shape) if moving else None,
        moving_variance=empty(fits) if moving else None,
        measured=empty(*shape),
        truth=empty(*shape),
        sigma=empty(fits),
        clipped=empty(fits, dtype=torch.int32),
    )
    return program(config, images, size, dtype, architecture)


def memory(
    config: FitConfig,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    architecture: "Architecture",
    fits: int,
) -> int:
    """Return the bytes of device memory that F fits take, identities or masks as operators.

    Args:
        config: How they are fitted.
        shape: Of an image: channels, height, width.
        dtype: Storage type.
        architecture: Of the GPU.
        fits: F.
    """
    network = dataclasses.replace(config.network, outputs=shape[0])
    config = dataclasses.replace(config, network=network)
    plan = planned(config, (shape[1], shape[2]), dtype, architecture, fits)
    draws = 2 * noise.TABLE_SIZE if config.perturbation else 0
    values = torch.Size(shape).numel()
    samples, tables = len(spread(values)), 12 * config.iterations  # rates and divisors
    shared = plan.memory + draws + tables + 8 * samples
    image = 4 * values
    window = 4 * config.window * samples if "es-wmv" in config.stop else 0
    moving = "es-emv" in config.stop
    # An interrupted fit is read once by torch, all fits together, and judged by itself.
    return shared + fits * (window + (_KEPT + moving + _READ) * image) + _JUDGED * image


def launches(
    config: SkipConfig, height: int, width: int, arch: str, dtype: torch.dtype, fits: int = 1
) -> "list[Launch]":
    """Return the launches of one step of denoising on a named architecture, without memory.

    Args:
        config: Of the network.
        height: Of the image.
        width: Of the image.
        arch: Such as "sm_90"; see `flashdip.kernels.fused.tiles.ARCHITECTURES`.
        dtype: Storage type.
        fits: Fits in one launch.
    """
    return _denoising(config, (height, width), arch, dtype, fits).launches


def readings(
    config: SkipConfig, height: int, width: int, arch: str, dtype: torch.dtype, fits: int = 1
) -> "list[Launch]":
    """Return the launches of a reading, which follow some of the steps; see `launches`."""
    reading = _denoising(config, (height, width), arch, dtype, fits).reading
    assert reading is not None
    return reading.launches


def _denoising(
    config: SkipConfig, size: tuple[int, int], arch: str, dtype: torch.dtype, fits: int
) -> "Program":
    from flashdip.kernels.fused.tiles import ARCHITECTURES

    fit = FitConfig(network=config, stop=("es-wmv",))
    return planned(fit, size, dtype, ARCHITECTURES[arch], fits)


def architecture(device: torch.device) -> "Architecture":
    """Return the architecture whose tiles suit a device best: its own, or the nearest older one."""
    from flashdip.kernels.fused.tiles import ARCHITECTURES

    if device.type != "cuda":
        return ARCHITECTURES["interpreter"]
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    known = {int(name[3:]): name for name in ARCHITECTURES if name.startswith("sm_")}
    nearest = max(version for version in known if version <= own)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    found = ARCHITECTURES[known[nearest]]
    return found._replace(
        processors=properties.multi_processor_count,
        shared=min(shared or found.shared, found.shared),
        table={**found.table, **tuned.load(tuned.identity(device))},
    )
