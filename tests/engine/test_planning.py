"""What a fit is said to need, against what it takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashdip.engine import memory, planning
from flashdip.engine.backends import NATIVE, REFERENCE, TRITON, plans, probe
from flashdip.engine.backends.base import DTYPES
from flashdip.engine.backends.eager import EagerBackend, EagerStep
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.planning import plan
from flashdip.engine.presets import PRESETS
from flashdip.engine.problems import Problem

CPU = torch.device("cpu")
NARROW = FitConfig(
    network=SkipConfig(inputs=8, down=(16, 16, 16), skip=2, upsample="nearest"),
    iterations=6,
    read_every=2,
    window=2,
    stop=("es-wmv",),
)

CORNERS = [PRESETS[key].config.network for key in PRESETS if key[1] == "published-restore2"] + [
    SkipConfig(inputs=4, down=(8, 8), up=(4, 6), upsample="bilinear", kernel_down=5),
    SkipConfig(inputs=4, down=(8, 8), downsample="max", act="ELU", pad="zero", bias=False),
    SkipConfig(inputs=4, down=(128, 128)),  # what is kept of wide maps does not depend on size
]


@pytest.mark.parametrize("network", CORNERS, ids=["restore2", "bilinear", "max", "wide"])
@pytest.mark.parametrize(
    ("backend", "recalls"),
    [(NATIVE, False), (NATIVE, True), (REFERENCE, False)],
    ids=["native", "recalling", "reference"],
)
def test_three_sizes_tell_every_map_of_all_others(
    backend: EagerBackend, recalls: bool, network: SkipConfig
) -> None:
    """To the byte, of a picture that is no square."""

    def step(config: FitConfig, problem: Problem) -> EagerStep:
        return EagerStep(backend.ops(), problem, config, CPU, torch.float32, None)

    config = FitConfig(network=network)
    height, width = network.network_size(100, 230)
    one = step(config, Problem(torch.zeros(1, 3, height, width), (3, height, width)))
    found = probe._seen(one, recalls)
    more = 3 * max(found[1:]) if recalls else max(found)
    assert probe.kept(config, step, recalls).used(height, width) == sum(found) + more


def test_the_kernels_plan_counts_for_triton() -> None:
    own = plans.architecture(CPU)
    config = replace(NARROW, stop=("fixed",))
    expected = plans.memory(config, (1, 40, 48), DTYPES["fp16"], own, 1)
    assert TRITON.memory(config, (1, 40, 48), CPU, "fp16") == expected > 0


def test_time_is_extrapolated_from_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant and a share of the pixels that the network sees; small pictures are measured."""
    asked = []

    def timed(backend: object, config: object, shape: tuple[int, ...], *rest: object) -> float:
        asked.append(shape)
        return 0.5 + 1e-6 * shape[1] * shape[2]

    monkeypatch.setattr(planning, "_timed", timed)
    large = plan(replace(NARROW, iterations=10), (3, 1001, 2000), device="cpu")
    assert asked == [(3, 128, 128), (3, 256, 256)]
    assert large.seconds_per_iteration == pytest.approx(0.5 + 1e-6 * 1008 * 2000)
    assert large.seconds == pytest.approx(10 * (0.5 + 1e-6 * 1008 * 2000))
    more = plan(replace(NARROW, iterations=10, runs=3), (3, 1001, 2000), device="cpu")
    assert more.seconds == pytest.approx(3 * (large.seconds or 0))
    plan(NARROW, (3, 40, 50), device="cpu")
    assert asked[4:] == [(3, 40, 56)]


def test_a_plan_in_words_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    found = plan(replace(NARROW, precision="fp32"), (3, 24, 32), device="cpu", factor=None)
    assert not found.fits
    assert found.line().startswith("32x24 pixels on cpu (native, fp32): ")
    assert "of memory of 1 MB available, at most about " in found.line()
    assert json.loads(json.dumps(found.record()))["fits"] is False
    monkeypatch.setattr(memory, "available", lambda device: None)
    untimed = plan(NARROW, (3, 24, 32), device="cpu", timed=False)
    assert untimed.fits
    assert untimed.seconds is None
    assert "available" not in untimed.line()
    with pytest.raises(ConfigError, match="backend: expected one of"):
        plan(NARROW, (3, 24, 32), backend="fast")


def test_the_least_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the groups that this process is in, dropped caches not counted; both versions of them."""
    assert memory.resident() is None or 10**7 < (memory.resident() or 0) < 10**12
    machine = memory.available(CPU)
    assert machine is not None
    assert machine > 10**7

    def group(folder: Path, **files: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)

    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/step\n")
    statistics = "anon 3\ninactive_file 200000\n"
    full = {"memory__current": "1000000", "memory__stat": statistics}
    group(tmp_path / "job" / "step", memory__max="max", **full)
    assert memory.available(CPU) == pytest.approx(machine, rel=0.2)
    group(tmp_path / "job", memory__max="5000000", **full)
    assert memory.available(CPU) == 4_200_000

    (tmp_path / "own").write_text("4:cpuset:/x\n3:memory:/not/here\n")
    group(
        tmp_path / "memory",
        memory__limit_in_bytes="3000000",
        memory__usage_in_bytes="1000000",
        memory__stat="total_inactive_file 0\n",
    )
    assert memory.available(CPU) == 2_000_000
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "none")
    assert memory.available(CPU) == pytest.approx(machine, rel=0.2)
