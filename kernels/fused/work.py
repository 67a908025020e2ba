"""What each program of a launch does: its control flow, followed on paper.

A kernel's loops and branches depend on little: which program this is, and the sizes. So the scalar
part of Triton's intermediate code is computed here for all programs at once, and says how often
each program goes round each loop; tensors are counted, not computed.

A branch that depends on an arrival counter (`device.last_to_arrive`) is taken by one in so many
programs, no telling which. What stands in it is also the launch's tail: the very last program does
it when all others are done. What depends on memory in any other way is taken once.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashdip.kernels.fused.mlir import Operation, Shape, main_loops, operands, parse

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Work:
    """What programs do, [programs] each.

    Attributes:
        turns: How often each program goes round each main loop, by the loop's place in the text.
        macs: Multiply-adds of each main loop, all turns together.
        straight: Multiply-adds outside main loops.
        elements: Operations on elements outside main loops.
        bytes: Loaded and stored outside main loops.
        rounds: Times that a program waits for memory outside main loops.
        sums: Sums over an axis outside main loops: a program's warps meet there.
        tail: Waits for memory, one after the other, when all programs but one are done.
    """

    turns: list[Array]
    macs: list[Array]
    straight: Array
    elements: Array
    bytes: Array
    rounds: Array
    sums: Array
    tail: float = 0.0

    @classmethod
    def none(cls, programs: int, loops: int) -> "Work":
        """Return no work yet."""
        turns, macs = ([np.zeros(programs) for _ in range(loops)] for _ in range(2))
        straight, elements, bytes, rounds, sums = np.zeros([5, programs])
        return cls(turns, macs, straight, elements, bytes, rounds, sums)


# A scalar is an integer for each program, an array of [programs] or []; or one of these, or None,
# which stands for whatever is not known.
_CHANGES = object()  # other at each turn of the loop around it
_ARRIVED = object()  # how many programs came before


class _Share(NamedTuple):
    """A condition that holds in one out of so many programs, no telling which."""

    share: Array


class _Changes(Exception):
    """A branch or loop depends on the turn of the loop around it."""


class _State(NamedTuple):
    """How often a place is come by.

    Attributes:
        weight: By each program, [programs].
        tail: By the last program when all others are done.
        main: The main loop that this is in.
    """

    weight: Array
    tail: float = 0.0
    main: int | None = None


_INTEGER: dict[str, Callable[..., Array]] = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "minui": np.minimum,
    "maxui": np.maximum,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "xori": np.bitwise_xor,
    "shli": np.left_shift,
    "shrsi": np.right_shift,
    "shrui": np.right_shift,
    "divsi": lambda a, b: _divide(a, b),
    "divui": lambda a, b: _divide(a, b),
    "remsi": lambda a, b: a - b * _divide(a, b),
    "remui": lambda a, b: a - b * _divide(a, b),
    "select": np.where,
    "extsi": np.copy,
    "extui": np.copy,
    "trunci": np.copy,
    "index_cast": np.copy,
}
_COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "slt": np.less,
    "sle": np.less_equal,
    "sgt": np.greater,
    "sge": np.greater_equal,
    "ult": np.less,
    "ule": np.less_equal,
    "ugt": np.greater,
    "uge": np.greater_equal,
}
VECTOR = 4  # elements, typically, that share a load and an address
_FREE = (
    "constant", "splat", "expand_dims", "broadcast", "reshape", "make_range", "trans", "join",
    "split",
)  # fmt: skip
_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "i32": 4, "i64": 8, "i1": 1, "i8": 1, "f64": 8, "i16": 2}


def follow(ttir: str, grid: tuple[int, int, int], arguments: list[Any]) -> Work:
    """Follow all programs of a launch.

    Args:
        ttir: Triton's intermediate code, before it is cut for a GPU.
        grid: Programs along each axis.
        arguments: Of the compiled function, in order; only integers matter.
    """
    return _Follower(parse(ttir), grid).run(arguments)


class _Follower:
    def __init__(self, function: Operation, grid: tuple[int, int, int]) -> None:
        programs = math.prod(grid)
        index = np.arange(programs)
        self.ids = {
            "x": index % grid[0],
            "y": index // grid[0] % grid[1],
            "z": index // (grid[0] * grid[1]),
        }
        self.counts = dict(zip("xyz", grid, strict=True))
        self.function = function
        self.main = {id(loop): i for i, loop in enumerate(main_loops(function))}
        self.values: dict[str, Any] = {}
        self.work = Work.none(programs, len(self.main))

    def run(self, arguments: list[Any]) -> Work:
        names = operands(self.function.text.split(" attributes ")[0])
        for name, value in zip(names, arguments, strict=True):
            self.values[name] = np.asarray(value) if isinstance(value, int) else None
        self._region(self.function.regions[0], _State(np.ones_like(self.work.straight)))
        return self.work

    def _region(self, region: list[Operation], state: _State) -> list[Any]:
        """Follow a region; return what it yields."""
        if state.main is None and any(o.name == "tt.load" for o in region):
            self._wait(state)
        yields: list[Any] = []
        for operation in region:
            match operation.name:
                case "scf.for":
                    self._loop(operation, state)
                case "scf.while":
                    self._region(operation.regions[-1], state)  # who knows how often: once
                case "scf.if":
                    self._branch(operation, state)
                case "scf.yield":
                    yields = [self._get(o) for o in operands(operation.text)]
                case _:
                    self._simple(operation, state)
        return yields

    def _loop(self, loop: Operation, state: _State) -> None:
        head, _, carried = loop.text.partition(" iter_args(")
        counter, low, high, step = operands(head)[:4]
        pairs = operands(carried.split(") ->")[0])
        names, values = pairs[::2], [self._get(o) for o in pairs[1::2]]
        start, end, stride = (self._get(o) for o in (low, high, step))
        if any(v is _CHANGES for v in (start, end, stride)):
            raise _Changes
        known = all(isinstance(v, np.ndarray) for v in (start, end, stride))
        turns = np.maximum(0, -((start - end) // stride)) if known else np.asarray(1)
        main = self.main.get(id(loop), state.main)
        most = int(np.max(turns, initial=0))
        inner = _State(state.weight * turns, state.tail * most, main)
        if id(loop) in self.main:
            self.work.turns[self.main[id(loop)]] += inner.weight
        before = copy.deepcopy(self.work)
        self.values |= dict.fromkeys([counter, *names], _CHANGES)
        try:
            self._region(loop.regions[0], inner)
            values = [None] * len(values)
        except _Changes:  # then turn by turn
            self.work = before
            for turn in range(most):
                self.values |= zip(names, values, strict=True)
                self.values[counter] = np.asarray(start + turn * stride)
                here = _State(state.weight * (turn < turns), state.tail, main)
                values = self._region(loop.regions[0], here)
        self._set(loop, values)

    def _branch(self, branch: Operation, state: _State) -> None:
        condition = self._get(operands(branch.text)[0])
        if condition is _CHANGES:
            raise _Changes
        known = isinstance(condition, np.ndarray)
        if known:
            share, tail = condition != 0, state.tail
        else:
            counted = isinstance(condition, _Share)
            share = condition.share if counted else np.asarray(1 / len(state.weight))
            tail = max(1.0, state.tail)
        taken = _State(state.weight * share, tail, state.main)
        results = self._region(branch.regions[0], taken)
        if len(branch.regions) > 1:
            rest = _State(state.weight * (1 - share), state.tail, state.main)
            others = self._region(branch.regions[1], rest)
            results = [
                np.where(share, a, b)
                if known and isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
                else None
                for a, b in zip(results, others, strict=True)
            ]
        self._set(branch, results)

    def _simple(self, operation: Operation, state: _State) -> None:
        name, shapes = operation.name, operation.shapes()
        value = None
        if operation.is_dot:
            (a, _), (b, _) = shapes[:2]
            macs = self.work.straight if state.main is None else self.work.macs[state.main]
            macs += state.weight * (math.prod(a) * b[-1])
        elif name.startswith("tt.atomic"):
            self._wait(state)
            value = _ARRIVED
        elif shapes:
            self._count(operation, shapes, state)
        elif name == "tt.get_program_id":
            value = self.ids[operation.text.split()[1]]
        elif name == "tt.get_num_programs":
            value = np.asarray(self.counts[operation.text.split()[1]])
        elif name.startswith("arith."):
            value = self._scalar(name.removeprefix("arith."), operation.text)
        self._set(operation, [value])

    def _scalar(self, kind: str, text: str) -> Any:
        word = text.split()[1].rstrip(",")
        if kind == "constant":
            if word in ("true", "false"):
                return np.asarray(int(word == "true"))
            return np.asarray(int(word)) if word.lstrip("-").isdigit() else None
        values = [self._get(o) for o in operands(text)]
        if kind == "cmpi" and word == "eq" and any(v is _ARRIVED for v in values):
            last = next((v for v in values if isinstance(v, np.ndarray)), None)
            return None if last is None else _Share(1 / np.maximum(last + 1, 1))
        if any(v is _CHANGES for v in values):
            return _CHANGES
        function = _COMPARE.get(word) if kind == "cmpi" else _INTEGER.get(kind)
        if function is None or not all(isinstance(v, np.ndarray) for v in values):
            return None
        return np.asarray(function(*values)).astype(np.int64)

    def _count(self, operation: Operation, shapes: list[tuple[Shape, str]], state: _State) -> None:
        kind = operation.name.partition(".")[2]
        if state.main is not None or kind in _FREE:
            return
        elements = max(math.prod(shape) for shape, _ in shapes)
        if kind in ("load", "store"):
            kept = shapes[0][1].removeprefix("!tt.ptr<").rstrip(">")
            self.work.bytes += state.weight * (elements * _BYTES.get(kept, 4))
        elif kind == "reduce":
            self.work.sums += state.weight
        vector = kind in ("load", "store", "addptr") or shapes[0][1].startswith("i")
        self.work.elements += state.weight * (elements / VECTOR if vector else elements)

    def _wait(self, state: _State) -> None:
        self.work.rounds += state.weight
        self.work.tail += state.tail

    def _get(self, name: str) -> Any:
        return self.values.get(name)

    def _set(self, operation: Operation, results: list[Any]) -> None:
        if operation.result:
            self.values[operation.result] = results[0] if results else None
            for index, value in enumerate(results):
                self.values[f"{operation.result}#{index}"] = value


def _divide(a: Array, b: Array) -> Array:
    """Divide towards zero, as the machine does."""
    b = np.where(b == 0, 1, b)  # such programs do not come by
    quotient: Array = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    return quotient
