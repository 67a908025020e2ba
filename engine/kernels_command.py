"""The command that compiles every kernel ahead of time, and says what a step would take.

Nothing here needs a GPU, and nothing here was measured: times are modelled.
"""

import dataclasses
import json
import os
from collections import Counter
from importlib import util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashdip.engine.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from flashdip.engine.networks.skip import SkipConfig
    from flashdip.kernels.fused.cost import GPU
    from flashdip.kernels.fused.inspect import Compiled
    from flashdip.kernels.fused.launch import Launch

SIZES = (256, 512, 1024)
DTYPE = "float16"


def kernels(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARCH",
            help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 or gfx942; may be repeated. Without "
            "it, all of NVIDIA's.",
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(metavar="PIXELS", help="Side of the image; may be repeated. 256, 512, 1024."),
    ] = None,
    task: Annotated[str, typer.Option(help="The preset's task.")] = "denoise",
    preset: Annotated[
        str, typer.Option(help="Whose network; see 'flashdip presets'.")
    ] = "published-denoise",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes to compile in; one per core.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail where a kernel or a step is not as it must be.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compile every kernel for GPUs that are not here; model a step.

    Example: flashdip kernels --arch sm_90 --size 512
    """
    from flashdip.engine.presets import preset as named

    network = named(task, preset).network
    found = survey(tuple(arch or ()), tuple(size or SIZES), jobs or os.cpu_count() or 1, network)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    if check and found["breaches"]:
        for line in found["breaches"]:
            typer.echo(f"flashdip: error: {line}", err=True)
        raise typer.Exit(1)


def survey(
    archs: tuple[str, ...], sizes: tuple[int, ...], jobs: int, network: "SkipConfig"
) -> dict[str, Any]:
    """Compile a network's launches and model its steps, as plain values for JSON.

    Returns:
        kernels (one for each specialisation and architecture; those of a reading, too), steps (one
        for each GPU and size whose architecture was asked for; times are *modelled*, readings left
        out) and breaches (one line each).

    Raises:
        ConfigError: An architecture is unknown.
        UnavailableError: Triton is not there, or is set to interpret.
    """
    if util.find_spec("triton") is None:
        raise UnavailableError("Triton is not installed: pip install 'flashdip[gpu]'")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UnavailableError("nothing can be compiled under TRITON_INTERPRET=1: unset it")
    import torch

    from flashdip.engine.backends import plans
    from flashdip.engine.networks.skip import SkipConfig
    from flashdip.kernels.fused import checks, cost, inspect

    archs = archs or tuple(a for a in inspect.ARCHITECTURES if a.startswith("sm_"))
    if unknown := set(archs) - set(inspect.ARCHITECTURES):
        raise ConfigError(
            f"--arch: expected {', '.join(inspect.ARCHITECTURES)}, got {', '.join(sorted(unknown))}"
        )
    dtype = getattr(torch, DTYPE)
    default = dataclasses.replace(network, scale="one") == SkipConfig()  # wherever it starts
    planned = {
        (arch, side): plans.launches(network, side, side, arch, dtype)
        for arch in archs
        for side in sizes
    }
    now_and_then = [
        (launch, arch)
        for arch in archs
        for launch in plans.readings(network, sizes[0], sizes[0], arch, dtype)
    ]
    wanted = [(launch, arch) for (arch, _), step in planned.items() for launch in step]
    compiled = iter(inspect.compile_launches([*wanted, *now_and_then], jobs))
    made = {key: [(launch, next(compiled)) for launch in step] for key, step in planned.items()}
    apart = [(launch, next(compiled)) for launch, _ in now_and_then]
    rows = _kernels([pair for step in made.values() for pair in step] + apart)
    steps = [
        _step(gpu, side, made[gpu.arch, side], cost.ROOF[gpu.name].get(side) if default else None)
        for gpu in cost.GPUS
        for side in sizes
        if gpu.arch in archs
    ]
    breaches = [f"{row['name']}, {row['arch']}: {b}" for row in rows for b in row["breaches"]]
    if default:  # others have no records, and as many kernels as they have widths
        seconds = {(step["gpu"], step["size"]): step["modelled_ms"] / 1e3 for step in steps}
        breaches += checks.slower(seconds)
        breaches += checks.too_many(
            {key: len(step) for key, step in made.items()}, Counter(row["arch"] for row in rows)
        )
    return {"kernels": rows, "steps": steps, "breaches": breaches}


def _step(
    gpu: "GPU", side: int, made: "list[tuple[Launch, Compiled]]", roof: float | None
) -> dict[str, Any]:
    from flashdip.kernels.fused import cost

    seconds = [cost.modelled_seconds(launch, compiled, gpu) for launch, compiled in made]
    time = cost.modelled_step(seconds)
    return {
        "gpu": gpu.name,
        "size": side,
        "dtype": DTYPE,
        "launches": len(made),
        "flops": sum(launch.flops for launch, _ in made),
        "bytes": sum(launch.bytes for launch, _ in made),
        "modelled_ms": time * 1e3,
        "modelled_its": 1 / time,
        "roof_share": roof and roof / time,
        "modelled_us": [
            {"name": launch.name, "us": s * 1e6}
            for (launch, _), s in zip(made, seconds, strict=True)
        ],
    }


def _kernels(pairs: "list[tuple[Launch, Compiled]]") -> list[dict[str, Any]]:
    """Return a row for each code, named after the first launch that uses it."""
    from flashdip.kernels.fused import checks, cost

    users: dict[int, list[tuple[Launch, Compiled]]] = {}
    for pair in pairs:
        users.setdefault(id(pair[1]), []).append(pair)
    rows = []
    for using in users.values():
        largest, compiled = max(using, key=lambda pair: pair[0].grid[0])
        breaches: dict[str, str] = {}
        for launch, _ in using:
            breaches |= checks.breaches(launch, compiled)
        nvidia = compiled.arch.startswith("sm_")
        rows.append(
            {
                "name": using[0][0].name,
                "kernel": compiled.kernel,
                "arch": compiled.arch,
                "launches": len(using),
                "registers": compiled.registers,
                "spills": compiled.spills,
                "shared": compiled.shared,
                "threads": compiled.threads,
                "gemm": largest.gemm,
                "matrix_instructions": compiled.matrix_instructions,
                "async_copies": compiled.code.copies,
                "load_bits": compiled.code.loads,
                "store_bits": compiled.code.stores,
                "layout_conversions": compiled.conversions,
                "occupancy": cost.occupancy(compiled) if nvidia else None,
                "waves": cost.waves(largest, compiled) if nvidia else None,
                "breaches": list(breaches.values()),
            }
        )
    return rows


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for arch in dict.fromkeys(row["arch"] for row in found["kernels"]):
        rows = [row for row in found["kernels"] if row["arch"] == arch]
        table = Table(title=f"{arch}: {len(rows)} kernels, compiled ahead of time", box=box.SIMPLE)
        table.add_column("kernel", no_wrap=True)
        for head in ("registers", "spills", "shared", "matrix", "async", "bits", "waves"):
            table.add_column(head, justify="right")
        for row in rows:
            cells = (row["registers"], row["spills"], row["shared"], row["matrix_instructions"])
            widest = max(row["load_bits"], default=0)
            waves = "" if row["waves"] is None else f"{row['waves']:.1f}"
            table.add_row(row["name"], *map(str, (*cells, row["async_copies"], widest)), waves)
        console.print(table)
    table = Table(title="A step, modelled: nothing here was measured", box=box.SIMPLE)
    for head in ("GPU", "size", "launches", "GFLOP", "GB", "ms", "it/s", "of the roof"):
        table.add_column(head, justify="left" if head == "GPU" else "right", no_wrap=True)
    for row in found["steps"]:
        share = "" if row["roof_share"] is None else f"{row['roof_share']:.0%}"
        table.add_row(
            row["gpu"],
            str(row["size"]),
            str(row["launches"]),
            f"{row['flops'] / 1e9:.0f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['modelled_ms']:.3f}",
            f"{row['modelled_its']:.0f}",
            share,
        )
    console.print(table)
    for line in found["breaches"]:
        console.print(line, style="yellow")
