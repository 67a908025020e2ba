"""The command that restores many pictures: `flashdip batch`."""

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashdip.engine.command_options import SharedOptions, with_options
from flashdip.engine.errors import ConfigError

if TYPE_CHECKING:
    from flashdip.engine.batch.driver import Source
    from flashdip.engine.batch.inputs import Maker
    from flashdip.engine.batch.journal import Journal
    from flashdip.engine.batch.pictures import PictureJob
    from flashdip.engine.batch.pool import Pool
    from flashdip.engine.batch.progress import Tally
    from flashdip.engine.batch.storage import Outputs
    from flashdip.engine.batch.worker import Station
    from flashdip.engine.config import FitConfig
    from flashdip.engine.progress import Interruption

_TASK = "Task"
_BATCH = "Batch"


@dataclass(frozen=True, kw_only=True)
class BatchOptions(SharedOptions):
    """What the command line says about a batch."""

    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder, or fsspec address such as s3://bucket/folder, to publish in.",
        ),
    ]
    task: Annotated[str, typer.Option(help="denoise, superres, inpaint, dejpeg or restore.")] = (
        "denoise"
    )
    truth: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_TASK,
            metavar="DIR",
            help="Holds undamaged pictures of the same names, to report PSNR against.",
        ),
    ] = None
    mask: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_TASK,
            metavar="FILE or DIR",
            help="inpaint: one mask for all, or a folder of masks of the same names.",
        ),
    ] = None
    keep_known: Annotated[
        bool | None,
        typer.Option(
            "--keep-known/--no-keep-known",
            rich_help_panel=_TASK,
            help="inpaint, restore: paste the known pixels back; yes if not given.",
        ),
    ] = None
    missing: Annotated[
        str | None,
        typer.Option(rich_help_panel=_TASK, metavar="MARK", help="restore: zero, nan, alpha, ..."),
    ] = None
    factor: Annotated[
        int | None, typer.Option(rich_help_panel=_TASK, help="superres: whole number, at least 2.")
    ] = None
    kernel: Annotated[
        str | None, typer.Option(rich_help_panel=_TASK, help="superres: lanczos2, box, ...")
    ] = None
    suffix: Annotated[
        str | None,
        typer.Option(
            "--format",
            rich_help_panel=_BATCH,
            metavar="SUFFIX",
            help="png, jpg, webp or tif for all outputs; as each input if not given.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_BATCH,
            help="Processes on a CPU, which share its cores; one a core if not given.",
        ),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_BATCH,
            metavar="ADDRESS",
            help="Run on the Ray cluster there; auto: on this machine's. Needs the extra cluster.",
        ),
    ] = None
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            rich_help_panel=_BATCH,
            help="Keep serving: pictures are picked up when they are complete, until Ctrl-C.",
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=_BATCH, help="Print what would be done, and end."
        ),
    ] = False
    as_json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=_BATCH, help="Print summary.json on stdout."),
    ] = False
    journal: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_BATCH,
            metavar="FILE",
            help="Where the journal lies, on a local disk; in DIR/.flashdip if not given.",
        ),
    ] = None


@with_options
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS...",
            help="Pictures, folders, patterns, or one manifest (.csv, .jsonl).",
        ),
    ],
    options: BatchOptions,
) -> None:
    """Restore many pictures; a second run goes on.

    Example: flashdip batch photos --task denoise -o restored
    """
    from flashdip.engine.batch.driver import Listed
    from flashdip.engine.batch.inputs import expand
    from flashdip.engine.batch.machine import cores
    from flashdip.engine.batch.storage import Outputs, checked
    from flashdip.engine.progress import Interruption

    outputs = Outputs(checked(options.output))
    maker = _maker(options, outputs)
    found = [] if options.watch else expand(inputs, outputs)
    jobs = maker.jobs(found)
    recipes = {id(each): each for each in (maker.recipe, *(job.recipe for job, _ in jobs))}
    configs = [recipe.config for recipe in recipes.values()]
    count = cores() if options.watch else len(jobs)
    if options.dry_run:
        _show_plan([job for job, _ in jobs], options, configs, maker.needs.idle)
        return
    with Interruption() as interruption, outputs.sole(), _journal(options, outputs) as journal:
        outputs.prepare()
        source: Source
        if options.watch:
            from flashdip.engine.batch.watch import Watched

            source = Watched(inputs, maker)
        else:
            source = Listed(jobs)
        with closing(_pool(options, configs, count, maker.needs.idle)) as pool:
            interruption.arm()
            tally = _drive(source, pool, journal, interruption, options.quiet)
        outputs.sweep()
        _end(journal, outputs, options, tally)
    if interruption.signal is not None:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(128 + interruption.signal)
    if tally.failed or tally.diverged:
        raise typer.Exit(1)


def _maker(options: BatchOptions, outputs: "Outputs") -> "Maker":
    from flashdip.engine.batch.inputs import Maker
    from flashdip.engine.batch.machine import Needs
    from flashdip.engine.batch.storage import checked

    given = {name: value for name, value in options.fit_options().items() if value is not None}
    for name in ("device", "memory"):  # of the workers
        given.pop(name, None)
    names = ("factor", "kernel", "missing", "keep_known")
    own = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.mask is not None and options.task != "inpaint":
        raise ConfigError(f"mask: {options.task} takes none: choose --task inpaint")
    suffix = None if options.suffix is None else f".{options.suffix.removeprefix('.')}"
    mask, truth = (
        None if each is None else checked(each) for each in (options.mask, options.truth)
    )
    precision: Any = given.get("precision", "auto")  # told to be one by the config
    needs = Needs(options.backend, options.device, precision)
    return Maker(options.task, given, own, outputs, mask, truth, suffix, options.force, needs)


def _journal(options: BatchOptions, outputs: "Outputs") -> "Journal":
    from flashdip.engine.batch.journal import Journal
    from flashdip.engine.batch.storage import OWN, remote
    from flashdip.engine.files import user_cache

    path = options.journal
    if path is None and remote(outputs.address):
        path = user_cache() / f"batch-{hashlib.sha256(outputs.address.encode()).hexdigest()}.sqlite"
    return Journal(path or Path(outputs.address, OWN, "journal.sqlite"))


def _stations(
    options: BatchOptions, configs: list["FitConfig"], jobs: int, idle: int
) -> list["Station"]:
    from flashdip.engine.batch.machine import stations

    return stations(
        options.backend,
        options.device,
        configs,
        options.workers,
        jobs,
        idle=idle,
        limit=options.memory,
    )


def _pool(options: BatchOptions, configs: list["FitConfig"], jobs: int, idle: int) -> "Pool":
    """Start the workers, here or on a cluster; each takes so many bytes while it is idle."""
    from flashdip.engine.batch.pool import LocalPool
    from flashdip.engine.batch.ray_pool import RayPool
    from flashdip.engine.planning import bytes_of, size

    if options.ray is None:
        return LocalPool(_stations(options, configs, jobs, idle))
    if options.workers is not None:
        raise ConfigError(
            "workers: with --ray the cluster decides how many there are: leave it out"
        )
    room = None if options.memory is None else bytes_of(options.memory) - idle
    if room is not None and room <= 0:
        raise ConfigError(f"memory: expected more than {size(idle)}, which an idle worker takes")
    return RayPool(
        options.ray, backend=options.backend, device=options.device, idle=idle, room=room
    )


def _show_plan(
    jobs: list["PictureJob"], options: BatchOptions, configs: list["FitConfig"], idle: int
) -> None:
    from rich.console import Console

    from flashdip.engine.batch.plan import plan

    if options.watch or options.ray is not None:
        raise ConfigError(
            "dry-run: plans what is there, for this machine: leave out --watch, --ray"
        )
    found = plan(jobs, _stations(options, configs, len(jobs), idle), idle)
    if options.as_json:
        typer.echo(json.dumps(found.record(), indent=1))
    else:
        found.show(Console(highlight=False))


def _drive(
    source: "Source", pool: "Pool", journal: "Journal", interruption: "Interruption", quiet: bool
) -> "Tally":
    from flashdip.engine.batch.driver import drive
    from flashdip.engine.batch.progress import Tally, show_batch

    tally = Tally()
    with show_batch(quiet=quiet) as show:
        for outcome in drive(source, pool, journal, interrupted=interruption):
            if outcome is not None:
                tally.count(outcome)
            tally.left, tally.running = journal.left, pool.busy
            tally.part = journal.pixels_done / max(1, journal.pixels_done + journal.pixels_left)
            show(tally, outcome)
    return tally


def _end(journal: "Journal", outputs: "Outputs", options: BatchOptions, tally: "Tally") -> None:
    """Write the summary, and say what there is."""
    from flashdip.engine.batch.summary import write
    from flashdip.engine.files import one_line

    summary = write(journal, outputs, options.task, tally)
    if options.as_json:
        typer.echo(json.dumps(summary, indent=1, allow_nan=False))
    if not options.quiet:
        typer.echo(f"{tally.line()}; see {one_line(outputs.address)}/index.html", err=True)
