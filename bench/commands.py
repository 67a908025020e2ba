"""`flashdip bench`: benchmarks for people; `scenarios`, `ops` and `score` hold what is measured."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashdip.engine.errors import ConfigError, UnavailableError
from flashdip.engine.files import atomic, check_writable

if TYPE_CHECKING:
    import torch

    from flashdip.bench.ceilings import Ceilings

app = typer.Typer(
    help="Benchmark this machine, and compare results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RESULTS = Path(__file__).parent / "results"

Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the result, as JSON.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ... or auto.")]
Backend = Annotated[str, typer.Option(help="NAME or NAME:PRECISION; see 'flashdip doctor'.")]
Measure = Callable[["torch.device", "Ceilings", Callable[[], float] | None], tuple[Any, Any]]


@app.command()
def step(
    size: Annotated[int, typer.Option(min=64, help="Pixels a side.")] = 256,
    fits: Annotated[str, typer.Option(help="Fits side by side, with commas.")] = "1",
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAME[:PRECISION],...", help="All that can run here, if not given."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="The most samples of each row.")] = 15,
    seconds: Annotated[float, typer.Option(min=1, help="Of measuring, set-up included.")] = 210.0,
    device: Device = "auto",
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """One iteration of the published network: the published loop against each backend.

    Example: flashdip bench step --size 256 -o before.json
    """

    def measure(place: Any, ceilings: Any, meter: Any) -> tuple[Any, Any]:
        from flashdip.bench import scenarios
        from flashdip.bench.suite import results
        from flashdip.bench.turns import Plan

        listed = backends.split(",") if backends else scenarios.default_backends(place)
        benches = scenarios.steps(size, place, listed, counts)
        plan = Plan(seconds, rounds, block=1.5 if place.type == "cpu" else 0.5)
        more = {"ceilings": ceilings, "meter": meter, "tell": _tell}
        return results(benches, plan, work=scenarios.step_work, **more), None

    counts = _whole_numbers("--fits", fits)
    _run("step", device, measure, output, force, as_json, backends)


@app.command()
def restore(
    size: Annotated[int, typer.Option(min=64, max=384, help="Pixels a side.")] = 64,
    target: Annotated[float, typer.Option(help="PSNR of the averaged output, in dB.")] = 26.0,
    presets: Annotated[str, typer.Option(help="For denoising, with commas.")] = "quick,balanced",
    backend: Backend = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="Restorations in each row.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Of measuring, set-up included.")] = 900.0,
    device: Device = "auto",
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Whole restorations: seconds until a noisy photograph is good enough.

    Example: flashdip bench restore --size 64 --target 26
    """

    def measure(place: Any, ceilings: Any, meter: Any) -> tuple[Any, Any]:
        from flashdip.bench import scenarios
        from flashdip.bench.suite import results
        from flashdip.bench.turns import Plan

        benches = scenarios.restorations(size, target, place, backend, presets.split(","))
        plan = Plan(seconds, rounds, setup=seconds / 2, warm=False)
        return results(benches, plan, meter=meter, tell=_tell), None

    from flashdip.engine.presets import preset

    for name in presets.split(","):
        preset("denoise", name)  # a wrong name is to be told before anything is measured
    _run("restore", device, measure, output, force, as_json, backend)


@app.command()
def kernels(
    size: Annotated[int, typer.Option(min=64, help="Pixels a side of the picture.")] = 256,
    precisions: Annotated[
        str | None, typer.Option(help="fp32, bf16, with commas; what suits the device.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Samples of each row.")] = 7,
    device: Device = "auto",
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Each operation by itself: shapes, precisions and op sets; on a GPU each Triton launch too.

    Example: flashdip bench kernels --size 256
    """

    def measure(place: Any, ceilings: Any, meter: Any) -> tuple[Any, Any]:
        from flashdip.bench import launches, ops

        found: dict[str, Any] = {"results": [], "left_out": {}}
        providers = ops.providers(precisions.split(",") if precisions else _precisions(place))
        for case in ops.cases(size):
            _tell(f"{case.name}: is it right, how fast is it?")
            rows, left_out = ops.rows(case, place, providers, ceilings, rounds=rounds)
            found["results"] += rows
            found["left_out"] |= left_out
        found["results"] += launches.rows(size, place, ceilings, rounds=rounds, tell=_tell)
        return found, None

    if unknown := {*precisions.split(",")} - {"fp32", "bf16"} if precisions else set():
        raise ConfigError(f"--precisions: expected fp32, bf16, got {min(unknown)!r}")
    _run("kernels", device, measure, output, force, as_json)


@app.command()
def gpu(
    backend: Backend = "auto",
    seconds: Annotated[float, typer.Option(min=1, help="That everything may take.")] = 300.0,
    sustained: Annotated[
        float, typer.Option(min=0, help="Seconds of the run without a pause, at the end.")
    ] = 30.0,
    device: Device = "auto",
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """All in one: 512x512 restorations an hour, and what stands behind that; on a CPU too.

    Example: flashdip bench gpu -o bench/results/NAME.json
    """

    begun = time.monotonic()

    def measure(place: Any, ceilings: Any, meter: Any) -> tuple[Any, Any]:
        from flashdip.bench import scenarios, score

        own, precision = scenarios.chosen(backend, place, score.PRESET)
        return score.run(
            place,
            own,
            precision,
            ceilings,
            seconds=begun + seconds - time.monotonic(),
            sustained=sustained,
            meter=meter,
            tell=_tell,
        )

    if not sustained < seconds:
        raise ConfigError(
            f"--sustained: expected fewer than --seconds, {seconds:g}, got {sustained:g}"
        )
    _run("gpu", device, measure, output, force, as_json, backend)


@app.command()
def cpu(
    sizes: Annotated[str, typer.Option(help="Pixels a side, with commas.")] = "256,512",
    upsample: Annotated[
        str, typer.Option(help="How the network enlarges, with commas.")
    ] = "bilinear,nearest",
    compiled: Annotated[
        str, typer.Option(help="Sizes at which torch.compile is measured, with commas, or none.")
    ] = "256",
    rounds: Annotated[int, typer.Option(min=3, help="The most samples of each row.")] = 7,
    seconds: Annotated[
        float, typer.Option(help="That it may take, gates and set-up included.")
    ] = 840.0,
    fits: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded by 'python -m flashdip.bench.quality'."),
    ] = None,
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """This CPU: iterations a second, and seconds to equal quality, against the published loop.

    Example: flashdip bench cpu --sizes 256 -o mine.json
    """

    def measure(place: Any, ceilings: Any, meter: Any) -> tuple[Any, Any]:
        limit = yardstick.patience(seconds)
        listed, left_out = yardstick.groups(sides, modes, rounds, at, recorded, narrow, limit)
        found = yardstick.run(listed, rounds=rounds, seconds=seconds, ceilings=ceilings, tell=_tell)
        return found | {"left_out": left_out | found["left_out"]}, None

    from flashdip.bench import cpu as yardstick
    from flashdip.bench import quality

    narrow = yardstick.convolves_bf16()
    modes = list(dict.fromkeys(upsample.split(",")))
    sides = list(dict.fromkeys(_whole_numbers("--sizes", sizes)))
    if unknown := {*modes} - {"bilinear", "nearest"}:
        raise ConfigError(f"--upsample: expected bilinear, nearest, got {min(unknown)!r}")
    for size in sides:
        if size < 64 or size % 32:
            raise ConfigError(f"--sizes: expected multiples of 32 from 64 on, got {size}")
    at = [] if compiled == "none" else _whole_numbers("--compiled", compiled)
    file = fits or quality.FILE
    recorded = quality.read(file) if fits is not None or file.exists() else None
    _run("cpu", "cpu", measure, output, force, as_json, "native:bf16" if narrow else None)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="BEFORE.json AFTER.json...")],
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Compare different machines all the same.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw all rows: .png, .svg or .pdf (needs matplotlib)."),
    ] = None,
    force: Force = False,
) -> None:
    """Say what became slower, faster, or cannot be told; exit code 1 if anything became slower.

    Example: flashdip bench compare before.json after.json --picture change.png
    """
    from flashdip.bench import compare as comparison
    from flashdip.bench import schema, show

    if len(files) < 2:
        raise ConfigError(f"compare: expected two results or more, got {len(files)}")
    if picture is not None:
        check_writable(picture, force=force)
    (name, base), *others = results = [(str(path), schema.read(path)) for path in files]
    if not across_machines:
        comparison.require_one_machine(dict(results))
    console, slower = show.console(), False
    for other, result in others:
        changes = comparison.compare(base, result)
        console.print(f"{name} -> {other}", soft_wrap=True)
        for line in comparison.software(base, result):
            console.print(line, soft_wrap=True)
        console.print(show.changes(changes))
        for line in comparison.unmatched({name: base, other: result}):
            console.print(line, soft_wrap=True)
        slower = slower or any(change.verdict == "slower" for change in changes)
    if picture is not None:
        with atomic(picture, force=force) as temporary:
            comparison.draw(temporary, *zip(*results, strict=True))
    if slower:
        raise typer.Exit(1)


@app.command()
def validate(files: Annotated[list[Path], typer.Argument(metavar="FILE.json...")]) -> None:
    """Check that files are results as docs/benchmarks.md describes them."""
    from flashdip.bench import schema

    for path in files:
        result = schema.read(path)
        typer.echo(f"{path}: a result of 'flashdip bench {result['kind']}'")


@app.command()
def leaderboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR")] = RESULTS,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="leaderboard.html there.")
    ] = None,
) -> None:
    """Draw the leaderboard from the results in a folder, as one page of HTML."""
    from flashdip.bench import leaderboard as board

    results = board.collect(directory)
    target = output or directory / "leaderboard.html"
    with atomic(target, force=True) as temporary:
        temporary.write_text(board.draw(results), encoding="utf-8")
    typer.echo(f"results: {len(results)}, drawn into {target}")


def _run(
    kind: str,
    device: str,
    measure: Measure,
    output: Path | None,
    force: bool,
    as_json: bool,
    backends: str | None = None,
) -> None:
    """Measure ceilings and benches on a device; show or print the result, and write it."""
    from flashdip.bench import ceilings, machine, scenarios, schema, show
    from flashdip.engine.backends import resolve_device

    if output is not None:
        check_writable(output, force=force)
    place = resolve_device(device)
    before = machine.state(place)
    named = (scenarios.chosen(each, place)[1] for each in (backends or "auto").split(","))
    precisions = {*_precisions(place), *named}
    _tell("measuring what the machine can do at most: a copy and matrix products")
    limits = ceilings.ceilings(place, sorted(precisions))
    try:
        found, score = measure(place, limits, machine.joules(place))
    except TimeoutError as error:
        raise UnavailableError(f"bench: {error}: give it more --seconds") from None
    surveyed, after = machine.survey(place), machine.state(place)
    result = schema.document(kind, surveyed, before, after, limits.record(), found, score)
    if output is not None:
        schema.write(output, result, force=force)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show.show(result, show.console())
    if not result["results"]:
        raise typer.Exit(1)


def _precisions(place: "torch.device") -> list[str]:
    """Return float32, and what the backends that are made for a device choose there."""
    from flashdip.engine.backends import BACKENDS

    own = {b.precision(place) for b in BACKENDS if place.type in b.devices}
    return ["fp32", *sorted(own - {"fp32"})]


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option}: expected whole numbers from 1, with commas, got {text!r}")
    return numbers


def _tell(line: str) -> None:
    typer.echo(f"bench: {line}", err=True)
