"""The doctor reads what is there, names what does not go together, and survives what is broken."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashdip.engine import doctor
from flashdip.engine.backends import BACKENDS

FITTING: dict[str, Any] = {
    "torch": {"build": "CUDA 13.0", "cuda": "13.0", "devices": ["cuda:0 GPU"], "error": None},
    "nvidia": {"driver": "580.1", "cuda": "13.0", "gpus": []},
    "onnxruntime": {"packages": {"onnxruntime-gpu": "1.31.1"}, "tensorrt": "10"},
    "tensorrt": {"13": "10.13.3"},
    "cuda_majors": {"driver": 13, "torch": 13, "onnxruntime": 13, "tensorrt": 13},
}


def differing(**changes: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(FITTING)
    for part, values in changes.items():
        found[part] |= values
    return found


def test_parts_that_fit_raise_no_warning() -> None:
    assert doctor.warnings(FITTING) == []
    newer_driver = differing(cuda_majors={"driver": 14})
    assert doctor.warnings(newer_driver) == []
    without = FITTING | {"nvidia": None, "cuda_majors": {"torch": 13}}
    assert doctor.warnings(without) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuda_majors": {"driver": 12}}, ["torch is built for CUDA 13", "supports CUDA 12"]),
        ({"cuda_majors": {"tensorrt": 12}}, ["tensorrt", "CUDA 12", "torch for CUDA 13"]),
        ({"cuda_majors": {"onnxruntime": 12}}, ["onnxruntime", "CUDA 12", "torch"]),
        (
            {"onnxruntime": {"packages": {"onnxruntime": "1", "onnxruntime-gpu": "1"}}},
            ["onnxruntime and onnxruntime-gpu", "uninstall all of them"],
        ),
        ({"tensorrt": {"13": "11.4.0"}}, ["TensorRT 10", "11.4.0", "'tensorrt-cu13<11'"]),
        ({"torch": {"build": "CPU", "cuda": None}}, ["torch is a CPU build", "CUDA build"]),
        ({"torch": {"devices": []}}, ["sees no GPU"]),
        ({"torch": {"error": "OSError: libcudart"}}, ["cannot be imported", "libcudart"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, dict[str, Any]], words: list[str]) -> None:
    lines = doctor.warnings(differing(**changes))
    assert all(word in lines[0] for word in words)
    assert not any("\n" in line for line in lines)


def test_the_survey_is_plain_json_and_knows_the_backends() -> None:
    found = json.loads(json.dumps(doctor.survey()))
    assert [row["name"] for row in found["backends"]] == [backend.name for backend in BACKENDS]
    assert any(row["available"] for row in found["backends"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"]
    assert found["torch"]["build"]
    assert found["cpu"]["cores"] >= 1


def test_an_nvidia_driver_is_read_from_its_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.95, NVIDIA H200, 143771 MiB, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("flashdip.engine.nvidia.cuda", lambda: "13.1")
    found = doctor.survey()
    assert found["nvidia"] == {
        "driver": "580.95",
        "cuda": "13.1",
        "gpus": [{"name": "NVIDIA H200", "memory": "143771 MiB", "compute_capability": "9.0"}],
    }
    assert found["cuda_majors"]["driver"] == 13


def test_onnxruntime_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libcublasLt.so.12 is missing')\n")
    information = "package_name = 'onnxruntime-gpu'\ncuda_version = '12.8'\n"
    (package / "capi" / "build_and_package_info.py").write_text(information)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    library = package / "capi" / "libonnxruntime_providers_tensorrt.so"
    library.write_bytes(b"\x7fELF\0libnvinfer.so.10\0libcudart.so.12\0")
    found = doctor.survey()
    assert found["cuda_majors"]["onnxruntime"] == 12
    assert found["onnxruntime"]["tensorrt"] == "10"
    assert "libcublasLt.so.12 is missing" in found["onnxruntime"]["error"]


def test_nothing_at_all_is_survived(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object, **named: object) -> Any:
        raise RuntimeError("[/broken] two\nlines")

    for name in ("_cpu_flags", "_cpu_model", "ask_nvidia"):
        monkeypatch.setattr(doctor, name, broken)
    for name in ("importlib.metadata.version", "os.sysconf", "platform.platform"):
        monkeypatch.setattr(name, broken)
    monkeypatch.setattr("flashdip.engine.backends.resolve_device", broken)
    monkeypatch.setattr("torch.accelerator.current_accelerator", broken)
    doctor.doctor(as_json=False)
    table = capsys.readouterr().out
    assert "[/broken] two lines" in table
    assert "no driver found" in table


def test_a_torch_that_cannot_be_imported_is_reported() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from flashdip.engine.doctor import doctor\ndoctor(as_json=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert "torch" in found["torch"]["error"]
    assert found["backends"][0]["available"] is False
    assert "torch cannot be imported" in found["warnings"][0]
