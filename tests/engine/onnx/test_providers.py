"""Providers: nothing runs on the CPU unasked, and what is missing is named with its remedy."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from onnx import TensorProto, helper

from flashdip.engine.errors import ConfigError, FlashDIPError, InputError, UnavailableError
from flashdip.engine.onnx import providers
from flashdip.engine.onnx.providers import PROVIDERS, load_error, missing, nodes, open_session


@pytest.fixture(scope="module")
def model() -> bytes:
    """Two nodes."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
    made = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Sigmoid", ["h"], ["y"])]
    graph = helper.make_graph(made, "two", [x], [y])
    opsets = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def silent(line: str) -> None:
    raise AssertionError(line)


def test_the_cpu_runs_what_it_is_asked_for(model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    path.write_bytes(model)
    for source in (model, path):
        session = open_session(source, ["cpu"], tell=silent)
        assert session.get_providers() == ["CPUExecutionProvider"]
        assert nodes(session) == {"cpu": 2}


def test_the_names_are_those_of_onnx_runtime() -> None:
    known = set(onnxruntime.get_all_providers())
    assert {provider.name for provider in PROVIDERS.values()} <= known


@pytest.mark.parametrize(
    ("names", "word"),
    [([], "none"), (["gpu"], "'gpu'"), (["cpu", " CPU"], "cpu, cpu"), (["rocm", "migraphx"], "r")],
)
def test_wrong_names_are_refused(model: bytes, names: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=r"provider: expected .* got") as caught:
        open_session(model, names)
    assert word in str(caught.value).rpartition("got")[2]


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_that_this_package_lacks(model: bytes, name: str) -> None:
    """By name it is an error, alone and beside the CPU; unasked nothing is said of it."""
    if PROVIDERS[name].name in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {name}")
    for names in ([name], [name, "cpu"]):
        with pytest.raises(UnavailableError, match="built without it") as caught:
            open_session(model, names)
        message = str(caught.value)
        assert message.startswith(f"provider {name}: ")
        assert "(it has cpu): pip " in message
        assert PROVIDERS[name].packages in message
    assert nodes(open_session(model, tell=silent)) == {"cpu": 2}


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let ONNX Runtime claim providers that it has not, as its GPU packages do without CUDA."""
    claimed = [PROVIDERS[name].name for name in names]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: claimed)


def test_a_library_that_cannot_be_loaded(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name it is an error; unasked it is told, and the CPU runs the model."""
    pretend(monkeypatch, "cuda", "cpu")
    monkeypatch.setattr(providers, "load_error", lambda *where: "libcublasLt.so.13: not found")
    for names in (["cuda"], ["cuda", "cpu"]):
        with pytest.raises(UnavailableError, match=r"provider cuda: .*libcublasLt.so.13") as caught:
            open_session(model, names)
        assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(caught.value)
    told: list[str] = []
    assert nodes(open_session(model, tell=told.append)) == {"cpu": 2}
    assert len(told) == 1
    assert told[0].startswith("provider cuda is left out: it cannot be loaded (libcublasLt.so.13")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_loads_but_does_not_start(
    model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime then leaves it out; here that is an error, and never the CPU alone."""
    pretend(monkeypatch, "cuda", "cpu")
    monkeypatch.setattr(providers, "load_error", lambda *where: None)
    with pytest.raises(UnavailableError, match=r"nodes left for the CPU.*--provider cuda,cpu"):
        open_session(model, ["cuda"])
    with pytest.raises(UnavailableError, match=r"could not start.*is there a device"):
        open_session(model, ["cuda", "cpu"])
    told: list[str] = []
    assert nodes(open_session(model, tell=told.append)) == {"cpu": 2}
    assert told == ["provider cuda is left out: ONNX Runtime could not start it"]


def test_why_a_library_cannot_be_loaded(tmp_path: Path) -> None:
    own = Path(str(onnxruntime.__file__)).parent / "capi"
    shared = "libonnxruntime_providers_shared.so"
    (tmp_path / shared).symlink_to(own / shared)
    assert "cannot open shared object" in str(load_error(tmp_path, "cuda"))
    (tmp_path / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    assert "libonnxruntime_providers_cuda.so" in str(load_error(tmp_path, "cuda"))
    (tmp_path / "libonnxruntime_providers_fine.so").symlink_to(own / shared)
    assert load_error(tmp_path, "fine") is None


@pytest.mark.parametrize("wrong", [b"", b"no model"])
def test_what_is_no_model_is_refused(wrong: bytes) -> None:
    with pytest.raises(InputError, match="model: expected one that ONNX Runtime can load"):
        open_session(wrong, ["cpu"])


def test_onnx_runtime_that_is_not_there(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnavailableError, match="pip install onnxruntime"):
        open_session(model)


def test_all_packages_of_one_name_go_before_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They overwrite each other's files, so that what is left of two is neither."""
    runtime = SimpleNamespace(
        __version__="1", get_available_providers=lambda: ["CPUExecutionProvider"]
    )
    monkeypatch.setattr(providers, "load", lambda: runtime)
    for held, start in (
        (["onnxruntime-gpu"], "pip install 'onnxruntime-gpu"),
        (["onnxruntime", "onnxruntime-gpu"], "pip uninstall onnxruntime onnxruntime-gpu && pip"),
    ):
        found: dict[str, Any] = {"onnxruntime": held}
        monkeypatch.setattr("importlib.metadata.packages_distributions", lambda found=found: found)
        assert f": {start}" in str(missing("cuda"))


def test_errors_are_one_line(model: bytes) -> None:
    for names in (["tensorrt"], ["nothing\nlike it"]):
        with pytest.raises(FlashDIPError) as caught:
            open_session(model, names)
        assert str(caught.value).isprintable()
