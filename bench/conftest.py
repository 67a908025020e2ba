"""The suite under pytest-benchmark: its options, the machine it ran on, what it measures once.

    pytest bench/bench_step.py --benchmark-json before.json
    pytest bench/bench_step.py --benchmark-compare before.json

Rows of one module take turns, those that were selected. Each shows a figure only after its gate.
With --benchmark-disable nothing is measured, and only the gates are run.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from flashdip.bench import ceilings, machine, suite
from flashdip.bench.booking import LEDGER, book, device_of
from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.turns import Plan
from flashdip.engine.backends import BACKENDS

STATE = pytest.StashKey[dict[str, Any]]()
LIMITS = pytest.StashKey[Ceilings]()
Show = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the benches may be told."""
    group = parser.getgroup("flashdip")
    group.addoption("--bench-device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    group.addoption("--bench-sizes", default="64,256", help="pixels a side, with commas")
    group.addoption("--bench-fits", default="1", help="fits side by side, with commas")
    group.addoption("--bench-seconds", type=float, default=120.0, help="of measuring, a module")
    group.addoption(
        "--across-machines", action="store_true", help="compare different machines all the same"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Note what the machine is doing before anything is measured."""
    config.stash[STATE] = machine.state(device_of(config))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add device, driver, versions and commit."""
    machine_info["flashdip"] = machine.survey(device_of(config))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add what changes: clocks, heat, power and load before and after, and what was reached."""
    limits = config.stash.get(LIMITS, None)
    output_json["flashdip"] = {
        "before": config.stash[STATE],
        "after": machine.state(device_of(config)),
        "ceilings": None if limits is None else limits.record(),
    }


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Refuse to compare with another machine, unless that was asked for."""
    own = machine_info["flashdip"]["hardware"]
    other = compared_benchmark["machine_info"].get("flashdip", {}).get("hardware")
    if own != other and not config.getoption("--across-machines"):
        raise pytest.UsageError(
            f"expected a result of this machine, {own}, got one of {other}: compare them all the "
            "same with --across-machines"
        )


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> Ceilings:
    """Measure what the machine can do at most, once."""
    device = device_of(pytestconfig)
    own = {b.precision(device) for b in BACKENDS if device.type in b.devices}
    found = ceilings.ceilings(device, sorted(own | {"fp32"}))
    pytestconfig.stash[LIMITS] = found
    return found


@pytest.fixture(scope="module")
def turns(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Return what measures all selected benches of the module and of one group, once."""
    found: dict[str, dict[str, Any]] = {}

    def measure(group: str, **options: Any) -> dict[str, Any]:
        if group not in found:
            seconds = float(request.config.getoption("--bench-seconds"))
            plan = Plan(seconds, **options.pop("plan", {}))
            selected: list[tuple[str, Bench]] = [
                getattr(item, "callspec").params["bench"]  # noqa: B009 (pytest types it away)
                for item in request.session.items
                if item.path == request.path
            ]
            chosen = [bench for name, bench in selected if name == group]
            found[group] = suite.results(chosen, plan, **options)
        return found[group]

    return measure


@pytest.fixture
def show(benchmark: Any) -> Show:
    """Return what books a bench's row, or fails with the reason why there is none."""

    def find(group: str, bench: Bench, measure: Callable[[], Mapping[str, Any]]) -> None:
        if benchmark.disabled:
            if bench.check is not None:
                benchmark.pedantic(bench.check)
            return
        found = measure()
        if bench.name in found["left_out"]:
            pytest.fail(found["left_out"][bench.name], pytrace=False)
        book(benchmark, group, next(r for r in found["results"] if r["name"] == bench.name))

    return find


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every bench the ledger for a clock."""
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=LEDGER))
