"""Read the compiler's textual intermediate code as a tree of operations.

Only as much of MLIR's syntax as Triton prints: an operation is a line, and one with regions ends in
an opening brace.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]

_RESULT = re.compile(r"(%[\w$.-]+)(?::(\d+))? = ")
_NAME = re.compile(r'"?([a-z]\w*\.[\w.]+)')
_OPERAND = re.compile(r"%[\w$.-]+(?:#\d+)?")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(!tt\.ptr<\w+>|\w+)")
_DOTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")


@dataclass
class Operation:
    """One operation.

    Attributes:
        name: Such as "arith.addi".
        result: Name of its result, "" if it has none.
        text: What stands after the equals sign.
        regions: Bodies, such as those of a loop or of both branches.
    """

    name: str
    result: str
    text: str
    regions: list[list["Operation"]] = field(default_factory=list)

    @property
    def is_dot(self) -> bool:
        """Whether this is a matrix product."""
        return self.name in _DOTS

    def shapes(self) -> list[tuple[Shape, str]]:
        """Return shape and element type of each tensor type that its text names."""
        found = _TENSOR.findall(self.text)
        return [(tuple(map(int, shape[:-1].split("x"))), element) for shape, element in found]

    def walk(self) -> Iterator["Operation"]:
        """Yield all operations inside, however deep."""
        for region in self.regions:
            for operation in region:
                yield operation
                yield from operation.walk()


def operands(text: str) -> list[str]:
    """Return the names in a text, in order; one of several results is called "%name#index"."""
    return _OPERAND.findall(text)


def parse(text: str) -> Operation:
    """Return the module's first function: its arguments are in its text, its body is its region."""
    root = Operation("module", "", "", [[]])
    open_regions = [root]
    for raw in text.splitlines():
        line = _without_location(raw.strip())
        if not line or line.startswith(("#", "^", "//", "module")):
            continue
        if line.startswith("}"):
            if line.endswith("{"):  # "} else {", "} do {"
                open_regions[-1].regions.append([])
                continue
            if len(open_regions) > 1:
                closed = open_regions.pop()
                closed.text += line[1:]  # the types of a generic operation stand behind its body
            continue
        operation = _operation(line)
        open_regions[-1].regions[-1].append(operation)
        if line.endswith("{"):
            operation.regions.append([])
            open_regions.append(operation)
    return next(o for o in root.walk() if o.name == "tt.func")


def main_loops(function: Operation) -> list[Operation]:
    """Return the loops that have a matrix product in their own body, in the order of the text."""
    loops = (o for o in function.walk() if o.name in ("scf.for", "scf.while"))
    return [loop for loop in loops if any(o.is_dot for o in _own(loop))]


def conversions(text: str, moves: Sequence[bool]) -> int:
    """Count in main loops what takes a tile from registers through shared memory and back.

    Vectors, such as a row of scales, do not count.

    Args:
        text: The code.
        moves: For each `ttg.convert_layout`, in the order of the text, whether it moves anything:
            one from a layout to the same under another name does not.
    """
    function = parse(text)
    changes = (o for o in function.walk() if o.name == "ttg.convert_layout")
    moving = {id(o) for o, moved in zip(changes, moves, strict=True) if moved}
    return sum(
        id(operation) in moving
        or (operation.name == "ttg.local_alloc" and bool(operands(operation.text)))
        for loop in main_loops(function)
        for operation in _own(loop)
        if any(min(shape) > 1 and len(shape) > 1 for shape, _ in operation.shapes())
    )


def _own(loop: Operation) -> Iterator[Operation]:
    # What a loop does at every turn: branches included, inner loops not.
    for region in loop.regions:
        for operation in region:
            yield operation
            if operation.name not in ("scf.for", "scf.while"):
                yield from _own(operation)


def _operation(line: str) -> Operation:
    result = ""
    if match := _RESULT.match(line):
        result, line = match[1], line[match.end() :]
    name = _NAME.match(line)
    return Operation(name[1] if name else "", result, line)


def _without_location(line: str) -> str:
    while (start := line.find(" loc(")) >= 0:
        depth, end = 0, start + 4
        for end in range(start + 4, len(line)):
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            if depth == 0:
                break
        line = line[:start] + line[end + 1 :]
    return line.strip()
