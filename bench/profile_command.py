"""`flashdip profile`: where an iteration's time goes."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashdip.engine.command_options import setting
from flashdip.engine.errors import OutputError
from flashdip.engine.files import atomic, check_writable, one_line

if TYPE_CHECKING:
    from flashdip.bench.profiling import Profile

FILES = ("profile.json", "trace.json", "report.html")


def profile(
    directory: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to; made anew.")
    ] = Path("profile"),
    size: Annotated[int, typer.Option(min=16, help="Pixels a side of the picture.")] = 256,
    preset: Annotated[
        str, typer.Option(help="For denoising; see 'flashdip presets'.")
    ] = "published-denoise",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the preset."),
    ] = None,
    iterations: Annotated[
        int, typer.Option(min=1, max=1000, help="Under the profiler; more take longer to read.")
    ] = 10,
    backend: Annotated[str, typer.Option(help="See 'flashdip doctor'.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp16, bf16, fp32, fp64 or auto.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where the time of a fit goes: layers and passes, gaps, memory, what to fix first.

    Writes report.html, which opens without a network, trace.json for Chrome or ui.perfetto.dev,
    and profile.json. On a GPU, run it under NVIDIA's tools to see the same names as NVTX ranges.

    Example: flashdip profile --size 256 --backend native -o profile
    """
    made = _make_ready(directory, force)
    from flashdip.bench import profile_page, profiling
    from flashdip.bench.cases import SIGMA, picture
    from flashdip.engine.presets import preset as named
    from flashdip.engine.problems import Problem

    try:
        chosen = dict(map(setting, settings or []))
        config = named("denoise", preset).override({**chosen, "precision": precision})
        found = profiling.profile_fit(
            Problem(picture(size), (3, size, size), sigma=SIGMA),
            config,
            backend=backend,
            device=device,
            iterations=iterations,
            tell=lambda line: typer.echo(f"profile: {line}", err=True),
        )
    except BaseException:
        if made:
            with suppress(OSError):  # something else may have been put there
                directory.rmdir()
        raise
    record = json.dumps(found.record, indent=1, allow_nan=False) + "\n"
    with atomic(directory / "trace.json", force=force) as path:
        found.trace(str(path))
    with atomic(directory / "report.html", force=force) as path:
        path.write_text(profile_page.draw(found.record), encoding="utf-8")
    with atomic(directory / "profile.json", force=force) as path:
        path.write_text(record)
    if as_json:
        typer.echo(record, nl=False)
    else:
        _print(found, directory)


def _print(found: "Profile", directory: Path) -> None:
    from rich.box import MARKDOWN
    from rich.table import Table

    from flashdip.bench import show
    from flashdip.bench.advice import advice
    from flashdip.bench.profile_page import cells
    from flashdip.bench.show import number

    record, console = found.record, show.console()
    table = Table(box=MARKDOWN)
    for title in ("layer", "pass"):
        table.add_column(title)
    for title in ("ms", "share", "GFLOP", "MB", "roof ms", "of the roof"):
        table.add_column(title, justify="right")
    for part in record["parts"]:
        table.add_row(*cells(part))
    console.print(table)
    step, gaps, allocator = record["step"], record["gaps"], record["allocator"]
    waits = {name: sum(each.values()) for name, each in record["waits"].items()}
    launches = "" if gaps["launches"] is None else f"; {gaps['launches']:.0f} kernels"
    for line in (
        f"an iteration: {number(step['ms'])} ms, under the profiler "
        f"{number(step['profiled_ms'])} ms",
        f"gaps: {number(gaps['ms'], 3)} ms ({gaps['share']:.1%}){launches}",
        f"the host waited {waits['in_iterations']} times within iterations, "
        f"{waits['in_readings']} times at readings",
        f"allocator: {allocator['allocations']:.0f} allocations an iteration, "
        f"{number(allocator['bytes'] / 1e6)} MB; at most "
        f"{number(allocator['peak_bytes'] / 1e6)} MB above the start",
        f"written: {', '.join(str(directory / name) for name in FILES)}",
        "what should I fix first?",
        *advice(record),
    ):
        console.print(line, soft_wrap=True)


def _make_ready(directory: Path, force: bool) -> bool:
    """Make the folder, and see that all files can be written; return whether it is new.

    Raises:
        OutputError: One cannot.
    """
    made = not directory.exists()
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{one_line(directory)}: cannot be made: {error.strerror}") from None
    for name in FILES:
        check_writable(directory / name, force=force)
    return made
