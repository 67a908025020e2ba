"""Every launch of a step is measured by itself, and named; here in the interpreter."""

from typing import Any

import torch

from flashdip.bench import launches
from flashdip.bench.ceilings import Ceilings
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig

TINY = FitConfig(network=SkipConfig(inputs=3, down=(5,), upsample="nearest"), iterations=20)


def test_launches_are_measured_once_the_step_is_right() -> None:
    gate = {"output": {"error": 0.1, "allowed": 0.2}}
    asked = []

    def judge(*arguments: object) -> dict[str, Any]:
        asked.append(arguments)
        return gate

    limits = Ceilings(1e9, {"fp16": 1e9})
    device = torch.device("cpu")
    found = launches.rows(16, device, limits, config=TINY, rounds=1, block=0.0, judge=judge)
    assert asked == [(16, "cpu", "triton", "fp16")]
    names = [row["name"] for row in found]
    assert names[0] == "launch perturb, triton (fp16)"
    assert "launch level0.up backward, triton (fp16)" in names
    of_reading = [f"launch {name}, triton (fp16)" for name in ("adam", "keep", "reading")]
    assert names[-3:] == of_reading
    assert all(row["gate"] == gate and row["work"]["bytes"] > 0 for row in found)
    assert all(row["roof_share"] > 0 for row in found)
