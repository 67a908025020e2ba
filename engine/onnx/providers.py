"""ONNX Runtime's execution providers: which there are, and sessions that run on those asked for.

ONNX Runtime runs on the CPU whatever it cannot run elsewhere, and says so on stderr at most. Here a
provider that was asked for by name runs every node, or it is an error.
"""

import contextlib
import ctypes
import importlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from flashdip.engine.errors import ConfigError, InputError, UnavailableError
from flashdip.engine.files import one_line
from flashdip.engine.onnx.options import Tuning, options


class Provider(NamedTuple):
    """A provider of ONNX Runtime.

    Attributes:
        name: That ONNX Runtime has for it.
        library: The middle of its library's file name; None: it is compiled in.
        packages: What pip is to install for it.
        where: On which systems alone there is one.
    """

    name: str
    library: str | None
    packages: str
    where: str = ""


_MIGRAPHX = Provider("MIGraphXExecutionProvider", "migraphx", "onnxruntime-migraphx")

# In the order in which they are tried where none is asked for.
PROVIDERS: dict[str, Provider] = {
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "tensorrt",
        "'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13>=10.13,<11'",
    ),
    "cuda": Provider("CUDAExecutionProvider", "cuda", "'onnxruntime-gpu[cuda,cudnn]'"),
    "migraphx": _MIGRAPHX,
    "rocm": _MIGRAPHX,
    "openvino": Provider("OpenVINOExecutionProvider", "openvino", "onnxruntime-openvino"),
    "coreml": Provider("CoreMLExecutionProvider", None, "onnxruntime", "macOS"),
    "dml": Provider("DmlExecutionProvider", None, "onnxruntime-directml", "Windows"),
    "webgpu": Provider("WebGpuExecutionProvider", None, "onnxruntime-webgpu"),
    "cpu": Provider("CPUExecutionProvider", None, "onnxruntime"),
}
_FAULTS_OF_MODELS = ("InvalidGraph", "InvalidProtobuf", "NotImplemented")  # ONNX Runtime's errors
# TensorRT builds engines for minutes: only for those who ask for it.
_UNASKED = tuple(name for name in PROVIDERS if name not in ("tensorrt", "rocm"))


def tell(line: str) -> None:
    """Print a line on stderr, where notes go."""
    print(line, file=sys.stderr)


def open_session(
    model: bytes | Path,
    providers: Sequence[str] | None = None,
    *,
    tuning: Tuning | None = None,
    threads: int = 0,
    tell: Callable[[str], None] = tell,
) -> Any:
    """Open an `onnxruntime.InferenceSession`.

    Args:
        model: The model, or its file.
        providers: Names such as "cuda", first the one that is to run whatever it can. All nodes
            run on these: with "cpu" among them, on the CPU too. None: whatever this machine has
            without TensorRT, with the CPU for the rest.
        tuning: How providers are to compute.
        threads: Of the CPU provider within an operation; 0 leaves it to ONNX Runtime.
        tell: Receives lines that a person should see: what was left out, and which provider runs
            how many nodes where several share them.

    Raises:
        ConfigError: A name is unknown or comes twice.
        UnavailableError: ONNX Runtime or a provider that was asked for is not there, cannot be
            loaded, or cannot run all of the model.
        InputError: The model cannot be loaded.
    """
    runtime = load()
    source = model if isinstance(model, bytes) else model.read_bytes()
    names = _asked(providers) if providers is not None else _there(tell)
    tuning = tuning or Tuning()
    settings = runtime.SessionOptions()
    settings.log_severity_level = 4  # what goes wrong is told by the errors below
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if "cpu" not in names:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    wanted = [(PROVIDERS[name].name, options(name, tuning, source)) for name in names]
    try:
        session = runtime.InferenceSession(source, settings, providers=wanted, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own errors have no base but this
        raise _failure(names, error) from error
    session.disable_fallback()
    started = [name for name in names if PROVIDERS[name].name in session.get_providers()]
    for name in sorted(set(names) - set(started), key=names.index):
        if providers is not None:
            raise UnavailableError(
                f"provider {name}: expected one that runs here, but ONNX Runtime could not start "
                "it, though its library loads: is there a device for it? 'flashdip doctor' shows "
                "more"
            )
        tell(f"provider {name} is left out: ONNX Runtime could not start it")
    if len(started) > 1:
        counts = nodes(session)
        tell("nodes: " + ", ".join(f"{name} {counts.get(name, 0)}" for name in started))
    return session


def nodes(session: Any) -> dict[str, int]:
    """Return how many of a session's nodes each provider runs, by short name."""
    short = {provider.name: name for name, provider in PROVIDERS.items() if name != "rocm"}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[short.get(part.ep_name, part.ep_name)] += len(part.get_nodes())
    return dict(counts)


def load(module: str = "onnxruntime") -> Any:
    """Return the module `onnxruntime`, or `onnx`.

    Raises:
        UnavailableError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # broken libraries raise anything
        raise UnavailableError(
            f"{module}: expected it installed, got {one_line(error)}: pip install {module}"
        ) from error


def missing(name: str) -> str | None:
    """Return why a provider cannot be used here, with what to do about it; None if it can.

    Its libraries are loaded, those of NVIDIA's packages for Python first.

    Args:
        name: A key of `PROVIDERS`.
    """
    runtime, provider = load(), PROVIDERS[name]
    if provider.name not in runtime.get_available_providers():
        held = [
            key for key in PROVIDERS if PROVIDERS[key].name in runtime.get_available_providers()
        ]
        return (
            f"the onnxruntime {runtime.__version__} here was built without it (it has "
            f"{', '.join(held)}): {_install(provider)}"
        )
    if provider.library is None:
        return None
    if name in ("cuda", "tensorrt"):
        _preload(runtime)
    reason = load_error(Path(runtime.__file__).parent / "capi", provider.library)
    return None if reason is None else f"it cannot be loaded ({reason}): {_install(provider)}"


def load_error(folder: Path, library: str) -> str | None:
    """Return why a provider's library cannot be loaded; None if it can.

    Args:
        folder: Of ONNX Runtime's libraries.
        library: The middle of its file name, such as "cuda".
    """
    try:
        # The others need its symbols.
        shared = folder / "libonnxruntime_providers_shared.so"
        ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{library}.so"))
    except OSError as error:
        return one_line(error)
    return None


def _asked(names: Sequence[str]) -> list[str]:
    """Check the names that were asked for, and that they are there."""
    known = [name.strip().lower() for name in names]
    for name in known:
        if name not in PROVIDERS:
            raise ConfigError(
                f"provider: expected some of {', '.join(PROVIDERS)}, got {one_line(name)!r}"
            )
    if not known or len({PROVIDERS[name] for name in known}) < len(known):
        raise ConfigError(
            "provider: expected at least one name, each once, such as tensorrt,cuda; got "
            f"{', '.join(known) or 'none'}"
        )
    for name in known:
        if reason := missing(name):
            raise UnavailableError(f"provider {name}: {reason}")
    return known


def _there(tell: Callable[[str], None]) -> list[str]:
    """Return the providers that run here, and tell which is in the package but does not."""
    available, found = load().get_available_providers(), []
    for name in _UNASKED:
        if PROVIDERS[name].name not in available:
            continue
        if reason := missing(name):
            tell(f"provider {name} is left out: {reason}")
        else:
            found.append(name)
    return found


def _preload(runtime: Any) -> None:
    """Load CUDA, cuDNN and TensorRT from NVIDIA's packages for Python, where they are installed."""
    # Both print or raise where something is not there, which the caller finds out and tells.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        runtime.preload_dlls()
    with contextlib.suppress(Exception):
        importlib.import_module("tensorrt")


def _install(provider: Provider) -> str:
    """Return the command that brings a provider; all packages share one import name."""
    wanted = f"pip install {provider.packages}"
    wanted += f" (on {provider.where})" if provider.where else ""
    own = provider.packages.replace("'", "").split("[")[0].split()[0]
    held = sorted(set(metadata.packages_distributions().get("onnxruntime", ())))
    alone = held in ([], [own])
    return wanted if alone else f"pip uninstall {' '.join(held)} && {wanted}"


def _failure(names: Sequence[str], error: Exception) -> Exception:
    """Return what it means that no session could be made."""
    text = one_line(error)
    if "fallback to CPU EP has been explicitly disabled" in text:
        listed = ",".join(names)
        return UnavailableError(
            f"provider {listed}: expected it to run all of the model, got nodes left for the CPU: "
            f"give --provider {listed},cpu to let the CPU run them"
        )
    if list(names) == ["cpu"] or type(error).__name__ in _FAULTS_OF_MODELS:
        return InputError(f"model: expected one that ONNX Runtime can load, got {text}")
    return UnavailableError(f"provider {','.join(names)}: it could not be started: {text}")
