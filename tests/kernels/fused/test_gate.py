"""The gate lets right kernels pass, here in the interpreter, and nothing else."""

from dataclasses import replace

import pytest
import torch

from flashdip.bench import gate
from flashdip.bench.correct import WrongResultError
from flashdip.engine.backends import NATIVE
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem

CPU = torch.device("cpu")
TINY = {"tiny": FitConfig(network=SkipConfig(inputs=3, down=(5,), upsample="nearest"))}


def test_a_step_of_the_kernels_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And fails where the image, or a single gradient, were off by a hundredth of its size."""
    found, rounded = gate._step_errors(TINY["tiny"], CPU, "fp16")
    offered = [found]
    monkeypatch.setattr(gate, "_step_errors", lambda *_: (offered[0], rounded))
    result = gate.check_steps(TINY, CPU, "fp16")
    assert list(result["tiny"])[:4] == list(gate.MEASURES)
    assert all(0 < each["error"] < each["allowed"] for each in result["tiny"].values())
    for index, what in ((0, "image, rms"), (-1, "single gradient")):
        wrong = found.clone()
        wrong[index] = 0.01
        offered[0] = wrong
        with pytest.raises(WrongResultError, match=f"a step of tiny: {what}.*: off by"):
            gate.check_steps(TINY, CPU, "fp16")


def test_joins_that_do_not_fold_pass() -> None:
    """They are emulated too, as is pooling."""
    network = replace(TINY["tiny"].network, downsample="max", pad="zero")
    assert gate.check_steps({"apart": FitConfig(network=network)}, CPU, "fp16", seeds=1)


def test_every_published_topology_is_checked() -> None:
    found = gate.topologies()
    assert len(found) == 6
    assert all(config.network.levels == 2 for config in found.values())
    assert found["published-inpaint-text"].network.skip == 16


class Idle:
    """A backend that learns nothing."""

    name = "idle"

    def prepare(
        self, problem: Problem, config: FitConfig, device: torch.device, precision: str, truth: None
    ) -> EagerStep:
        return NATIVE.prepare(problem, replace(config, learning_rate=0.0), device, precision, truth)


def test_a_photograph_has_to_be_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"size": 32, "iterations": 20, "name": "quick"}
    monkeypatch.setattr(gate, "TRITON", NATIVE)
    monkeypatch.setattr(gate, "WORSE", 5.0)  # so few iterations are far from settled
    scores = gate.check_photograph(CPU, ["fp32"], **options)  # type: ignore[arg-type]
    assert list(scores) == ["reference fp32", "native fp32"]
    monkeypatch.setattr(gate, "TRITON", Idle())
    monkeypatch.setattr(gate, "WORSE", 0.5)
    with pytest.raises(WrongResultError, match="idle fp32, a photograph after 20 iterations"):
        gate.check_photograph(CPU, ["fp32"], **options)  # type: ignore[arg-type]
