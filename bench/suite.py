"""Run benches: gates first, then what passed in turns; rows as the schema has them.

`flashdip bench`, `bench_*.py` and `make bench-gpu` all measure through here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import WrongResultError
from flashdip.bench.measure import Timing
from flashdip.bench.turns import Plan, compare
from flashdip.bench.work import Work, roof, total
from flashdip.engine.files import one_line

ENERGY = ("joules", "watts")


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
