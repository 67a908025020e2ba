"""The part of `flashdip doctor` about ONNX Runtime: packages, providers, who needs which CUDA.

Nothing here may fail, and nothing is loaded into this process: providers load libraries of CUDA,
maybe the very ones that are broken.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

from flashdip.engine.attempt import attempt

_PROBE = """
import json
from flashdip.engine.onnx import providers
runtime = providers.load()
names = [n for n in providers.PROVIDERS if n != "rocm"]
held = [n for n in names if providers.PROVIDERS[n].name in runtime.get_available_providers()]
found = [{"name": n, "reason": providers.missing(n)} for n in held]
print(json.dumps({"version": runtime.__version__, "providers": found}))
"""
_SECONDS = 60  # for the answer
_CUDA = ("12", "13", "14")


def survey() -> dict[str, Any]:
    """Find out what ONNX Runtime is here, as plain values for JSON.

    Returns:
        packages (name: version, of all that bring the module), version, providers (name, and the
        reason why it cannot be used or None), cuda, tensorrt (the versions its libraries were
        built for, or None), error (why it cannot be imported, or None).
    """
    packages = attempt(_packages, dict[str, str]())
    base: dict[str, Any] = {"packages": packages, "version": None, "providers": [], "error": None}
    base |= {"cuda": attempt(_cuda, None), "tensorrt": attempt(_tensorrt, None)}
    if attempt(lambda: util.find_spec("onnxruntime"), None) is None:
        return base | {"error": "not installed: pip install onnxruntime"}
    try:
        base.update(json.loads(_probe()))
        return base
    except Exception as error:  # whatever it was, it is what a person has to know
        return base | {"error": " ".join(str(error).split())}


def tensorrt() -> dict[str, str]:
    """Return the TensorRT wheels that are installed: the CUDA major in their names, and version."""
    found = {}
    for cuda in _CUDA:
        version = attempt(partial(metadata.version, f"tensorrt-cu{cuda}"), None)
        if version is not None:
            found[cuda] = version
    return found


def warnings(found: dict[str, Any]) -> list[str]:
    """Say what does not go together in a whole survey of the doctor, one line each."""
    runtime, lines = found["onnxruntime"], []
    if len(runtime["packages"]) > 1:
        names = " and ".join(runtime["packages"])
        lines.append(
            f"{names} overwrite each other's files: uninstall all of them, then install the one "
            "you want"
        )
    wheels, built = found["tensorrt"], runtime["tensorrt"]
    for version in wheels.values():
        if built and version.split(".")[0] != built:
            lines.append(
                f"onnxruntime-gpu needs TensorRT {built}, but {version} is installed: "
                f"pip install 'tensorrt-cu{next(iter(wheels))}<{int(built) + 1}'"
            )
    return lines


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows about it for people: a title or nothing, and text."""
    runtime, majors = found["onnxruntime"], found["cuda_majors"]
    if runtime["error"]:
        rows = [("onnxruntime", f"cannot be used: {runtime['error']}")]
    else:
        held = ", ".join(runtime["packages"]) or "unknown package"
        rows = [("onnxruntime", f"{runtime['version']}, from {held}")]
    for provider in runtime["providers"]:
        verdict = f"cannot: {provider['reason']}" if provider["reason"] else "can run"
        rows.append(("", f"{provider['name']}: {verdict}"))
    parts = ("driver", "torch", "onnxruntime", "tensorrt")
    rows.append(("CUDA", ", ".join(f"{name} {majors.get(name, 'none')}" for name in parts)))
    return rows


def _packages() -> dict[str, str]:
    names = sorted(set(metadata.packages_distributions().get("onnxruntime", ())))
    return {name: metadata.version(name) for name in names}


def _probe() -> str:
    """Ask ONNX Runtime in a process of its own, which may crash."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        env=os.environ | {"PYTHONPATH": paths},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise RuntimeError(last[0])
    return done.stdout.splitlines()[-1]


def _folder() -> Path:
    spec = util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise OSError("not installed")
    return Path(spec.origin).parent / "capi"


def _cuda() -> str | None:
    text = (_folder() / "build_and_package_info.py").read_text()
    match = re.search(r"^cuda_version\s*=\s*['\"]([\d.]+)", text, re.M)
    return match[1] if match else None


def _tensorrt() -> str | None:
    library = (_folder() / "libonnxruntime_providers_tensorrt.so").read_bytes()
    match = re.search(rb"libnvinfer\.so\.(\d+)", library)
    return match[1].decode() if match else None
