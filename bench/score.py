"""The all-in-one benchmark: how many pictures an hour, and what stands behind that number.

The score is 512x512 `balanced` restorations an hour, at the number of fits side by side that is
best. A restoration is counted with all the iterations that the preset allows; its statistics are
kept and read as in a fit. Setting up is left out: fits take each other's places in one step.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from flashdip.bench import baselines
from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import judged
from flashdip.bench.measure import worker
from flashdip.bench.scenarios import step_work, yardsticks
from flashdip.bench.suite import results
from flashdip.bench.turns import Plan
from flashdip.engine.errors import UnavailableError
from flashdip.engine.presets import preset

SIZE, PRESET = 512, "balanced"
OTHERS = (256, 1024)  # sizes
JUDGED = 64  # pixels a side of the picture that shows whether a step is right
FITS_ON_CPU = (1, 2)  # that are tried side by side
FITS = (1, 4, 16)  # elsewhere
PARTS = 10  # of the sustained run
ROUNDS = 7
SCORED = 0.7  # share of the time that the score itself may take, the sustained run aside
SETUP = 10.0  # seconds that are kept for setting the sustained run up


_judged = cache(judged)  # a gate is the same for every size that is measured


def balanced(size: int, device: torch.device, backend: str, precision: str, fits: int) -> Bench:
    """Return the preset's iteration as a fit makes it."""
    parameters = {"backend": backend, "precision": precision, "size": size, "fits": fits}
    judge = partial(_judged, JUDGED, str(device), backend, precision, PRESET, fits)
    return Bench(
        f"{backend} ({precision}), {PRESET} {size}, F = {fits}",
        baselines.engine,
        (size, str(device), backend, precision, fits, PRESET, True),
        parameters | {"network": PRESET},
        fits,
        judge,
    )


def run(
    device: torch.device,
    backend: str,
    precision: str,
    ceilings: Ceilings,
    *,
    size: int = SIZE,
    others: Sequence[int] = OTHERS,
    fits: Sequence[int] | None = None,
    seconds: float,
    sustained: float = 30.0,
    meter: Callable[[], float] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure everything; return what `schema.document` takes as `found` and as `score`.

    Args:
        device: What is measured.
        backend: That runs.
        precision: Of stored activations.
        ceilings: Of the device.
        size: Of the pictures that are counted, in pixels a side.
        others: Sizes whose rate is told beside it.
        fits: Numbers of fits side by side to try; the first must be 1.
        seconds: That everything may take; what there is no time for is left out.
        sustained: Seconds of the sustained run, fewer than `seconds`.
        meter: Joules that the device has used so far, or None.
        tell: Is told what is being done.

    Raises:
        UnavailableError: The preset could not be measured, or computes the wrong thing.
    """
    deadline = time.monotonic() + seconds - sustained - SETUP
    tried = fits or (FITS_ON_CPU if device.type == "cpu" else FITS)
    mine = [balanced(size, device, backend, precision, each) for each in tried]
    groups = [[*mine, *yardsticks(size, device)]]
    groups += [[balanced(other, device, backend, precision, 1)] for other in others]
    found: dict[str, Any] = {"results": [], "left_out": {}}
    for number, group in enumerate(groups):
        share = SCORED if number == 0 else 1 / (len(groups) - number)
        plan = Plan(share * (deadline - time.monotonic()), ROUNDS)
        more = results(group, plan, work=step_work, ceilings=ceilings, meter=meter, tell=tell)
        found["results"] += more["results"]
        found["left_out"] |= more["left_out"]
    # The published loop comes last, so that it can take no time from what is scored; shown first.
    found["results"].sort(key=lambda row: row["parameters"]["network"] == PRESET)
    rows = {row["name"]: row for row in found["results"]}
    if mine[0].name not in rows:
        raise UnavailableError(
            f"no score, {mine[0].name} could not be measured within the {seconds:.0f} s of "
            f"--seconds: {found['left_out'][mine[0].name]}"
        )
    ours = [bench for bench in mine if bench.name in rows]
    best = min(ours, key=lambda bench: float(rows[bench.name]["seconds"]["median"]))
    iterations = preset("denoise", PRESET).iterations
    rates = {
        str(row["parameters"]["size"]): 1 / row["seconds"]["median"]
        for row in found["results"]
        if row["parameters"].get("network") == PRESET and row["parameters"]["fits"] == 1
    }
    tell(f"{best.name}: {sustained:.0f} s without a pause")
    steady, watts = _sustained(best, sustained, float(rows[best.name]["seconds"]["median"]), meter)
    score = {
        "restorations_per_hour": 3600 / (iterations * rows[best.name]["seconds"]["median"]),
        "size": size,
        "preset": PRESET,
        "iterations": iterations,
        "backend": backend,
        "precision": precision,
        "fits": best.fits,
        "iterations_per_second": dict(sorted(rates.items(), key=lambda pair: int(pair[0]))),
        "watts": watts,
        "sustained": steady,
    }
    return found, score


def _sustained(
    bench: Bench, seconds: float, iteration: float, meter: Callable[[], float] | None
) -> tuple[dict[str, Any], float | None]:
    """Run a bench for a while; return iterations a second over its parts, and watts.

    Args:
        bench: What runs.
        seconds: How long.
        iteration: Seconds that one iteration of one fit takes.
        meter: See `run`.
    """
    steps = max(1, round(seconds / PARTS / (iteration * bench.fits)))
    with worker(bench.make, *bench.arguments) as running:
        running.seconds(steps=1, warmup=1)
        before = None if meter is None else meter()
        taken = [running.seconds(steps=steps, warmup=0) for _ in range(PARTS)]
        used = None if meter is None or before is None else meter() - before
    rates = [bench.fits / each for each in taken]
    whole = steps * sum(taken)
    steady = {"seconds": whole, "samples": rates, "kept": rates[-1] / rates[0]}
    return steady, None if used is None else used / whole
