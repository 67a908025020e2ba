"""What a figure was measured on: the hardware, the software, and the state it was in.

Two figures can be compared where the hardware is the same. Software is what comparisons are made
for, and the state (load, clocks, temperature, power, what holds the clocks down) tells how far a
figure can be trusted. What cannot be found out is None.
"""

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from flashdip.engine import doctor

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
# NVML's reasons for clocks below what was asked for, by bit; idleness is none.
_REASONS = {
    0x2: "applications' clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def survey(device: torch.device) -> dict[str, Any]:
    """Return the hardware and software that a device is driven by, as plain values.

    Returns:
        "hardware": system, cpu, cores, memory_gib, device and device_memory_gib (None on a CPU);
        "software": python, flashdip, torch, torch_build, triton, driver, threads, os, commit,
        source.
    """
    found = doctor.survey()
    cpu, on_gpu = found["cpu"], device.type == "cuda"
    name, memory = cpu["model"], None
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, round(properties.total_memory / 2**30)
    elif device.type != "cpu":
        name = device.type.upper()
    packages, nvidia = found["packages"], found["nvidia"]
    return {
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu["model"],
            "cores": cpu["cores"],
            "memory_gib": cpu["memory_bytes"] and round(cpu["memory_bytes"] / 2**30),
            "device": name,
            "device_memory_gib": memory,
        },
        "software": {
            "python": found["python"],
            "flashdip": packages["flashdip"],
            "torch": packages["torch"],
            "torch_build": found["torch"]["build"],
            "triton": packages["triton"],
            "driver": nvidia and nvidia["driver"],
            "threads": found["torch"]["threads"],
            "os": found["system"],
            "commit": commit(),
            "source": source(),
        },
    }


def state(device: torch.device) -> dict[str, Any]:
    """Return what the machine is doing now, as plain values.

    Returns:
        load (processes that run or want to, over a minute), clock_mhz, memory_clock_mhz,
        temperature_c, power_w and throttled (a list of reasons): of the device.
    """
    found: dict[str, Any] = {"load": _or(lambda: round(os.getloadavg()[0], 2))}
    found |= dict.fromkeys(("clock_mhz", "memory_clock_mhz", "temperature_c", "power_w"))
    found["throttled"] = None
    if device.type == "cuda":
        found |= _or(lambda: _gpu_state(device)) or {}
    elif device.type == "cpu":
        found |= {"clock_mhz": _or(_cpu_clock), "temperature_c": _or(_cpu_temperature)}
    return found


def joules(device: torch.device) -> Callable[[], float] | None:
    """Return what reads the energy that a device has used, in joules; None where nothing tells."""
    if device.type != "cuda":
        return None
    handle = _or(lambda: _handle(device))
    if handle is None:
        return None
    import pynvml

    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000


def commit() -> str | None:
    """Return the commit of the checkout this runs from, with "+" behind it if it was changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def ask() -> str | None:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")

    return _or(ask)


def source() -> str:
    """Return a hash of all code that has a part in a figure."""
    digest = hashlib.sha256()
    for path in sorted(
        each for part in ("kernels", "engine", "bench") for each in (ROOT / part).rglob("*.py")
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _handle(device: torch.device) -> Any:
    import pynvml

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")


def _gpu_state(device: torch.device) -> dict[str, Any]:
    import pynvml

    handle = _handle(device)

    def clock(kind: int) -> int | None:
        return _or(lambda: int(pynvml.nvmlDeviceGetClockInfo(handle, kind)))

    def reasons() -> list[str]:
        bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return [reason for bit, reason in _REASONS.items() if bits & bit]

    return {
        "clock_mhz": clock(pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": clock(pynvml.NVML_CLOCK_MEM),
        "temperature_c": _or(
            lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        ),
        "power_w": _or(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        "throttled": _or(reasons),
    }


def _cpu_clock() -> int:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(clocks) / len(clocks))


def _cpu_temperature() -> int:
    zones = Path("/sys/class/thermal").glob("thermal_zone*/temp")
    return round(max(int(zone.read_text()) for zone in zones) / 1000)


def _or(probe: Callable[[], T]) -> T | None:
    # A driver that is missing, old or broken raises anything; figures are worth having without it.
    try:
        return probe()
    except Exception:
        return None
