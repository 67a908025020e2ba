"""The backends, and how one is chosen."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from flashdip.engine.backends.base import Backend
from flashdip.engine.backends.eager import EagerBackend
from flashdip.engine.backends.graphed import GraphedBackend
from flashdip.engine.backends.onnx import OnnxBackend
from flashdip.engine.backends.triton import TritonBackend
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, UnavailableError

REFERENCE = EagerBackend("reference", ("fp32", "fp64"))
NATIVE = GraphedBackend("native", ("bf16", "fp32"), records=True)
TRITON = TritonBackend()
ONNX = OnnxBackend()

BACKENDS: tuple[Backend, ...] = (TRITON, NATIVE, REFERENCE, ONNX)  # in order of preference


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the accelerator, if there is one, else the CPU.

    Raises:
        UnavailableError: This machine, or this build of torch, does not have it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return device
    if accelerator is None or device.type != accelerator.type:
        has = f"cpu and {accelerator.type}" if accelerator else "cpu only"
        raise UnavailableError(
            f"device: {name} cannot be used here, torch {torch.__version__} sees {has}"
        )
    if device.index is not None and device.index >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise UnavailableError(f"device: {name} is not there, this machine has {count} of its kind")
    return device


def select(
    name: str, device: torch.device, config: FitConfig, providers: Sequence[str] = ()
) -> tuple[Backend, str, list[str]]:
    """Return a backend, its precision, and why better ones were passed over.

    Args:
        name: Of a backend; "auto" takes the first that can run.
        device: Where to run.
        config: What is to be fitted, and in which precision.
        providers: Of ONNX Runtime, in order; only for the backend `onnx`.

    Raises:
        ConfigError: No backend has this name, or it has no providers.
        UnavailableError: The backend asked for by name cannot run; the message holds its reasons.
    """
    names = [backend.name for backend in BACKENDS]
    if name not in ("auto", *names):
        raise ConfigError(f"backend: expected one of auto, {', '.join(names)}, got {name!r}")
    if providers and name != ONNX.name:
        raise ConfigError(
            f"provider: expected with the backend {ONNX.name} alone, got backend {name}: give "
            f"--backend {ONNX.name} too"
        )
    notes: list[str] = []
    asked = replace(ONNX, providers=tuple(providers))
    for backend in (asked if backend is ONNX else backend for backend in BACKENDS):
        if name == "auto" and device.type not in backend.devices:
            continue
        if name not in ("auto", backend.name):
            continue
        reasons = backend.unavailable(device, config)
        if not reasons:
            auto = config.precision == "auto"
            return backend, backend.precision(device) if auto else config.precision, notes
        notes.append(f"backend {backend.name} cannot run here: {'; '.join(reasons)}")
    raise UnavailableError("; ".join(notes))
