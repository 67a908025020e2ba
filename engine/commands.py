"""The commands that restore an image, and `presets`; the functions behind them are in `tasks`.

Each checks its outputs first, because a fit is long; then fits, showing progress on stderr; then
writes. Ctrl-C or SIGTERM ends the fit early: the best image so far is written, and the exit code is
130 or 143.
"""

import json
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashdip.engine.command_options import Input, RunOptions, with_options
from flashdip.engine.errors import OutputError, StoppedError
from flashdip.engine.files import one_line

if TYPE_CHECKING:
    from flashdip.engine.networks.skip import SkipConfig
    from flashdip.engine.planning import Plan
    from flashdip.engine.result import Result

# What Result.save writes.
_SAVED = ("restored.png", "restored.tif", "uncertainty.tif", "result.json", "fit.safetensors")

KeepKnown = Annotated[
    bool,
    typer.Option(
        "--keep-known/--no-keep-known", help="Paste the known pixels back over the fitted ones."
    ),
]


@with_options
def denoise(image: Input, options: RunOptions) -> None:
    """Remove noise.

    Example: flashdip denoise noisy.png -o clean.png --sigma 25
    """
    _run("denoise", image, options)


@with_options
def superres(
    image: Input,
    factor: Annotated[int, typer.Option(help="Whole number, at least 2.")],
    options: RunOptions,
    kernel: Annotated[
        str,
        typer.Option(help="How it was made small: lanczos2, lanczos3, gauss12, gauss1sq2 or box."),
    ] = "lanczos2",
) -> None:
    """Enlarge by a whole factor.

    Example: flashdip superres small.png -o large.png --factor 4
    """
    _run("superres", image, options, factor=factor, kernel=kernel)


@with_options
def inpaint(
    image: Input,
    options: RunOptions,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="White = known, black = missing, cut at half; without it the picture's own "
            "transparent or NaN pixels are missing.",
        ),
    ] = None,
    keep_known: KeepKnown = True,
) -> None:
    """Fill what a mask leaves open.

    Example: flashdip inpaint torn.png -o whole.png --mask mask.png
    """
    _run("inpaint", image, options, mask=mask, keep_known=keep_known)


@with_options
def dejpeg(image: Input, options: RunOptions) -> None:
    """Remove compression artefacts.

    Example: flashdip dejpeg blocky.jpg -o smooth.png
    """
    _run("dejpeg", image, options)


@with_options
def restore(
    image: Input,
    options: RunOptions,
    missing: Annotated[
        str,
        typer.Option(
            metavar="MARK",
            help="zero (all channels), nan, alpha or a colour such as '#ff00ff'.",
        ),
    ] = "zero",
    keep_known: KeepKnown = True,
) -> None:
    """Fill missing pixels that the picture itself marks.

    Example: flashdip restore holes.png -o filled.png --missing zero
    """
    _run("restore", image, options, missing=missing, keep_known=keep_known)


def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the presets of each task, with what ours were seen to give and cost.

    Gain and seconds are of one picture of 256x256 pixels on two cores of an AMD EPYC (Zen 5), or,
    where it says so, of a slower Intel Xeon (Skylake). 'flashdip parity' measures them on yours.
    """
    from flashdip.engine.presets import DEFAULT, PRESETS, TASKS

    rows: list[dict[str, Any]] = [
        {
            "task": task,
            "name": name,
            "network": _network(preset.config.network),
            "upsample": preset.config.network.upsample,
            "iterations": preset.config.iterations,
            "runs": preset.config.runs,
            "summary": preset.summary,
            "measured": preset.measured and preset.measured._asdict(),
        }
        for (task, name), preset in PRESETS.items()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    titles = ("preset", "network", "", "seen", "summary")
    table = Table(*titles, box=None, pad_edge=False, highlight=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for task in TASKS:
        table.add_row()
        table.add_row(task, style="bold")
        for row in (row for row in rows if row["task"] == task):
            default = " (default)" if row["name"] == DEFAULT else ""
            runs = f"{row['runs']} x " if row["runs"] != 1 else ""
            iterations = f"{runs}{row['iterations']} it"
            shown = row["network"], iterations, _seen(row["measured"]), row["summary"]
            table.add_row(f"  {row['name']}{default}", *shown)
    console = Console()
    console.print(table)
    seen = ((task, preset.measured) for (task, _), preset in PRESETS.items())
    of = dict.fromkeys(f"{task}: {measured.picture}" for task, measured in seen if measured)
    console.print(
        "\nSeen once, pictures of 256x256, on two cores of an AMD EPYC (Zen 5, in bfloat16) or, "
        "where it says so, of an Intel Xeon (Skylake, in float32): PSNR gained, and "
        "iterations times the seconds of one. "
        f"{'; '.join(of)}.",
        style="dim",
        highlight=False,
    )


def _seen(measured: dict[str, Any] | None) -> str:
    """Write what a preset gave and cost: "+11.4 dB, 22 s", and on what, if not on the usual CPU."""
    if measured is None:
        return ""
    where = "" if measured["cpu"] == "Zen 5" else f" ({measured['cpu']})"
    return f"{measured['after'] - measured['before']:+.1f} dB, {measured['seconds']:.0f} s{where}"


def _network(config: "SkipConfig") -> str:
    """Write the range of channels and the levels: "16-128 x5"."""
    least, most = min(config.down), max(config.down)
    width = str(least) if least == most else f"{least}-{most}"
    return f"{width} x{len(config.down)}"


def _run(task: str, image: Path, options: RunOptions, **own: Any) -> None:
    """Check the outputs, fit with progress, write, report, and exit with the code."""
    if options.sequence:
        from flashdip.engine import sequence_command

        sequence_command.run(task, image, options, own)
        return
    _check_outputs(options)
    arguments = own | options.fit_options()
    # From here on torch is needed, which takes a second or two to import.
    from flashdip.engine import tasks
    from flashdip.engine.images import check_save
    from flashdip.engine.progress import Interruption, show_progress
    from flashdip.engine.tiled import remove_tiles

    tiles = options.output.with_name(f"{options.output.name}.tiles")
    if options.dry_run:
        arguments["planned"] = partial(_print_plan, options)
    with Interruption() as interruption, show_progress(task, quiet=options.quiet) as show:
        try:
            result = getattr(tasks, task)(
                image,
                accept=partial(check_save, options.output),
                callback=interruption.watch(show),
                interrupted=interruption,
                tiles=tiles,
                **arguments,
            )
        except StoppedError as stopped:
            typer.echo(one_line(stopped), err=True)
            raise typer.Exit(128 + (interruption.signal or signal.SIGINT)) from None
        result.write(options.output, force=options.force)
        if options.save_dir is not None:
            result.save(options.save_dir, force=options.force)
        if options.report is not None:
            result.report(options.report, name=image.name, force=options.force)
        if "tiles" in result.record and options.checkpoint is None:
            remove_tiles(tiles)
    _report(result, options)
    if result.stop_reason == "diverged":
        typer.echo("the fit diverged; the picture is the last good one", err=True)
        raise typer.Exit(1)
    if interruption.signal is not None and result.stop_reason == "interrupted":
        raise typer.Exit(128 + interruption.signal)


def _print_plan(options: RunOptions, plan: "Plan") -> None:
    """Print what a fit needs, and end."""
    typer.echo(json.dumps(plan.record(), indent=1) if options.as_json else plan.line())
    raise typer.Exit


def _check_outputs(options: RunOptions) -> None:
    """Refuse, before the fit, outputs that could not be written after it.

    Raises:
        OutputError: One exists and --force is not given, its directory does not exist or cannot be
            written to, or two outputs are one file.
    """
    from flashdip.engine.files import check_writable

    files = [options.output]
    check_writable(options.output, force=options.force)
    if options.report is not None:
        check_writable(options.report, force=options.force)
        files.append(options.report)
    if options.checkpoint is not None:
        check_writable(options.checkpoint, force=True)
        files.append(options.checkpoint)
    directory = options.save_dir
    if directory is not None:
        files += [directory / name for name in _SAVED]
    taken = set()
    for file in files:
        if (resolved := file.resolve()) in taken:
            raise OutputError(
                f"{one_line(file)}: expected a file for each output, got one that two are to be "
                "written to: choose another name for one of them"
            )
        taken.add(resolved)
    if directory is None:
        return
    if not directory.exists():
        check_writable(directory, force=False)
    elif not directory.is_dir():
        raise OutputError(
            f"{one_line(directory)}: expected a directory for --save-dir, got a file: choose "
            "another name"
        )
    else:
        for name in _SAVED:
            check_writable(directory / name, force=options.force)


def _report(result: "Result", options: RunOptions) -> None:
    if options.as_json:
        record = result.record | {"picture": str(options.output)}
        typer.echo(json.dumps(record, indent=1, allow_nan=False))
    if not options.quiet:
        quality = "" if result.psnr is None else f", {result.psnr:.2f} dB against the truth"
        typer.echo(f"{options.output} written{quality}", err=True)
