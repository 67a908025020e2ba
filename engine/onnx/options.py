"""Options of ONNX Runtime's providers, and the caches that TensorRT keeps between sessions."""

import ctypes
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, get_args

from flashdip.engine import nvidia
from flashdip.engine.errors import ConfigError, OutputError
from flashdip.engine.files import user_cache

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Tuning:
    """How providers compute; what a provider has no option for is left to it.

    Attributes:
        precision: The narrowest type that TensorRT may compute in. The CUDA provider computes in
            the model's own types; "fp32" keeps it from rounding to TF32.
        cuda_graph: Whether a run is captured in a CUDA graph and replayed. Inputs and outputs must
            then be bound to memory of the device.
        workspace: Bytes that TensorRT may use while it tries algorithms; None: as many as there
            are.
        device: Number of the GPU.
    """

    precision: Precision = "fp32"
    cuda_graph: bool = False
    workspace: int | None = None
    device: int = 0

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigError(
                f"precision: expected one of {', '.join(get_args(Precision))}, got "
                f"{self.precision!r}"
            )
        if self.device < 0:
            raise ConfigError(f"device: expected a whole number from 0, got {self.device}")
        if self.workspace is not None and self.workspace < 1:
            raise ConfigError(f"workspace: expected at least 1 byte, got {self.workspace}")


def options(name: str, tuning: Tuning, model: bytes) -> dict[str, str]:
    """Return the options of a provider by ONNX Runtime's names.

    Args:
        name: Short name of the provider.
        tuning: How it is to compute.
        model: What it is to run, which TensorRT's engines are kept for.
    """
    chosen = {"device_id": str(tuning.device)}
    if name == "cuda":
        chosen["use_tf32"] = _flag(tuning.precision != "fp32")
        chosen["enable_cuda_graph"] = _flag(tuning.cuda_graph)
    elif name == "tensorrt":
        chosen["trt_fp16_enable"] = _flag(tuning.precision == "fp16")
        chosen["trt_bf16_enable"] = _flag(tuning.precision == "bf16")
        chosen["trt_cuda_graph_enable"] = _flag(tuning.cuda_graph)
        if tuning.workspace is not None:
            chosen["trt_max_workspace_size"] = str(tuning.workspace)
        chosen |= _caches(tuning, model)
    elif name not in ("migraphx", "rocm", "dml"):
        return {}
    return chosen


def _caches(tuning: Tuning, model: bytes) -> dict[str, str]:
    """Return where TensorRT keeps engines and timings; nothing where it is unknown what for.

    The folder stands for GPU, TensorRT and ONNX Runtime. ONNX Runtime finds an engine by the names
    and shapes of a graph, not by its weights, which are part of the engine: so each model has a
    folder of its own for each tuning, or one picture's engine would draw another picture.
    """
    found = identity(tuning.device)
    if found is None:
        return {}
    try:
        base = user_cache() / "tensorrt" / _digest(json.dumps(found, sort_keys=True).encode())
        engines = base / _digest(repr(tuning).encode() + model)
        engines.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OutputError, OSError):
        return {}  # slower, not wrong
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(base),
    }


def identity(device: int) -> dict[str, str] | None:
    """Return what TensorRT's caches hold for: GPUs and which, driver, TensorRT, ONNX Runtime.

    Returns:
        None where one of them cannot be found out.
    """
    try:
        driver = nvidia.survey()
        if driver is None:
            return None
        gpus = [f"{gpu['name']} {gpu['compute_capability']}" for gpu in driver["gpus"]]
        return {
            "gpus": ", ".join(gpus),
            "device": f"{device} of {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}",
            "driver": driver["driver"],
            "tensorrt": str(ctypes.CDLL("libnvinfer.so.10").getInferLibVersion()),
            "onnxruntime": metadata.version("onnxruntime-gpu"),
        }
    except Exception:  # drivers and half-installed packages raise anything
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _flag(value: bool) -> str:
    return str(value)
