"""The doctor's part about ONNX Runtime: it shows what is there, and outlives what crashes."""

import json
import sys
from typing import Any

import onnxruntime
import pytest

from flashdip.engine.onnx import doctor


def found(**runtime: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"packages": {"onnxruntime-gpu": "1.31.1"}, "version": "1.31.1"}
    base |= {"error": None}
    base |= {"providers": [], "cuda": "13.0", "tensorrt": "10"}
    majors = {"driver": 12, "onnxruntime": 13}
    return {"onnxruntime": base | runtime, "tensorrt": {}, "cuda_majors": majors}


def test_what_is_here_is_found() -> None:
    here = json.loads(json.dumps(doctor.survey()))
    assert here["error"] is None
    assert here["version"] == onnxruntime.__version__
    assert here["version"] in here["packages"].values()
    assert {"name": "cpu", "reason": None} in here["providers"]
    assert doctor.tensorrt() == {} or all(key.isdecimal() for key in doctor.tensorrt())


def test_rows_for_people() -> None:
    providers = [{"name": "cuda", "reason": "no libcublas: pip"}, {"name": "cpu", "reason": None}]
    rows = doctor.lines(found(providers=providers))
    assert rows == [
        ("onnxruntime", "1.31.1, from onnxruntime-gpu"),
        ("", "cuda: cannot: no libcublas: pip"),
        ("", "cpu: can run"),
        ("CUDA", "driver 12, torch none, onnxruntime 13, tensorrt none"),
    ]
    broken = doctor.lines(found(error="not installed: pip install onnxruntime", providers=[]))
    assert broken[0] == ("onnxruntime", "cannot be used: not installed: pip install onnxruntime")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with -11"),
        ("raise OSError('libcudart.so.13 is missing')", "libcudart.so.13 is missing"),
        ("print('no answer')", "Expecting value"),
        ("import time; time.sleep(60)", "timed out"),
    ],
)
def test_a_crash_is_reported(monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    """Providers run in a process of their own, which may die, hang or babble."""
    monkeypatch.setattr(doctor, "_PROBE", script)
    monkeypatch.setattr(doctor, "_SECONDS", 2)
    here = doctor.survey()
    assert words in here["error"]
    assert here["packages"]


def test_nothing_at_all_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    here = doctor.survey()
    assert (here["error"], here["cuda"]) == ("not installed: pip install onnxruntime", None)
