"""Read a kernel's machine code: what is in it, and what is in its main loops.

The text is that of NVIDIA's `cuobjdump -sass`, or AMD's assembly; the instructions are listed in
NVIDIA's "CUDA binary utilities". A loop is what lies between a backward branch and its target; a
main loop is an innermost one with matrix instructions.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

_NVIDIA = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_AMD = re.compile(r"^(?:(\.L\w+):|\t([a-z]\w+)[ \t]*(.*?)[ \t]*(?:;.*)?$)", re.M)

_HMMA = re.compile(r"HMMA\.(16816|1688|884)")
_HMMA_MACS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "884": 8 * 8 * 4}
_HGMMA = re.compile(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)")
_MFMA = re.compile(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)")
_MATRIX = re.compile(r"(HMMA|HGMMA|QMMA|QGMMA|IMMA|IGMMA|UTC[A-Z]*MMA|v_mfma_)")
_ASYNC = re.compile(r"(LDGSTS|UTMALDG|UBLKCP|(?:global|buffer)_load_\w*lds)")
_SPILL = re.compile(r"(LDL|STL|scratch_load|scratch_store)\b")
_WARP = 32  # threads


@dataclass(frozen=True)
class Loop:
    """One turn of a main loop, as one warp does it.

    Attributes:
        instructions: Instructions issued.
        matrix: Matrix instructions among them.
        macs: Their multiply-adds; 0 where the machine code does not tell.
        shared: Bytes to or from shared memory, the operands of warpgroup products included.
        local: Bytes to or from local memory: spilled registers.
        loaded: Bytes from global memory.
        copies: Asynchronous copies among the loads.
        barriers: Times that the warps of a program wait for each other.
    """

    instructions: int
    matrix: int
    macs: int
    shared: int
    local: int
    loaded: int
    copies: int
    barriers: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its name with all suffixes, and what it is applied to."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Code:
    """What was found in a kernel.

    Attributes:
        instructions: All of them.
        spills: Loads and stores of spilled registers.
        matrix: Matrix instructions by kind, such as {"HMMA.16816.F32": 64}.
        copies: Asynchronous copies from global to shared memory.
        loads: Loads from global memory by width in bits, asynchronous ones included.
        stores: Stores to global memory by width in bits.
        loops: The main loops, in the order of the code.
    """

    instructions: int
    spills: int
    matrix: dict[str, int]
    copies: int
    loads: dict[int, int]
    stores: dict[int, int]
    loops: list[Loop]


def read_nvidia(text: str) -> Code:
    """Read what `cuobjdump -sass` prints."""
    found = [Instruction(int(m[1], 16), m[2], m[3]) for m in _NVIDIA.finditer(text)]
    jumps = [
        (int(target[1], 16), i.address)
        for i in found
        if i.name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", i.operands))
    ]
    return _code(found, jumps, _nvidia_access)


def read_amd(text: str) -> Code:
    """Read AMD's assembly."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for match in _AMD.finditer(text):
        if match[1]:
            labels[match[1]] = len(found)
        else:
            found.append(Instruction(len(found), match[2], match[3]))
    jumps = [
        (labels[i.operands], i.address)
        for i in found
        if i.name.startswith(("s_cbranch", "s_branch")) and i.operands in labels
    ]
    return _code(found, jumps, _amd_access)


Access = Callable[[Instruction], tuple[str, int]]  # -> "load", "store", "shared" or "", bits


def _code(found: list[Instruction], jumps: list[tuple[int, int]], access: Access) -> Code:
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction in found:
        kind, bits = access(instruction)
        if kind in ("load", "store"):
            (loads if kind == "load" else stores)[bits] += 1
    matrix = Counter(
        re.sub(r"\.(reuse|tnspA|tnspB)\b", "", i.name) for i in found if _MATRIX.match(i.name)
    )
    spans = sorted({(start, end) for start, end in jumps if start < end})
    bodies = [[i for i in found if start <= i.address <= end] for start, end in spans]
    busy = [
        (span, body)
        for span, body in zip(spans, bodies, strict=True)
        if any(_MATRIX.match(i.name) for i in body)
    ]
    inner = [
        body
        for (start, end), body in busy
        if not any((start, end) != (a, b) and start <= a and b <= end for (a, b), _ in busy)
    ]
    return Code(
        len(found),
        sum(bool(_SPILL.match(i.name)) for i in found),
        dict(matrix),
        sum(bool(_ASYNC.match(i.name)) for i in found),
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
        [_loop(body, access) for body in inner],
    )


def _loop(body: list[Instruction], access: Access) -> Loop:
    moved: Counter[str] = Counter()
    for instruction in body:
        kind, bits = access(instruction)
        moved[kind] += bits // 8 * _WARP
        if kind == "load" and instruction.name.startswith("LDGSTS"):
            moved["shared"] += bits // 8 * _WARP
    macs, operands = zip(*(_product(i) for i in body), strict=True)
    return Loop(
        instructions=len(body),
        matrix=sum(bool(_MATRIX.match(i.name)) for i in body),
        macs=sum(macs),
        shared=moved["shared"] + sum(operands),
        local=moved["local"],
        loaded=moved["load"],
        copies=sum(bool(_ASYNC.match(i.name)) for i in body),
        barriers=sum(i.name.startswith(("BAR.SYNC", "s_barrier")) for i in body),
    )


def _product(instruction: Instruction) -> tuple[int, int]:
    """Return a warp's multiply-adds and the bytes of 16-bit operands read from shared memory."""
    if match := _HMMA.match(instruction.name):
        return _HMMA_MACS[match[1]], 0
    if match := _MFMA.match(instruction.name):
        m, n, k = map(int, match.groups())
        return m * n * k, 0
    if match := _HGMMA.match(instruction.name):  # by four warps together
        m, n, k = map(int, match.groups())
        left = 0 if re.search(r",\s*R\d+,\s*gdesc", instruction.operands) else m * k * 2
        return m * n * k // 4, (left + n * k * 2) // 4
    return 0, 0


def _nvidia_access(instruction: Instruction) -> tuple[str, int]:
    base, *suffixes = instruction.name.split(".")
    kind = {
        "LDG": "load", "LDGSTS": "load", "STG": "store", "LDS": "shared", "STS": "shared",
        "LDSM": "shared", "STSM": "shared", "LDL": "local", "STL": "local",
    }.get(base, "")  # fmt: skip
    if base in ("LDSM", "STSM"):  # that many 8x8 matrices of 16 bits: 32 bits a thread each
        return kind, 32 * (int(suffixes[-1]) if suffixes[-1].isdigit() else 1)
    widths = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return kind, next((widths[s] for s in suffixes if s in widths), 32) if kind else 0


def _amd_access(instruction: Instruction) -> tuple[str, int]:
    match = re.match(
        r"(ds_read|ds_write|ds_load|ds_store|scratch_load|scratch_store|(?:global|buffer|flat)_"
        r"(?:load|store))\w*?_(?:b|dwordx?|short|ushort|ubyte)?(\d*)",
        instruction.name,
    )
    if not match:
        return "", 0
    kind = {"ds": "shared", "sc": "local"}.get(match[1][:2])
    kind = kind or ("load" if match[1].endswith("load") else "store")
    number = int(match[2] or 1)
    if "dword" in instruction.name:
        return kind, 32 * number
    return kind, number if number > 8 else 16 if "short" in instruction.name else 32
