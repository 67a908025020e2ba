"""Models from anywhere: what `render` draws, and what it refuses before anything runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from flashdip.engine.errors import InputError
from flashdip.engine.onnx import render
from flashdip.engine.onnx.export import export
from tests.engine.onnx.fitted import fitted

Change = Callable[[ModelProto], object]


@pytest.fixture(scope="module")
def exported() -> bytes:
    return export(fitted(), steps=None).model


def write(path: Path, model: ModelProto | bytes) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def test_a_model_is_read_with_its_notes(exported: bytes, tmp_path: Path) -> None:
    content, notes = render.load(write(tmp_path / "m.onnx", exported))
    assert onnx.load_from_string(content) == onnx.load_from_string(exported)
    assert notes["preset"] == "quick"


def node(op: str, domain: str = "") -> Change:
    return lambda model: model.graph.node.append(helper.make_node(op, ["z"], ["q"], domain=domain))


def rename(model: ModelProto) -> None:
    for index, entry in enumerate(model.metadata_props):
        if entry.key == "flashdip":
            del model.metadata_props[index]


def demand(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))


def free(model: ModelProto) -> None:
    """Leave the size of z open."""
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    del model.graph.initializer[0]


def enlarge(times: float) -> Change:
    """Blow the result up, by scales that a small file holds."""

    def change(model: ModelProto) -> None:
        last = model.graph.node[-1]
        last.output[0] = "small"
        scales = np.array([1, 1, times, times], np.float32)
        model.graph.initializer.append(numpy_helper.from_array(scales, "times"))
        big = helper.make_node("Resize", ["small", "", "times"], ["image"], mode="nearest")
        model.graph.node.append(big)
        del model.graph.output[0].type.tensor_type.shape.dim[:]
        for _ in range(4):
            model.graph.output[0].type.tensor_type.shape.dim.add()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (node("Loop"), "operators of exported networks, got Loop"),
        (node("RandomNormalLike"), "got RandomNormalLike"),
        (node("FusedConv", "com.microsoft"), "standard domain alone"),
        (rename, "written by flashdip export, got another one"),
        (demand, "an input with a default"),
        (free, "an input with a default"),
        (enlarge(500), "pixels, got 15500x12000: raise --max-pixels"),
        (enlarge(100000), "at most 2147483648 elements"),
        (lambda model: model.graph.node.extend([model.graph.node[0]] * 10_001), "10000 nodes"),
        (lambda model: model.graph.output[0].Clear(), "written by flashdip export"),
        (lambda model: model.functions.add(name="f"), "standard domain alone"),
    ],
)
def test_other_models_are_refused(
    exported: bytes, tmp_path: Path, change: Change, words: str
) -> None:
    model = onnx.load_from_string(exported)
    change(model)
    with pytest.raises(InputError) as caught:
        render.load(write(tmp_path / "m.onnx", model))
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(tmp_path / "m.onnx"))
    assert message.isprintable()


def test_data_beside_the_model_is_read_into_it(exported: bytes, tmp_path: Path) -> None:
    model = onnx.load_from_string(exported)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=64)
    content, _ = render.load(path)
    (tmp_path / "m.bin").unlink()
    assert onnx.load_from_string(content).graph.node == model.graph.node
    assert numpy_helper.to_array(onnx.load_from_string(content).graph.initializer[0]).any()
    with pytest.raises(InputError, match=r"'m\.bin', got no such file"):
        render.load(path)


@pytest.mark.parametrize("where", ["../secret.bin", "{}/secret.bin", "link.bin", "", "a\0b"])
def test_data_elsewhere_is_refused(exported: bytes, tmp_path: Path, where: str) -> None:
    """By a relative path, an absolute one, and a link."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load_from_string(exported)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=where.format(tmp_path))
    with pytest.raises(InputError, match="expected its data in its own folder, got"):
        render.load(write(folder / "m.onnx", model))


def test_tensors_and_graphs_in_attributes_are_refused(exported: bytes, tmp_path: Path) -> None:
    """There, too, data could lie elsewhere."""
    tensor = TensorProto(data_type=1, dims=[4], name="t", data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    graph = helper.make_graph([], "inner", [], [], [tensor])
    for hidden in (tensor, graph, [tensor], [graph]):
        model = onnx.load_from_string(exported)
        model.graph.node[0].attribute.append(helper.make_attribute("value", hidden))
        with pytest.raises(InputError, match="got tensors or graphs"):
            render.load(write(tmp_path / "m.onnx", model))
    model = onnx.load_from_string(exported)
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    with pytest.raises(InputError, match="standard domain alone"):
        render.load(write(tmp_path / "m.onnx", model))


def test_what_is_too_large_is_refused(
    exported: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file before it is read, its data before they are."""
    path = tmp_path / "m.onnx"
    model = onnx.load_from_string(exported)
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=64)
    monkeypatch.setattr(render, "MAX_BYTES", (tmp_path / "m.bin").stat().st_size - 1)
    with pytest.raises(InputError, match="bytes of external data"):
        render.load(path)
    monkeypatch.setattr(render, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"expected at most .* bytes, got"):
        render.load(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"{}", bytes(1000)])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "m.onnx", content)
    with pytest.raises(InputError, match=r"expected an ONNX model|written by flashdip export"):
        render.load(path)
    for nothing in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(InputError, match="no such file"):
            render.load(nothing)


def test_the_picture_has_the_depth_of_the_input() -> None:
    drawn = np.full((1, 2, 3), 0.5, np.float32)
    dress = {"dtype": "uint16", "low": 0, "high": 65535}
    found = render.picture(drawn, {"picture": json.dumps(dress)})
    assert (found.dtype, found.high, found.pixels.shape) == ("uint16", 65535, (2, 3, 1))


@pytest.mark.parametrize(
    "dress",
    [
        "{}",
        "no json",
        '{"dtype": "uint8", "low": 0, "high": NaN}',
        '{"dtype": "uint8", "low": 1, "high": 0}',
        '{"dtype": "object", "low": 0, "high": 1}',
        "[]",
    ],
)
def test_a_picture_of_no_depth_is_refused(dress: str) -> None:
    with pytest.raises(InputError, match="depth and range"):
        render.picture(np.zeros((1, 2, 3), np.float32), {"picture": dress})
    with pytest.raises(InputError, match="NaN or infinity"):
        render.picture(np.full((1, 2, 3), np.nan, np.float32), {"picture": dress})
