"""What a restoring command does with `--sequence`: frames in, frames out."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import typer

from flashdip.engine.command_options import RunOptions
from flashdip.engine.errors import ConfigError
from flashdip.engine.files import one_line


def run(task: str, path: Path, options: RunOptions, own: dict[str, Any]) -> None:
    """Restore a sequence, showing progress; write it, report, and exit with the code.

    Frames that are done are kept beside the output, or where --checkpoint says, and the same
    command goes on from there.

    Args:
        task: Name of the task.
        path: A folder, a TIFF of several pages, a picture of several channels, or a video.
        options: Of the command line.
        own: The task's own options.
    """
    for name in ("truth", "save_dir", "report"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected one picture for it, got --sequence: leave "
                "out one of them"
            )
    # From here on torch is needed, which takes a second or two to import.
    from flashdip.engine.frames import check_frames, open_frames, write_frames
    from flashdip.engine.images import MAX_PIXELS, Picture, check_save
    from flashdip.engine.progress import Interruption, show_progress
    from flashdip.engine.sequence import kept_pictures, remove_frames, savings, sequence

    frames = open_frames(path, options.max_pixels or MAX_PIXELS)
    check_frames(options.output, frames, force=options.force)
    folder = options.checkpoint
    if folder is None:
        folder = options.output.with_name(f"{options.output.name}.frames")
    kept = None if options.dry_run else folder
    arguments = own | options.fit_options() | {"checkpoint": kept}
    del arguments["truth"]
    if frames.kind == "folder":  # checked before the first fit: one format each
        arguments["accept"] = partial(_check_each, {Path(n).suffix for n in frames.names})
    elif frames.kind == "pages":
        arguments["accept"] = partial(check_save, options.output)
    if options.dry_run:
        arguments["planned"] = partial(_print_plan, options, len(frames.names))

    records: list[dict[str, Any]] = []
    with Interruption() as interruption, show_progress(task, quiet=options.quiet) as show:
        arguments |= {"callback": interruption.watch(show), "interrupted": interruption}
        for result in sequence(frames.read(), task, **arguments):
            if result.stop_reason == "interrupted":
                typer.echo(
                    f"stopped in frame {len(records) + 1}: those before it are kept in "
                    f"{one_line(folder)}; the same command goes on from there",
                    err=True,
                )
                raise typer.Exit(128 + (interruption.signal or signal.SIGINT))
            records.append(result.record)
        pictures: Iterator[Picture] = kept_pictures(folder, len(records))
        write_frames(options.output, frames, pictures, force=options.force)
    if options.checkpoint is None:
        remove_frames(folder)
    saved = savings(records)
    if options.as_json:
        typer.echo(json.dumps({"sequence": saved, "frames": records}, indent=1, allow_nan=False))
    if not options.quiet:
        typer.echo(f"{one_line(options.output)} written: {_words(saved)}", err=True)
    if any(record["stop_reason"] == "diverged" for record in records):
        typer.echo("a fit diverged; its frame is the last good one", err=True)
        raise typer.Exit(1)


def _check_each(suffixes: set[str], like: Any) -> None:
    from flashdip.engine.images import check_save

    for suffix in sorted(suffixes):
        check_save(f"frame{suffix}", like)


def _print_plan(options: RunOptions, count: int, plan: Any) -> None:
    if options.as_json:
        typer.echo(json.dumps(plan.record() | {"frames": count or None}, indent=1))
    else:
        typer.echo(f"{count or 'some'} frames, each: {plan.line()}")
    raise typer.Exit


def _words(saved: dict[str, Any]) -> str:
    if saved["saved"] is None:
        return f"{saved['frames']} frames, each from random weights"
    return (
        f"{saved['frames']} frames, {saved['cold_iterations']:.0f} iterations from random weights, "
        f"{saved['warm_iterations']:.0f} on average from the frame before: {saved['saved']:.0%} "
        "saved"
    )
