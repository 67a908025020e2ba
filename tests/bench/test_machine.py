"""What is known of the machine; what is not is None, whatever a driver does."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from flashdip.bench import machine

CPU = torch.device("cpu")


def test_a_cpu_is_surveyed() -> None:
    found = machine.survey(CPU)
    assert found["hardware"]["device"] == found["hardware"]["cpu"]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["device_memory_gib"] is None
    assert found["software"]["torch"] == torch.__version__
    assert found["software"]["source"] == machine.source()
    state = machine.state(CPU)
    assert state["load"] >= 0
    assert set(state) == {
        "load", "clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "throttled"
    }  # fmt: skip
    assert machine.joules(CPU) is None


def test_the_source_is_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "fit.py").write_text("a = 1\n")
    before = machine.source()
    (tmp_path / "engine" / "fit.py").write_text("a = 2\n")
    assert machine.source() != before


def test_the_commit_is_that_of_this_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not of a repository that an installed package happens to lie in."""
    answers = {"rev-parse --show-toplevel": str(tmp_path), "rev-parse --short=12 HEAD": "abc"}

    def run(command: list[str], **options: Any) -> Any:
        return types.SimpleNamespace(stdout=answers.get(" ".join(command[3:]), changed) + "\n")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    changed = ""
    assert machine.commit() == "abc"
    changed = " M bench/gpu.py"
    assert machine.commit() == "abc+"
    answers["rev-parse --show-toplevel"] = str(tmp_path.parent)
    assert machine.commit() is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A GPU that its driver tells of, though not of its temperature."""

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("NVML: not supported")

    driver = types.SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetTemperature=fail,
        nvmlDeviceGetPowerUsage=lambda handle: 350_500,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1 | 0x4 | 0x40,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 12_345,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    properties = types.SimpleNamespace(uuid="1234", name="a GPU", total_memory=80 << 30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    return driver


def test_a_gpu_is_surveyed(gpu: types.SimpleNamespace) -> None:
    device = torch.device("cuda")
    hardware = machine.survey(device)["hardware"]
    assert (hardware["device"], hardware["device_memory_gib"]) == ("a GPU", 80)
    found = machine.state(device)
    assert (found["clock_mhz"], found["memory_clock_mhz"], found["power_w"]) == (1000, 2000, 350.5)
    assert found["temperature_c"] is None
    assert found["throttled"] == ["power cap", "hardware thermal slowdown"]
    meter = machine.joules(device)
    assert meter is not None
    assert meter() == 12.345


def test_without_its_driver_nothing_is_known(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = machine.state(torch.device("cuda"))
    assert (found["clock_mhz"], found["power_w"], found["throttled"]) == (None, None, None)
    assert machine.joules(torch.device("cuda")) is None
