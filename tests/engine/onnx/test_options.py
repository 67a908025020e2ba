"""Options of providers: names that ONNX Runtime documents, and caches that cannot be mixed up."""

import stat
from pathlib import Path
from typing import Any

import pytest

from flashdip.engine.errors import ConfigError
from flashdip.engine.onnx import options as module
from flashdip.engine.onnx.options import Tuning, options
from flashdip.engine.onnx.providers import PROVIDERS
from tests.engine.onnx.documented import OPTIONS

FOUND = {
    "gpus": "NVIDIA H200 9.0",
    "device": "0 of all",
    "driver": "580",
    "tensorrt": "101303",
    "onnxruntime": "1.31.1",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU and TensorRT, as far as the caches ask."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "identity", lambda device: FOUND)
    return tmp_path / "flashdip"


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_name_is_documented(name: str, cache: Path) -> None:
    full = Tuning("bf16", cuda_graph=True, workspace=1 << 30, device=1)
    for tuning in (Tuning(), full):
        found = options(name, tuning, b"model")
        assert set(found) <= OPTIONS.get({"rocm": "migraphx"}.get(name, name), set())
        assert all(isinstance(value, str) for value in found.values())
    # ONNX Runtime's TensorRT provider takes these words alone for true and false.
    flags = {value for key, value in found.items() if key.endswith("_enable")}
    assert flags <= {"True", "False"}


def test_tensorrt_is_told_what_was_asked(cache: Path) -> None:
    plain = options("tensorrt", Tuning(), b"model")
    assert (plain["trt_fp16_enable"], plain["trt_bf16_enable"]) == ("False", "False")
    assert (plain["device_id"], plain["trt_cuda_graph_enable"]) == ("0", "False")
    assert "trt_max_workspace_size" not in plain
    half = options("tensorrt", Tuning("fp16", True, 1 << 28, 2), b"model")
    assert (half["trt_fp16_enable"], half["trt_bf16_enable"]) == ("True", "False")
    assert half["trt_max_workspace_size"] == "268435456"
    assert (half["device_id"], half["trt_cuda_graph_enable"]) == ("2", "True")


def test_cuda_rounds_to_tf32_only_if_narrower_types_will_do() -> None:
    assert options("cuda", Tuning(), b"")["use_tf32"] == "False"
    assert options("cuda", Tuning("fp16"), b"")["use_tf32"] == "True"


def test_another_model_has_other_engines_and_the_same_timings(cache: Path) -> None:
    first, second, again = (options("tensorrt", Tuning(), model) for model in (b"a", b"b", b"a"))
    assert first == again
    assert first["trt_engine_cache_path"] != second["trt_engine_cache_path"]
    assert first["trt_timing_cache_path"] == second["trt_timing_cache_path"]
    narrow = options("tensorrt", Tuning("fp16"), b"a")
    assert narrow["trt_engine_cache_path"] != first["trt_engine_cache_path"]
    for key in ("trt_engine_cache_path", "trt_timing_cache_path"):
        folder = Path(first[key])
        assert folder.is_dir()
        assert folder.is_relative_to(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("changed", FOUND)
def test_another_machine_or_version_has_another_cache(
    changed: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = options("tensorrt", Tuning(), b"a")
    monkeypatch.setattr(module, "identity", lambda device: FOUND | {changed: "another"})
    after = options("tensorrt", Tuning(), b"a")
    for key in ("trt_engine_cache_path", "trt_timing_cache_path"):
        assert before[key] != after[key]


def test_nothing_is_kept_where_it_is_unknown_what_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "identity", lambda device: None)
    assert not [key for key in options("tensorrt", Tuning(), b"a") if "cache" in key]


def test_a_cache_that_cannot_be_used_costs_time_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "file"))
    assert not [key for key in options("tensorrt", Tuning(), b"a") if "cache" in key]


def test_what_caches_hold_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def getInferLibVersion() -> int:
            return 101303

    gpu = {"name": "NVIDIA H200", "compute_capability": "9.0"}
    monkeypatch.setattr("flashdip.engine.nvidia.survey", lambda: {"driver": "580", "gpus": [gpu]})
    monkeypatch.setattr("ctypes.CDLL", lambda name: Library)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.31.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module.identity(0) == FOUND
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert module.identity(0) == FOUND | {"device": "0 of 1,0"}
    monkeypatch.setattr("flashdip.engine.nvidia.survey", lambda: None)
    assert module.identity(0) is None


@pytest.mark.parametrize("wrong", [{"precision": "int8"}, {"device": -1}, {"workspace": 0}])
def test_wrong_tuning_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected .*got"):
        Tuning(**wrong)
