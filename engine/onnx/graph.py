"""A small builder of ONNX graphs, over `onnx.helper`: values that know their shape.

    graph = Graph("double")
    x = graph.input("x", (1, 3, 8, 8))
    graph.output(graph.node("Relu", 2 * x + 1), "y")
    model = graph.model()

Only operators of the standard domain are used, in a version that TensorRT, ONNX Runtime and its
build for browsers all have. Shapes are fixed and follow from ONNX's own inference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TypeProto

# Reductions take their axes as an input from 18 on; later versions add nothing that is used here.
OPSET = 18
IR_VERSION = 9  # of the file format; read by every runtime of the last years

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that the graph computes, takes or holds.

    Numbers and arrays beside it in arithmetic become constants of its type.

    Attributes:
        graph: Where it belongs.
        name: Unique in the graph.
        shape: Fixed.
        dtype: NumPy's name for its type.
    """

    graph: "Graph"
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __add__(self, other: "Value | float | Array") -> "Value":
        return self.graph.node("Add", self, self.like(other))

    def __radd__(self, other: float) -> "Value":
        return self.graph.node("Add", self.like(other), self)

    def __sub__(self, other: "Value | float | Array") -> "Value":
        return self.graph.node("Sub", self, self.like(other))

    def __rsub__(self, other: float) -> "Value":
        return self.graph.node("Sub", self.like(other), self)

    def __mul__(self, other: "Value | float | Array") -> "Value":
        return self.graph.node("Mul", self, self.like(other))

    def __rmul__(self, other: float) -> "Value":
        return self.graph.node("Mul", self.like(other), self)

    def __truediv__(self, other: "Value | float | Array") -> "Value":
        return self.graph.node("Div", self, self.like(other))

    def __rtruediv__(self, other: float) -> "Value":
        return self.graph.node("Div", self.like(other), self)

    def __mod__(self, other: "Value | float | Array") -> "Value":
        return self.graph.node("Mod", self, self.like(other))

    def __matmul__(self, other: "Value | Array") -> "Value":
        return self.graph.node("MatMul", self, self.like(other))

    def __neg__(self) -> "Value":
        return self.graph.node("Neg", self)

    def like(self, other: "Value | float | Array") -> "Value":
        """Return a number or an array as a constant of this type; values as they are."""
        if isinstance(other, Value):
            return other
        return self.graph.constant(np.asarray(other, dtype=self.dtype))

    def reshape(self, *shape: int) -> "Value":
        """Return the same elements in another shape, all of whose sides are given."""
        if shape == self.shape:
            return self
        return self.graph.node("Reshape", self, self.graph.indices(shape))

    def transpose(self, *axes: int) -> "Value":
        """Return the axes in another order."""
        return self.graph.node("Transpose", self, perm=axes)

    def sum(self, axes: Sequence[int]) -> "Value":
        """Sum over axes, which stay with length 1."""
        return self.graph.node("ReduceSum", self, self.graph.indices(axes))

    def mean(self, axes: Sequence[int]) -> "Value":
        """Average over axes, which stay with length 1."""
        return self.graph.node("ReduceMean", self, self.graph.indices(axes))

    def crop(self, axes: Mapping[int, tuple[int, int]], step: int = 1) -> "Value":
        """Cut out what lies from a start up to an end along some axes, each `step`-th element."""
        if step == 1 and all(span == (0, self.shape[axis]) for axis, span in axes.items()):
            return self
        starts, ends = zip(*axes.values(), strict=True)
        steps = (step,) * len(axes)
        parts = [self.graph.indices(part) for part in (starts, ends, tuple(axes), steps)]
        return self.graph.node("Slice", self, *parts)

    def pad(self, axes: Mapping[int, tuple[int, int]], mode: str = "constant") -> "Value":
        """Add elements before and behind along some axes.

        They are zeros ("constant"), or its own: the outermost ones again and again ("edge"), or
        what a mirror in the outermost ones shows ("reflect").
        """
        if not any(map(any, axes.values())):
            return self
        before, behind = (
            [axes.get(i, (0, 0))[end] for i in range(len(self.shape))] for end in (0, 1)
        )
        return self.graph.node("Pad", self, self.graph.indices([*before, *behind]), mode=mode)


class Graph:
    """Nodes in order, with the constants, inputs and outputs around them.

    Args:
        name: Of the graph, for whoever looks into the file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[NodeProto] = []
        self._inputs: list[Value] = []
        self._outputs: dict[str, str] = {}  # from a value's own name to what it is called outside
        self._initializers: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._types: dict[str, TypeProto] = {}

    def input(self, name: str, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Value:
        """Declare what is handed in."""
        value = self._value(name, shape, dtype)
        self._inputs.append(value)
        return value

    def default(self, name: str, array: Array) -> Value:
        """Declare what may be handed in; left out, it is this array."""
        value = self.constant(array, name)
        self._inputs.append(value)
        return value

    def constant(self, array: Array, name: str | None = None) -> Value:
        """Hold an array in the graph; equal ones without a name are held once."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if name is None and key in self._constants:
            return self._constants[key]
        name = name or f"c{len(self._initializers)}"
        value = self._value(name, array.shape, array.dtype)
        self._initializers[name] = numpy_helper.from_array(array, name)
        self._constants.setdefault(key, value)
        return value

    def indices(self, values: Iterable[int]) -> Value:
        """Hold whole numbers, as shapes and positions are given: [n] int64."""
        return self.constant(np.array(list(values), np.int64))

    def node(self, op: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Append an operation with one result; None stands for an input that is left out."""
        return self.nodes_of(op, 1, *inputs, **attributes)[0]

    def nodes_of(
        self, op: str, count: int, *inputs: Value | None, **attributes: Any
    ) -> tuple[Value, ...]:
        """Append an operation with `count` results."""
        from onnx import defs, helper, shape_inference

        index = len(self.nodes)
        names = ["" if value is None else value.name for value in inputs]
        outputs = [f"v{index}" if count == 1 else f"v{index}_{i}" for i in range(count)]
        node = helper.make_node(op, names, outputs, name=f"{op}_{index}", **attributes)
        known = {name: self._types[name] for name in names if name}
        # Only what shapes may depend on: inference copies it.
        data = {
            value.name: self._initializers[value.name]
            for value in inputs
            if value and len(value.shape) < 2 and value.name in self._initializers
        }
        found = shape_inference.infer_node_outputs(
            defs.get_schema(op, OPSET), node, known, data, opset_imports=[_opset()]
        )
        self.nodes.append(node)
        return tuple(self._typed(name, found[name]) for name in outputs)

    def output(self, value: Value, name: str) -> None:
        """Hand a computed value out under a name; each value once."""
        assert value.name not in self._outputs and value.name not in self._initializers
        assert all(value is not given for given in self._inputs)
        self._outputs[value.name] = name

    def kept_bytes(self) -> int:
        """Return the most bytes of computed values that are needed at once, nodes in their order.

        Asked before `model`, which gives outputs their outer names.
        """
        last = {name: at for at, node in enumerate(self.nodes) for name in node.input}
        last |= dict.fromkeys(self._outputs, len(self.nodes))
        ends: dict[int, int] = {}  # bytes that are free after a node
        kept = most = 0
        for at, node in enumerate(self.nodes):
            for name in node.output:
                size = self._bytes(name)
                kept += size
                free = last.get(name, at)
                ends[free] = ends.get(free, 0) + size
            most = max(most, kept)
            kept -= ends.get(at, 0)
        return most

    def _bytes(self, name: str) -> int:
        from onnx import helper

        kind = self._types[name].tensor_type
        sides = [side.dim_value for side in kind.shape.dim]
        width = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        return int(np.prod(sides, dtype=np.int64)) * width

    def model(self, metadata: Mapping[str, str] | None = None) -> "ModelProto":
        """Return the checked model: nodes, constants, and notes about it by name."""
        from onnx import checker, helper

        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = self._outputs.get(name, name)
        inputs, outputs = (
            [helper.make_value_info(outside, self._types[inside]) for inside, outside in pairs]
            for pairs in (((v.name, v.name) for v in self._inputs), self._outputs.items())
        )
        used = {name for node in self.nodes for name in node.input}
        constants = [tensor for name, tensor in self._initializers.items() if name in used]
        graph = helper.make_graph(self.nodes, self.name, inputs, outputs, constants)
        model = helper.make_model(
            graph, opset_imports=[_opset()], ir_version=IR_VERSION, producer_name="flashdip"
        )
        helper.set_model_props(model, dict(metadata or {}))
        checker.check_model(model)
        return model

    def _value(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> Value:
        from onnx import helper

        assert name not in self._types
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self._typed(name, helper.make_tensor_type_proto(kind, shape))

    def _typed(self, name: str, kind: "TypeProto") -> Value:
        from onnx import helper

        self._types[name] = kind
        sides = kind.tensor_type.shape.dim
        assert all(side.HasField("dim_value") for side in sides), f"{name}: no fixed shape"
        dtype = helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
        return Value(self, name, tuple(side.dim_value for side in sides), np.dtype(dtype))


def _opset() -> "OperatorSetIdProto":
    from onnx import helper

    return helper.make_opsetid("", OPSET)
