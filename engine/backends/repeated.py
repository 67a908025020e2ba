"""Recorded operations as straight Python code, that repeats them without autograd.

Each part of a recording becomes a function with a line for each operation, and for each view of
memory that is another each time; a line ends by letting go of what none below it uses. (`torch.fx`
writes such code too, in two to three times the time: as much as dozens of iterations save.) For the
most frequent operations what torch binds to Python is called, in half the time of the overload.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.backends.arena import Place, Storage, arrange, laid
from flashdip.engine.backends.recorded import Operation, Part, Recorder, writing


class Recording:
    """Repeats the parts that a recorder has seen, in their order.

    Args:
        recorder: It must have recorded everything; its results may have been freed.

    Attributes:
        arena: Where smaller results lie, bytes.
    """

    def __init__(self, recorder: Recorder) -> None:
        operations = [writing(each) for each in recorder.operations]
        planned = [storage for storage in recorder.storages if storage.planned]
        self.arena = torch.empty(arrange(planned), dtype=torch.uint8)
        fixed = Fixed(self.arena.untyped_storage())
        self._carried: list[Tensor] = []  # what later parts use of what earlier ones have made
        self._parts: list[tuple[Part, Callable[..., Any]]] = []
        carried: list[Place] = []
        starts = [0, *(part.end for part in recorder.parts)]
        for index, (part, start) in enumerate(zip(recorder.parts, starts, strict=False)):
            code = Code(fixed, part.given, carried)
            for each in operations[start : part.end]:
                if each is not None:
                    code.add(each)
            later = [place for each in recorder.parts[index + 1 :] for place in each.kept]
            for each in operations[part.end :]:
                later.extend(_places(each) if each is not None else [])
            carried = code.left_for(later)
            self._parts.append((part, code.function(part.kept, carried)))

    def repeat(self, part: int, *given: Tensor) -> list[Tensor]:
        """Repeat a part; return what it gives back, in memory that it does not write to again.

        Args:
            part: Its place in the order of parts; all before it were repeated.
            *given: For what it was given when it was recorded; copied if they lie otherwise.
        """
        of, function = self._parts[part]
        tensors = [laid(*pair) for pair in zip(given, of.given, strict=True)]
        carried, self._carried = self._carried, []  # an exception leaves nothing behind
        with torch.inference_mode():  # past autograd's part of each operation
            kept, self._carried = function(tensors, carried)
        return [each.clone() for each in kept]


class Fixed:
    """Tensors in memory that stays, each made once.

    Args:
        arena: Where planned storages lie.
    """

    def __init__(self, arena: torch.UntypedStorage) -> None:
        self._arena = arena
        self._known: dict[Place, Tensor] = {}

    def tensor(self, place: Place) -> Tensor:
        """Return the tensor at a place."""
        known = self._known.get(place)
        if known is None:
            storage, dtype, shape, stride, offset = place
            memory = self._arena if storage.memory is None else storage.memory
            known = self._known[place] = torch.empty(0, dtype=dtype)
            known.set_(memory, storage.offset // dtype.itemsize + offset, shape, stride)
        return known


class Code:
    """The code of one part, as it is put together.

    Its function takes what the part is given, and what earlier parts have left: lists that it
    empties, so that nothing else keeps what is in them.

    Args:
        fixed: Where tensors of fixed memory are.
        given: The part's.
        carried: What earlier parts have left.
    """

    def __init__(self, fixed: Fixed, given: list[Place], carried: list[Place]) -> None:
        self._fixed = fixed
        self._lines = ["def part(given, carried):"]
        self._names: dict[str, Any] = {}  # what the lines refer to
        self._tensors: dict[Place, str] = {}  # names of what is made
        self._made: dict[Storage, Place] = {}  # how what was made in memory that moves lies there
        self._last: dict[str, int] = {}  # line that a name is needed in
        for source, places in (("given", given), ("carried", carried)):
            for place in reversed(places):
                self._assign([place], f"{source}.pop()")

    def add(self, operation: Operation) -> None:
        """Add an operation."""
        function, arguments, options, results, _ = operation
        self._view(_places(operation))
        own = [self._text(each) for each in arguments]
        named = [f"{name}={self._text(each)}" for name, each in options.items()]
        method = _method(function)
        called = self._name(function) if method is None else f"{own.pop(0)}.{method}"
        self._assign(results, f"{called}({', '.join([*own, *named])})")

    def left_for(self, later: Iterable[Place]) -> list[Place]:
        """Return what later parts use of what was made or given here, or earlier."""
        used = {place.storage for place in later}
        return [place for storage, place in self._made.items() if storage in used]

    def function(self, kept: list[Place], carried: list[Place]) -> Callable[..., Any]:
        """Return the function, that gives back these two lists of tensors."""
        self._view(kept)
        lists = [self._text(places) for places in (kept, carried)]
        for name, line in self._last.items():
            if line < len(self._lines):
                self._lines[line] += f"; del {name}"
        source = "\n    ".join([*self._lines, f"return {', '.join(lists)}"])
        exec(compile(source, f"<{__name__}>", "exec"), self._names)
        function: Callable[..., Any] = self._names.pop("part")  # no cycle: it keeps the names
        return function

    def _assign(self, places: list[Place | None], value: str) -> None:
        """Add a line; give names to what it makes."""
        targets = []
        for place in places:
            name = f"t{len(self._last)}"
            targets.append(name)
            self._last[name] = len(self._lines)
            if place is not None:
                self._tensors[place] = name
                self._made.setdefault(place.storage, place)
        self._lines.append(f"{', '.join(targets)} = {value}" if targets else value)

    def _text(self, value: Any) -> str:
        """Return what stands for an argument."""
        if isinstance(value, Place):
            return self._tensor(value)
        if isinstance(value, list):
            return f"[{', '.join(self._text(each) for each in value)}]"
        if value is None or isinstance(value, bool | int):
            return repr(value)
        return self._name(value)

    def _view(self, places: Iterable[Place]) -> None:
        """Add lines that take views of what was made, where there are none."""
        for place in places:
            storage, dtype, *lying = place
            if storage.moves and place not in self._tensors:
                made = self._made[storage]
                assert made.dtype == dtype, "a view of another type would be read wrongly"
                whole = self._tensor(made)
                self._assign([place], f"{whole}.as_strided({', '.join(map(str, lying))})")

    def _tensor(self, place: Place) -> str:
        """Return the name of a fixed tensor, or of one that there is, for the next line."""
        if not place.storage.moves:
            return self._name(self._fixed.tensor(place))
        name = self._tensors[place]
        self._last[name] = len(self._lines)
        return name

    def _name(self, value: Any) -> str:
        """Return a name for what is the same each time."""
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name


def _places(operation: Operation) -> Iterator[Place]:
    """Yield the places that an operation uses."""
    waiting: list[Any] = [*operation.arguments, *operation.options.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Place):
            yield value
        elif isinstance(value, list):
            waiting.extend(value)


_METHODS = {"add_", "clamp_", "copy_", "div_", "fill_", "mul_", "sub_", "zero_"}


def _method(function: Any) -> str | None:
    """Return the name of the tensor's method that is an operation in place, if it is in use."""
    schema = getattr(function, "_schema", None)
    name = "" if schema is None else schema.name.removeprefix("aten::")
    return name if name in _METHODS else None
