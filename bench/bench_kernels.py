"""Each operation by itself: op x shape x precision x op set, forward and with its gradients."""

from functools import cache
from typing import Any

import pytest

from flashdip.bench import ops
from flashdip.bench.booking import book, device_of, numbers
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.ops import Case

PRECISIONS = ("fp32", "bf16")
PASSES = ("forward", "forward and backward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a bench of each combination."""
    listed = [
        (case, provider, passes)
        for size in numbers(metafunc.config, "--bench-sizes")
        for case in ops.cases(size)
        for passes in (PASSES if case.op not in ("adam", "perturb") else PASSES[:1])
        for provider in ops.providers(PRECISIONS)
    ]
    ids = [
        f"{case.name}-{case.size[0]}x{case.size[1]}-{opset}-{precision}-{passes}"
        for case, (opset, precision), passes in listed
    ]
    metafunc.parametrize(("case", "provider", "passes"), listed, ids=ids)


@pytest.fixture(scope="module")
def measured(pytestconfig: pytest.Config, limits: Ceilings) -> Any:
    """Return what measures all op sets on a case, once."""
    device = device_of(pytestconfig)
    return cache(lambda case: ops.rows(case, device, ops.providers(PRECISIONS), limits))


def bench_op(
    case: Case, provider: tuple[str, str], passes: str, request: Any, benchmark: Any
) -> None:
    """Seconds of one call, and the share of the roof."""
    if benchmark.disabled:
        benchmark.pedantic(ops.check, (case, device_of(request.config), *provider))
        return
    rows, left_out = request.getfixturevalue("measured")(case)
    name = f"{case.name}, {provider[0]} ({provider[1]})"
    if name in left_out:
        pytest.fail(left_out[name], pytrace=False)
    wanted = {"passes": passes, "opset": provider[0], "precision": provider[1]}
    row = next(r for r in rows if wanted.items() <= r["parameters"].items())
    book(benchmark, f"{case.name}, {case.size[0]}x{case.size[1]}, {passes}", row)
