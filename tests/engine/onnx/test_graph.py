"""The builder: what its models compute, and what it keeps apart."""

import numpy as np
import onnxruntime
import pytest

from flashdip.engine.onnx.graph import OPSET, Array, Graph


def run(graph: Graph, **feeds: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(graph.model({"made": "here"}).SerializeToString())
    assert session.get_modelmeta().custom_metadata_map == {"made": "here"}
    found: list[Array] = session.run(None, feeds)
    return found


def test_arithmetic_is_numpys() -> None:
    """Numbers and arrays beside a value become constants of its type."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
    graph = Graph("arithmetic")
    value = graph.input("x", x.shape)
    y = (1 - value) * 2 + 3 / (value + 20) - value / 4 + -value
    graph.output(y, "y")
    graph.output(value @ np.eye(4)[:, :2], "product")
    found, product = run(graph, x=x)
    np.testing.assert_allclose(found, (1 - x) * 2 + 3 / (x + 20) - x / 4 - x, rtol=1e-6)
    np.testing.assert_array_equal(product, x[:, :2])
    assert (y.shape, y.dtype.name, y.size) == ((3, 4), "float32", 12)


def test_shapes_are_changed_as_numpy_changes_them() -> None:
    """Cut, padded, turned, summed; what changes nothing costs no node."""
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    graph = Graph("shapes")
    value = graph.input("x", x.shape)
    assert value.reshape(1, 2, 3, 4) is value.crop({2: (0, 3)}) is value.pad({1: (0, 0)}) is value
    assert not graph.nodes
    cases = {
        "crop": (value.crop({1: (1, 2), 3: (1, 3)}), x[:, 1:2, :, 1:3]),
        "step": (value.crop({3: (1, 4)}, 2), x[..., 1:4:2]),
        "zeros": (value.pad({2: (1, 2)}), np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 0)))),
        "edge": (value.pad({3: (1, 1)}, "edge"), np.pad(x, ((0, 0),) * 3 + ((1, 1),), "edge")),
        "turned": (value.transpose(3, 0, 2, 1), x.transpose(3, 0, 2, 1)),
        "sum": (value.sum((2, 3)), x.sum((2, 3), keepdims=True)),
        "mean": (value.mean((1,)), x.mean(1, keepdims=True)),
        "flat": (value.reshape(24), x.reshape(24)),
    }
    for name, (made, expected) in cases.items():
        assert made.shape == expected.shape
        graph.output(made, name)
    for found, (_, expected) in zip(run(graph, x=x), cases.values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_constants_are_held_once() -> None:
    """Unless they differ in shape, type or bits, or have a name."""
    graph = Graph("constants")
    one = graph.constant(np.array([1.0, 2.0], np.float32))
    assert graph.constant(np.array([1.0, 2.0], np.float32)) is one
    others = [
        graph.constant(np.array([[1.0, 2.0]], np.float32)),
        graph.constant(np.array([1.0, 2.0])),
        graph.constant(np.array([1.0, 2.5], np.float32)),
        graph.constant(np.array([1.0, 2.0], np.float32), "named"),
    ]
    assert len({value.name for value in (one, *others)}) == 5
    assert graph.constant(np.array(3.0)).shape == ()


def test_the_model_is_checked() -> None:
    """By ONNX, which knows what its operators take."""
    graph = Graph("wrong")
    x = graph.input("x", (2, 3))
    with pytest.raises(Exception, match="Incompatible dimensions"):
        graph.node("MatMul", x, x)
    graph.output(graph.node("Relu", x), "y")
    model = graph.model()
    assert [opset.version for opset in model.opset_import] == [OPSET]
    assert [value.name for value in model.graph.output] == ["y"]


def test_what_is_kept_at_once_follows_the_order_of_the_nodes() -> None:
    """Of two chains of four maps each two are there at a time, and what is handed out stays."""
    graph = Graph("chains")
    x = graph.input("x", (1, 100))
    first = x + 1
    last = first * 2  # first is not needed after it
    for _ in range(2):
        last = last + 1
    assert graph.kept_bytes() == 2 * 400
    graph.output(first, "first")
    graph.output(last, "last")
    assert graph.kept_bytes() == 3 * 400
