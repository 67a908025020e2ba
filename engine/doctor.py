"""What this machine has, which backends can run on it, and what does not go together.

Nothing here may fail: whatever cannot be found out, or is broken, is reported as missing.
"""

import json
import os
import platform
import re
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from flashdip.engine.attempt import attempt
from flashdip.engine.nvidia import survey as ask_nvidia
from flashdip.engine.onnx import doctor as onnx

PACKAGES = (
    "flashdip",
    "torch",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "ray",
    "matplotlib",
    "numpy",
    "pillow",
    "imagecodecs",
    "tifffile",
    "scikit-image",
    "safetensors",
)
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def survey() -> dict[str, Any]:
    """Find out what this machine has, as plain values for JSON; nothing that is missing raises.

    Returns:
        python, system, packages (name: version or None), cpu, torch (build, cuda, devices, error),
        nvidia (driver, cuda, gpus; None without a driver), onnxruntime (see
        `flashdip.engine.onnx.doctor`), tensorrt (versions of its wheels by CUDA major),
        cuda_majors (who needs which CUDA), backends (name, available, reasons) and warnings (one
        line each).
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": attempt(platform.platform, sys.platform),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "torch": _torch(),
        "nvidia": attempt(ask_nvidia, None),
    }
    found["onnxruntime"], found["tensorrt"] = onnx.survey(), onnx.tensorrt()
    found["cuda_majors"] = _cuda_majors(found)
    found["backends"] = _backends()
    return found | {"warnings": warnings(found)}


def warnings(found: dict[str, Any]) -> list[str]:
    """Say what does not go together in a survey, one line each, with what to do about it."""
    lines = []
    torch, nvidia = found["torch"], found["nvidia"]
    if torch["error"]:
        lines.append(f"torch cannot be imported ({torch['error']}): install it again")
    elif nvidia and not torch["cuda"]:
        lines.append(
            f"an NVIDIA GPU is here, but this torch is a {torch['build']} build and cannot use it: "
            "install a CUDA build of torch (README, which torch)"
        )
    elif nvidia and not torch["devices"]:
        lines.append("an NVIDIA driver is here, but torch sees no GPU: check CUDA_VISIBLE_DEVICES")
    lines += onnx.warnings(found)
    majors = found["cuda_majors"]
    driver, base = majors.get("driver"), majors.get("torch")
    for name in ("torch", "onnxruntime", "tensorrt"):
        major = majors.get(name)
        if major and driver and major > driver:
            lines.append(
                f"{name} is built for CUDA {major}, but the driver supports CUDA {driver}: update "
                f"the driver, or install a build of {name} for CUDA {driver}"
            )
        if major and base and major != base:
            lines.append(
                f"{name} is built for CUDA {major}, but torch for CUDA {base}: install builds for "
                "the same CUDA"
            )
    return lines


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what this machine can run, and why."""
    found = survey()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(found)


def _version(package: str) -> str | None:
    return attempt(lambda: metadata.version(package), None)


def _cpu() -> dict[str, Any]:
    flags: set[str] = attempt(_cpu_flags, set[str]())
    return {
        "model": attempt(_cpu_model, "unknown"),
        "cores": attempt(lambda: len(os.sched_getaffinity(0)), os.cpu_count()),
        "memory_bytes": attempt(
            lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
        ),
        "features": [name for name in CPU_FEATURES if name in flags],
        "bf16": bool(BF16_FEATURES & flags),
    }


def _cpu_flags() -> set[str]:
    if sys.platform == "darwin":
        # One line per feature: "hw.optional.arm.FEAT_BF16: 1"
        lines = _output("sysctl", "hw.optional").lower().splitlines()
        features = [line.split(":")[0].split(".")[-1] for line in lines if line.endswith(" 1")]
        return {name.removeprefix("feat_") for name in features}
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return set(match[1].split()) if match else set()


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    match = re.search(r"^model name\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1].strip() if match else platform.machine()


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"build": None, "cuda": None, "devices": [], "threads": None, "error": reason}
    hip, cuda = getattr(torch.version, "hip", None), torch.version.cuda
    return {
        "build": f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU",
        "cuda": cuda,
        "devices": attempt(_torch_devices, list[str]()),
        "threads": attempt(torch.get_num_threads, None),
        "error": None,
    }


def _torch_devices() -> list[str]:
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return []
    names = []
    for index in range(torch.accelerator.device_count()):
        name = torch.cuda.get_device_name(index) if kind.type == "cuda" else kind.type.upper()
        names.append(f"{kind.type}:{index} {name}")
    return names


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout


def _cuda_majors(found: dict[str, Any]) -> dict[str, int]:
    """Return the CUDA major that each part was built for, of those that say so."""
    versions = {
        "driver": (found["nvidia"] or {}).get("cuda"),
        "torch": found["torch"]["cuda"],
        "onnxruntime": found["onnxruntime"]["cuda"],
        "tensorrt": next(iter(found["tensorrt"]), None),
    }
    return {name: int(text.split(".")[0]) for name, text in versions.items() if text}


def _backends() -> list[dict[str, Any]]:
    try:
        from flashdip.engine.backends import BACKENDS, resolve_device
        from flashdip.engine.config import FitConfig

        device = resolve_device("auto")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [{"name": "all", "device": None, "available": False, "reasons": [reason]}]
    rows = []
    for backend in BACKENDS:
        check = partial(backend.unavailable, device, FitConfig())
        reasons = attempt(check, ["its own check failed"])
        row = {"name": backend.name, "device": str(device), "available": not reasons}
        precision = attempt(partial(backend.precision, device), None)  # that "auto" stands for
        rows.append(row | {"precision": precision, "reasons": list(reasons)})
    return rows


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # No markup: texts from drivers and exceptions may hold brackets.
    console = Console(highlight=False, markup=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, text in _lines(found):
        table.add_row(name, text)
    console.print(table)
    for line in found["warnings"]:
        console.print(f"warning: {line}", style="yellow")


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, torch, nvidia = found["cpu"], found["torch"], found["nvidia"]
    memory = f"{cpu['memory_bytes'] / 2**30:.1f} GiB" if cpu["memory_bytes"] else "unknown"
    features = " ".join(cpu["features"]) or "none known"
    lines = [
        ("system", f"{found['system']}, Python {found['python']}"),
        ("CPU", f"{cpu['model']}, {cpu['cores']} usable cores, {memory} memory"),
        ("", f"{features}; bf16 {'in hardware' if cpu['bf16'] else 'not in hardware'}"),
    ]
    if nvidia:
        lines.append(("NVIDIA", f"driver {nvidia['driver']}, up to CUDA {nvidia['cuda']}"))
        for gpu in nvidia["gpus"]:
            capability = gpu["compute_capability"]
            lines.append(("", f"{gpu['name']}, {gpu['memory']}, compute capability {capability}"))
    else:
        lines.append(("NVIDIA", "no driver found"))
    seen = ", ".join(torch["devices"]) or "no accelerator"
    build = f"{torch['build']} build, sees {seen}, {torch['threads']} threads"
    lines.append(("torch", "cannot be imported" if torch["error"] else build))
    lines += onnx.lines(found)
    have = [f"{name} {version}" for name, version in found["packages"].items() if version]
    missing = [name for name, version in found["packages"].items() if not version]
    lines.append(("packages", ", ".join(have)))
    if missing:
        lines.append(("", f"not installed: {', '.join(missing)}"))
    for index, backend in enumerate(found["backends"]):
        verdict = "can run" if backend["available"] else f"cannot: {'; '.join(backend['reasons'])}"
        where = f" on {backend['device']}, in {backend.get('precision')} unless told otherwise"
        where = where if backend["available"] else ""
        lines.append(("" if index else "backends", f"{backend['name']}: {verdict}{where}"))
    return lines
