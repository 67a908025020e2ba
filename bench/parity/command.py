"""The command that runs the paper's benchmarks on the authors' own inputs."""

import json
from pathlib import Path
from typing import Annotated

import typer


def parity(
    data: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Holds denoise25/, inpaint50/, sr4/ with NAME_GT.png ..."),
    ],
    suite: Annotated[str, typer.Option(help="denoise25, inpaint50, sr4 or all.")] = "all",
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="Pictures, such as house; all if not given."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="quick, balanced, best, or published: the paper's own.")
    ] = "balanced",
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Results; a second run goes on.")
    ] = Path("parity"),
    iterations: Annotated[int | None, typer.Option(help="The most iterations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the fits.")] = None,
    stop: Annotated[
        str | None, typer.Option(metavar="RULE,...", help="Stopping rules; see 'denoise --help'.")
    ] = None,
    backend: Annotated[str, typer.Option(help="See 'flashdip doctor'.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ... or auto.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp16, bf16, fp32, fp64 or auto; see 'denoise --help'.")
    ] = None,
    bm3d: Annotated[
        bool,
        typer.Option(
            "--bm3d",
            help="Run BM3D too; its package, extra baselines-nc, is for non-commercial use only.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run the paper's benchmarks on its own inputs, beside its own results.

    Example: flashdip parity --data parity-images --suite denoise25 --images house
    """
    from rich.console import Console

    from flashdip.bench.parity import table
    from flashdip.bench.parity.rivals import show_terms
    from flashdip.bench.parity.run import InterruptedFitError, run
    from flashdip.bench.parity.suites import SUITES, find
    from flashdip.engine.files import check_writable
    from flashdip.engine.progress import Interruption, show_progress
    from flashdip.engine.task_options import FitOptions

    names = [name for each in images or [] for name in each.split(",") if name]
    cases = find(data, list(SUITES) if suite == "all" else suite.split(","), names)
    if bm3d:
        show_terms()
    if not output.is_dir():
        check_writable(output, force=False)
    options = FitOptions(
        preset=preset,
        iterations=iterations,
        seed=seed,
        stop=stop,
        backend=backend,
        device=device,
        precision=precision,
    )
    outcomes, ended = [], None
    with Interruption() as interruption:
        for case in cases:
            with show_progress(f"{case.suite.name} {case.name}", quiet=quiet) as tell:
                try:
                    outcome = run(
                        case,
                        output,
                        options,
                        bm3d=bm3d,
                        callback=interruption.watch(tell),
                        interrupted=interruption,
                    )
                except InterruptedFitError as error:
                    ended = error
                    break
            outcomes.append(outcome)
    if outcomes:
        found = table.write(outcomes, preset, output)
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        else:
            console = Console(highlight=False)
            table.show(found, console)
            console.print(table.LEGEND)
            console.print(f"Also in {output}: parity.json, parity.md, contact.png", markup=False)
    if ended is not None:
        typer.echo(str(ended), err=True)
        raise typer.Exit(128 + (interruption.signal or 0))
