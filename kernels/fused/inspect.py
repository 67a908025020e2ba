"""Compile launches ahead of time, for GPUs that are not here, and see what became of them.

A launch is specialised as Triton's own launcher would do it: by types, by whether pointers and
integers are multiples of 16, by integers that are 1. Launches that need the same code share it.
What was found is kept in the user's cache, under a key of all that it depends on.
"""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton._C.libtriton import gluon_ir, ir, native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from flashdip.kernels.fused import mlir, sass
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.sass import Code, Loop

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Specialisation:
    """Everything that the code of a launch depends on, in values that can be hashed and sent.

    Attributes:
        arch: What it is compiled for, of ARCHITECTURES.
        kernel: Module and name of the Triton function.
        source: Hash of its source and all it calls.
        signature: Of each argument its name and type, such as "*fp16", "i32", "constexpr".
        constants: Name and value of each compile-time constant.
        aligned: Names of the arguments that are multiples of 16.
        options: Warps, stages and the rest.
    """

    arch: str
    kernel: tuple[str, str]
    source: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """Name of this in the cache, which also depends on the compiler and on who reads."""
        readers = (Path(module.__file__).read_bytes() for module in (mlir, sass) if module.__file__)
        text = repr((self, triton.__version__, [hashlib.sha256(r).hexdigest() for r in readers]))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """What a specialisation was compiled to.

    Attributes:
        arch: What for.
        kernel: Name of the Triton function.
        registers: Of a thread.
        stack: Bytes of a thread's stack, where spilled registers go.
        shared: Bytes of shared memory of a program.
        threads: Of a program.
        stages: Depth of the pipeline of loads that was asked for.
        conversions: Tiles that change their layout through shared memory within a main loop.
        code: What is in the machine code.
        ttir: Triton's intermediate code before it is cut for the GPU; see `work`.
        arguments: Names of those that the compiled function takes.
    """

    arch: str
    kernel: str
    registers: int
    stack: int
    shared: int
    threads: int
    stages: int
    conversions: int
    code: Code
    ttir: str
    arguments: tuple[str, ...]

    @property
    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return self.code.spills

    @property
    def matrix_instructions(self) -> int:
        """Matrix instructions of all kinds."""
        return sum(self.code.matrix.values())


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one launch for an architecture; see `compile_launches`."""
    return compile_launches([(launch, arch)])[0]


def compile_launches(wanted: Iterable[tuple[Launch, str]], jobs: int = 1) -> list[Compiled]:
    """Compile launches, each for an architecture; what needs the same code is compiled once.

    Args:
        wanted: Launches and architectures.
        jobs: Processes to compile in.

    Raises:
        RuntimeError: Triton interprets in this process, or cannot compile a launch.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("nothing can be compiled under TRITON_INTERPRET=1: unset it")
    keys = [specialise(launch, arch) for launch, arch in wanted]
    found = {key: _load(key) for key in dict.fromkeys(keys)}
    missing = [key for key, compiled in found.items() if compiled is None]
    if min(jobs, len(missing)) > 1:
        # Not forked: the parent may have threads of torch and of the compiler.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(missing)), context) as pool:
            found |= zip(missing, pool.map(_compile, missing), strict=True)
    else:
        found |= {key: _compile(key) for key in missing}
    return [compiled for key in keys if (compiled := found[key]) is not None]


def specialise(launch: Launch, arch: str) -> Specialisation:
    """Say what code a launch needs, as Triton's launcher would."""
    backend = make_backend(_target(arch))
    signature, constants, aligned = [], [], []
    for parameter in launch.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature.append((name, "constexpr"))
            constants.append((name, launch.constants[name]))
            continue
        value = launch.arguments[name]
        kind, detail = native_specialize_impl(
            type(backend),
            _Pointer(value) if isinstance(value, Tensor) else value,
            parameter.is_const,
            not parameter.do_not_specialize,
            not parameter.do_not_specialize_on_alignment,
        )
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, value))
        elif detail:
            aligned.append((name, detail))
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    } | launch.options
    return Specialisation(
        arch,
        (launch.kernel.fn.__module__, launch.kernel.fn.__qualname__),
        launch.kernel.cache_key,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(sorted(options.items())),
    )


class _Pointer:
    """What Triton's launcher asks of a tensor, which may be on the meta device and have no address.

    Allocations are aligned, so all that counts is where in its allocation a tensor begins.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()
        self._range = int(tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._range


def _target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def _compile(key: Specialisation) -> Compiled:
    module, name = key.kernel
    kernel = getattr(import_module(module), name)
    target = _target(key.arch)
    backend = make_backend(target)
    places = {argument: (i,) for i, (argument, _) in enumerate(key.signature)}
    source = ASTSource(
        kernel,
        dict(key.signature),
        {places[argument]: value for argument, value in key.constants},
        {places[argument]: backend.parse_attr(detail) for argument, detail in key.aligned},
    )
    try:
        made = triton.compile(source, target=target, options=dict(key.options))
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1][:500]  # before it stands the source
        raise RuntimeError(f"{name} cannot be compiled for {key.arch}: {reason}") from None
    if target.backend == "cuda":
        registers, stack, code = _read_cubin(made.asm["cubin"])
    else:
        text = made.asm["amdgcn"]
        numbers = {
            word: int(_after(text, rf".{word}:")) for word in ("vgpr_count", "vgpr_spill_count")
        }
        registers, stack = numbers["vgpr_count"], 4 * numbers["vgpr_spill_count"]
        code = sass.read_amd(text)
    compiled = Compiled(
        arch=key.arch,
        kernel=name,
        registers=registers,
        stack=stack,
        shared=made.metadata.shared,
        threads=made.metadata.num_warps * target.warp_size,
        stages=made.metadata.num_stages,
        conversions=mlir.conversions(made.asm["ttgir"], _moves(made.asm["ttgir"], backend)),
        code=code,
        ttir=made.asm["ttir"],
        arguments=tuple(argument for argument, kind in key.signature if kind != "constexpr"),
    )
    _save(key, compiled)
    return compiled


def _moves(ttgir: str, backend: Any) -> list[bool]:
    """Say of each layout conversion of the code, in order, whether the compiler moves anything."""
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    found = []

    def look(operation: Any) -> None:
        if operation.get_name() == "ttg.convert_layout":
            kind, value = operation.get_result(0).get_type(), operation.get_operand(0)
            found.append(not builder.is_convert_layout_trivial(kind, value))

    module.walk(look)
    return found


def _read_cubin(cubin: bytes) -> tuple[int, int, Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return int(_after(usage, "REG:")), int(_after(usage, "STACK:")), sass.read_nvidia(listing)


def _after(text: str, word: str) -> str:
    rest = text.partition(word)[2].split()
    return rest[0] if rest else "0"


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flashdip" / "kernels"


def _load(key: Specialisation) -> Compiled | None:
    try:
        kept = json.loads((_folder() / f"{key.key}.json").read_text())
        code = kept["code"]
        code["loops"] = [Loop(**loop) for loop in code["loops"]]
        for name in ("loads", "stores"):  # JSON has no integers as names
            code[name] = {int(bits): count for bits, count in code[name].items()}
        kept |= {"code": Code(**code), "arguments": tuple(kept["arguments"])}
        return Compiled(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or not whole


def _save(key: Specialisation, compiled: Compiled) -> None:
    # Written beside and moved into place: whoever else compiles the same sees all of it or nothing.
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(asdict(compiled), file)
        os.replace(file.name, folder / f"{key.key}.json")
    except OSError as error:
        print(f"flashdip: warning: {error}: nothing kept for next time", file=sys.stderr)
