"""Draw the picture of an exported model, which may come from anywhere.

What is handed to ONNX Runtime has been looked through: a model that was exported by FlashDIP, with
fixed shapes of limited size, and without data outside its folder.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashdip.engine.errors import InputError
from flashdip.engine.files import one_line
from flashdip.engine.images import MAX_PIXELS
from flashdip.engine.onnx import providers
from flashdip.engine.picture import Picture

if TYPE_CHECKING:
    from onnx import ModelProto

# Operators of exported models; none of them loops, branches, or reads a file.
OPERATORS = frozenset(
    {"AveragePool", "Cast", "Concat", "Conv", "Elu", "InstanceNormalization", "LeakyRelu"}
    | {"MatMul", "MaxPool", "Mul", "Pad", "Resize", "Sigmoid", "Slice"}
)
MAX_BYTES = 1 << 30  # of the file and its external data together
MAX_NODES = 10_000
MAX_ELEMENTS = 1 << 31  # of any tensor on the way


def load(path: Path, *, max_pixels: int = MAX_PIXELS) -> "tuple[bytes, dict[str, str]]":
    """Read a model and look it through.

    Args:
        path: The file.
        max_pixels: The most that the picture may have.

    Returns:
        The model with all its data in it, and its notes by name.

    Raises:
        InputError: It cannot be read, was not exported by FlashDIP, is too large, or has data
            outside its folder.
    """
    onnx = providers.load("onnx")
    name = one_line(path)
    try:
        if not path.is_file():
            raise InputError("there is no such file")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"expected at most {MAX_BYTES} bytes, got {path.stat().st_size}")
        model = onnx.load(path, load_external_data=False)
        notes = {entry.key: entry.value for entry in model.metadata_props}
        _check_graph(model, notes)
        _check_external(model, path.parent)
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
        _check_shapes(model, max_pixels)
        return bytes(model.SerializeToString()), notes
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except Exception as error:  # the errors of protobuf and onnx have no base but this
        raise InputError(f"{name}: expected an ONNX model, got {one_line(error)}") from None


def picture(drawn: np.ndarray[Any, Any], notes: dict[str, str]) -> Picture:
    """Return what a model drew, [C, H, W], as a picture of the depth and range that its notes tell.

    Raises:
        InputError: They tell no depth or range that a picture can have.
    """
    pixels = np.ascontiguousarray(drawn.transpose(1, 2, 0), np.float32)
    if not np.isfinite(pixels).all():
        raise InputError("model: expected finite numbers from it, got NaN or infinity")
    try:
        dress = json.loads(notes["picture"])
        dtype, low, high = dress["dtype"], float(dress["low"]), float(dress["high"])
        known = dtype in ("uint8", "uint16", "float32")
        if not known or not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("neither depth nor range")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"model: expected depth and range of its picture in its notes, got {one_line(error)}"
        ) from None
    return Picture(pixels, dtype=dtype, low=low, high=high)


def _check_external(model: "ModelProto", folder: Path) -> None:
    """Refuse data in files that do not lie in the model's folder, links followed."""
    from onnx import TensorProto

    total, inside = 0, folder.resolve()
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        found = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        target = (folder / found.replace("\0", "")).resolve()
        if not found or "\0" in found or not target.is_relative_to(inside):
            raise InputError(
                f"expected its data in its own folder, got {one_line(found)!r}: a model must not "
                "read other files"
            )
        if not target.is_file():
            raise InputError(f"expected its data in {one_line(found)!r}, got no such file")
        total += target.stat().st_size
        if total > MAX_BYTES:
            raise InputError(f"expected at most {MAX_BYTES} bytes of external data, got more")


def _check_graph(model: "ModelProto", notes: dict[str, str]) -> None:
    """Refuse what `flashdip export` does not write; tensors are then among the initializers."""
    from onnx import AttributeProto

    graph = model.graph
    if "flashdip" not in notes or [output.name for output in graph.output] != ["image"]:
        raise InputError("expected a model written by flashdip export, got another one")
    if len(graph.node) > MAX_NODES:
        raise InputError(f"expected at most {MAX_NODES} nodes, got {len(graph.node)}")
    domains = {opset.domain for opset in model.opset_import} | {n.domain for n in graph.node}
    if domains - {"", "ai.onnx"} or model.functions or graph.sparse_initializer:
        raise InputError("expected operators of the standard domain alone, got others")
    unknown = sorted({node.op_type for node in graph.node} - OPERATORS)
    if unknown:
        raise InputError(
            f"expected operators of exported networks, got {one_line(', '.join(unknown))}"
        )
    held = {tensor.name for tensor in graph.initializer}
    if any(value.name not in held for value in graph.input):
        raise InputError("expected an input with a default, got one that must be given")
    plain = {AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.STRING}
    if any(attribute.type not in plain for node in graph.node for attribute in node.attribute):
        raise InputError("expected numbers and words as attributes, got tensors or graphs")


def _check_shapes(model: "ModelProto", max_pixels: int) -> None:
    """Refuse tensors of open or enormous shape, and pictures that are too large."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, check_type=True, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.output):
        sides = value.type.tensor_type.shape.dim
        if all(side.HasField("dim_value") for side in sides):
            shapes[value.name] = [side.dim_value for side in sides]
    for node in graph.node:
        for name in node.output:
            shape = shapes.get(name)
            if shape is None or min(shape, default=1) < 1 or math.prod(shape) > MAX_ELEMENTS:
                raise InputError(
                    f"expected tensors of fixed shape and at most {MAX_ELEMENTS} elements, got "
                    f"{one_line(name)} of shape {'unknown' if shape is None else shape}"
                )
    image = shapes["image"]
    if len(image) != 4 or image[0] != 1:
        raise InputError(f"expected an image of shape [1, C, H, W], got {image}")
    if image[2] * image[3] > max_pixels:
        raise InputError(
            f"expected at most {max_pixels} pixels, got {image[3]}x{image[2]}: raise --max-pixels"
        )
