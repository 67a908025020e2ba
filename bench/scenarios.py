"""The benches of `flashdip bench`, by kind: what is set up, judged, counted and measured."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from flashdip.bench import baselines, restoring
from flashdip.bench.cases import PUBLISHED, Bench, configuration
from flashdip.bench.correct import judged
from flashdip.bench.work import Work, count
from flashdip.engine.backends import BACKENDS, REFERENCE, select


def default_backends(device: torch.device) -> list[str]:
    """Return what a step is measured on unless told otherwise, each NAME:PRECISION."""
    config = configuration("auto")
    return [
        f"{backend.name}:{'fp32' if backend is REFERENCE else backend.precision(device)}"
        for backend in reversed(BACKENDS)
        if device.type in backend.devices and not backend.unavailable(device, config)
    ]


def chosen(entry: str, device: torch.device, name: str = PUBLISHED) -> tuple[str, str]:
    """Return the backend and the precision that NAME or NAME:PRECISION stands for.

    Raises:
        ConfigError: There is no such backend.
        UnavailableError: It cannot run here, or not in this precision.
    """
    backend, _, precision = entry.partition(":")
    found, exact, _ = select(backend, device, configuration(precision or "auto", name))
    return found.name, exact


def yardsticks(size: int, device: torch.device) -> list[Bench]:
    """Return the published loop, with and without its host work."""
    parameters = {"size": size, "fits": 1, "precision": "fp32", "network": PUBLISHED}
    return [
        Bench(
            name,
            baselines.published,
            (size, host_work, str(device)),
            parameters | {"host_work": host_work},
        )
        for name, host_work in (("published", False), ("published + host work", True))
    ]


def steps(
    size: int, device: torch.device, backends: Sequence[str], fits: Sequence[int] = (1,)
) -> list[Bench]:
    """Return one iteration of the published network: the published loop, and each backend.

    Args:
        size: Side of the picture, in pixels.
        device: Where.
        backends: Each NAME or NAME:PRECISION.
        fits: Numbers of fits side by side.
    """
    listed = yardsticks(size, device)
    for entry in backends:
        backend, precision = chosen(entry, device)
        for each in fits:
            parameters = {"backend": backend, "precision": precision, "size": size, "fits": each}
            listed.append(
                Bench(
                    f"{backend} ({precision})" + (f", F = {each}" if each > 1 else ""),
                    baselines.engine,
                    (size, str(device), backend, precision, each),
                    parameters | {"network": PUBLISHED},
                    each,
                    partial(judged, size, str(device), backend, precision, PUBLISHED, each),
                )
            )
    return listed


def step_work(bench: Bench) -> Mapping[tuple[str, str], Work]:
    """Count one iteration of one fit of a bench of `steps` or `yardsticks`."""
    size, precision = bench.parameters["size"], bench.parameters["precision"]
    return count(configuration("auto", bench.parameters["network"]), (size, size), precision)


def restorations(
    size: int, target: float, device: torch.device, backend: str, presets: Sequence[str]
) -> list[Bench]:
    """Return restorations of a photograph until their average reaches a PSNR.

    Args:
        size: Side of the photograph, in pixels.
        target: PSNR of the averaged output, in dB.
        device: Where.
        backend: NAME or NAME:PRECISION.
        presets: For denoising.
    """
    parameters: dict[str, Any] = {"size": size, "target_db": target}
    listed = [
        Bench(
            "published",
            restoring.published,
            (size, str(device), target),
            parameters | {"precision": "fp32"},
        )
    ]
    for name in presets:
        own, precision = chosen(backend, device, name)
        listed.append(
            Bench(
                f"{own} ({precision}), {name}",
                restoring.engine,
                (size, str(device), target, own, precision, name),
                parameters | {"backend": own, "precision": precision, "preset": name},
                check=partial(judged, size, str(device), own, precision, name),
            )
        )
    return listed
