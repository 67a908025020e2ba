"""Run benches: gates first, then variants in turns, each in a process of its own.

What cannot be set up, is wrong or takes too long is left out with the reason, and does not hold the
others up. `flashdip bench`, `bench_*.py` and `make bench-gpu` all measure through here.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import WrongResultError
from flashdip.bench.measure import Timing, Variant, Worker, take_turns, worker
from flashdip.bench.work import Work, roof, total
from flashdip.engine.files import one_line

FEWEST = 3  # rounds; with less there is no spread to tell
ENERGY = ("joules", "watts")

Make = tuple[Callable[..., Variant], tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """How long things are measured.

    Attributes:
        seconds: That everything may take, set-up included.
        rounds: The most samples of each variant.
        block: Seconds of a sample, about; one step at least.
        setup: Seconds until a variant has made its first step.
        warm: Whether untimed steps come before each sample; else a sample is one step.
        energy_block: Seconds over which energy is measured: NVML's counter moves a few times a
            second.
        limits: Instead of `setup`, for the variants that are named.
    """

    seconds: float
    rounds: int = 15
    block: float = 0.5
    setup: float = 180.0
    warm: bool = True
    energy_block: float = 3.0
    limits: Mapping[str, float] = field(default_factory=dict)


def compare(
    made: Mapping[str, tuple[Make, int]],
    plan: Plan,
    *,
    baseline: str = "published",
    start: Callable[..., contextlib.AbstractContextManager[Worker]] | None = None,
    meter: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Measure variants in turns; those that cannot be set up or take too long are left out.

    Args:
        made: How each is made, and how many iterations of one fit its step makes.
        plan: How long.
        baseline: What ratios are taken to, where it is among them.
        start: Starts a worker; None: `measure.worker`.
        meter: Joules that the device has used so far; None: energy is not measured.

    Returns:
        "rows" by name: seconds an iteration of one fit takes ("median", "p10", "p90", "n",
        "samples", and "ratio": how many times as fast as the baseline), "setup" and "first_step" in
        seconds, "memory" in bytes, "joules" an iteration of one fit, "watts" and "facts"; and
        "left_out" by name, with the reason.

    Raises:
        TimeoutError: There is no time for `FEWEST` rounds.
    """
    start = start or worker
    deadline = time.monotonic() + plan.seconds
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Worker] = {}
        seconds: dict[str, float] = {}
        for name, ((make, arguments), _) in made.items():
            allowed = min(plan.limits.get(name, plan.setup), deadline - time.monotonic())
            if allowed <= 0:
                left_out[name] = "no time was left for it"
                continue
            try:
                with contextlib.ExitStack() as own:
                    each = own.enter_context(start(make, *arguments, limit=max(1.0, allowed)))
                    first = each.seconds(steps=1, warmup=0)
                    seconds[name] = first
                    if plan.warm:
                        short = first < plan.block
                        seconds[name] = each.seconds(steps=3 if short else 1, warmup=int(short))
                    stack.push(own.pop_all())
            except TimeoutError:
                left_out[name] = f"no first step within {allowed:.0f} s: cut"
            except Exception as error:  # out of memory, most likely; the others are to go on
                left_out[name] = one_line(f"{type(error).__name__}: {error}")
            else:
                running[name] = each
                rows[name] = {"setup": each.setup, "first_step": first}

        if not running:
            return {"rows": {}, "left_out": left_out}
        block = plan.block if plan.warm else 0.0
        counts = {name: max(1, math.ceil(block / seconds[name])) for name in running}
        # A step that is longer than a block warms itself.
        warmups = {n: math.ceil(0.1 * c) if seconds[n] < block else 0 for n, c in counts.items()}

        def timer(name: str) -> Callable[[], float]:
            options = {"steps": counts[name], "warmup": warmups[name]}
            return lambda: running[name].seconds(**options) / made[name][1]

        begun = time.monotonic()
        left = deadline - begun
        if meter is not None:
            left -= sum(max(plan.energy_block, seconds[name]) for name in running)

        def over(done: int) -> bool:
            spent = time.monotonic() - begun
            return spent + spent / done > left  # no other round would fit

        timings = take_turns(
            {name: timer(name) for name in running},
            rounds=plan.rounds,
            baseline=baseline if baseline in running else None,
            over=over,
        )
        done = next(iter(timings.values())).n
        if done < min(FEWEST, plan.rounds):
            turn = (time.monotonic() - begun) / done
            raise TimeoutError(f"no time left for {FEWEST} rounds of {turn:.1f} s: {left_out}")
        for name, each in running.items():
            rows[name] |= asdict(timings[name]) | {"memory": each.memory(), "facts": each.facts()}
            if meter is not None:
                count = max(1, math.ceil(plan.energy_block / seconds[name]))
                before = meter()
                taken = each.seconds(steps=count, warmup=0)
                used = (meter() - before) / count
                rows[name] |= {"joules": used / made[name][1], "watts": used / taken}
    return {"rows": rows, "left_out": left_out}


@dataclass(frozen=True)
class Judged:
    """Benches that computed the right thing, and what was found of the others.

    Attributes:
        passed: By name, in order.
        gates: By name, each error with what was allowed.
        left_out: By name, with the reason.
    """

    passed: dict[str, Bench]
    gates: dict[str, dict[str, Any]]
    left_out: dict[str, str]


def judge(benches: Iterable[Bench], tell: Callable[[str], None] = lambda line: None) -> Judged:
    """Let benches prove that they compute the right thing; what raises is left out."""
    found = Judged({}, {}, {})
    for bench in benches:
        if bench.check is not None:
            tell(f"{bench.name}: is it right?")
            try:
                found.gates[bench.name] = bench.check()
            except WrongResultError as error:
                found.left_out[bench.name] = one_line(error)
                continue
            except Exception as error:
                found.left_out[bench.name] = one_line(f"{type(error).__name__}: {error}")
                continue
        found.passed[bench.name] = bench
    return found


def results(
    benches: Iterable[Bench] | Judged,
    plan: Plan,
    *,
    work: Callable[[Bench], Mapping[tuple[str, str], Work] | None] = lambda bench: None,
    ceilings: Ceilings | None = None,
    baseline: str = "published",
    meter: Callable[[], float] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Judge and measure benches; return "results" and "left_out" as the schema has them.

    Args:
        benches: What is measured, in order; judged first, unless they were.
        plan: How long the measuring may take, the gates aside.
        work: Returns what one iteration of one fit has to do.
        ceilings: What shares of the roof are taken of, with `work`.
        baseline: What ratios are taken to.
        meter: See `compare`.
        tell: Is told what is being done.
    """
    judged = benches if isinstance(benches, Judged) else judge(benches, tell)
    made = {n: ((each.make, each.arguments), each.fits) for n, each in judged.passed.items()}
    tell(f"measuring {', '.join(made)} in turns, {plan.seconds:.0f} s at most")
    found = compare(made, plan, baseline=baseline, meter=meter)
    rows = []
    for name, figures in found["rows"].items():
        bench = judged.passed[name]
        timing = Timing(**{each.name: figures[each.name] for each in fields(Timing)})
        more = {key: figures.get(key) for key in ("setup", "first_step", "memory", *ENERGY)}
        more |= {"gate": judged.gates.get(name), "facts": figures["facts"]}
        counted = work(bench)
        rows.append(row(name, bench.parameters, timing, baseline, counted, ceilings, **more))
    return {"results": rows, "left_out": judged.left_out | found["left_out"]}


def row(
    name: str,
    parameters: Mapping[str, Any],
    timing: Timing,
    baseline: str,
    counted: Mapping[tuple[str, str], Work] | None = None,
    ceilings: Ceilings | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a row as the schema has it.

    Args:
        name: Of the row.
        parameters: Plain values; "precision" says which matrix product is the ceiling.
        timing: Of one iteration of one fit, or of what the name says.
        baseline: What its ratio is taken to, if it has one.
        counted: What has to be done in that time at least.
        ceilings: What shares of the roof are taken of.
        **more: Further fields; those that are missing are null.
    """
    share, precision = None, parameters.get("precision")
    if counted is not None and ceilings is not None and precision in ceilings.product:
        share = roof(counted, ceilings, precision) / timing.median
    empty = dict.fromkeys(("setup", "first_step", "memory", *ENERGY, "gate"))
    return {
        "name": name,
        "parameters": dict(parameters),
        "seconds": {
            "median": timing.median,
            "p10": timing.p10,
            "p90": timing.p90,
            "n": timing.n,
            "samples": list(timing.samples),
        },
        "baseline": None if timing.ratio is None else baseline,
        "ratio": timing.ratio,
        "work": None if counted is None else total(counted)._asdict(),
        "roof_share": share,
        **(empty | {"facts": {}} | more),
    }
