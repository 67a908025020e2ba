"""One iteration of the published network: the published loop; backend x size x precision x F."""

from typing import Any

import pytest

from flashdip.bench import scenarios
from flashdip.bench.booking import device_of, numbers
from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.engine.backends import BACKENDS
from flashdip.engine.config import FitConfig


def entries(device: Any) -> list[str]:
    """Return every backend that is made for a device, in each precision that it has there."""
    return [
        f"{backend.name}:{precision}"
        for backend in BACKENDS
        if device.type in backend.devices
        for precision in ("fp32", "bf16", "fp16")
        if not backend.unavailable(device, FitConfig(precision=precision))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a bench of each combination."""
    config = metafunc.config
    device, fits = device_of(config), numbers(config, "--bench-fits")
    listed = [
        (f"step {size}", bench)
        for size in numbers(config, "--bench-sizes")
        for bench in scenarios.steps(size, device, entries(device), fits)
    ]
    metafunc.parametrize("bench", listed, ids=[f"{g}-{bench.name}" for g, bench in listed])


def bench_step(bench: tuple[str, Bench], limits: Ceilings, turns: Any, show: Any) -> None:
    """Seconds of one iteration of one fit, and the share of the roof."""
    group, own = bench
    options = {"work": scenarios.step_work, "ceilings": limits}
    show(group, own, lambda: turns(group, **options))
