"""The native step in a graph, with a stand-in for it; how backends are chosen on each device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashdip.engine.backends import graphed, select
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.graphed import GraphedStep, uncaptured
from flashdip.engine.backends.graphs import Captured
from flashdip.engine.operators import Compose, Downsample, Each, Identity, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import native
from tests.engine.test_fit_many import SHAPE, TINY, image, problems

CPU = torch.device("cpu")


def stand_in(work: Callable[[], Any], device: torch.device) -> Captured[Any]:
    """What a graph does: the same work on the same memory, the result where it was."""
    result = work()

    def replay() -> None:
        for kept, new in zip(result, work(), strict=True):
            kept.copy_(new)

    return Captured(result, replay)


def test_a_graphed_step_is_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By bits, before and after another fit with a mask of its own has taken a slot."""
    captures: list[Any] = []

    def counted(work: Callable[[], Any], device: torch.device) -> Captured[Any]:
        captures.append(work)
        return stand_in(work, device)

    monkeypatch.setattr(graphed, "capture", counted)

    def masked(seed: int) -> Problem:
        known = (image(100 + seed) > 0.5).float()
        return Problem(known * image(seed), SHAPE, Mask(known), 0.1, measured=known)

    first = [masked(0), masked(1)]
    together = Problem(
        torch.cat([p.observation for p in first]), SHAPE, Each([p.operator for p in first])
    )
    config = replace(TINY, stop=("es-wmv", "es-emv"), window=3)
    steps = [
        kind(native, replace_observation(together), config, CPU, torch.float32, None)
        for kind in (EagerStep, GraphedStep)
    ]
    for turn in range(2):
        for step in steps:
            if turn:
                step.slots[1].replace(masked(2), 5, None)
            step.advance(4)
        for eager, graph in zip(*(step.slots for step in steps), strict=True):
            expected, found = eager.good_state(), graph.good_state()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            assert graph.read() == pytest.approx(eager.read(), rel=1e-6, nan_ok=True)
    assert len(captures) == 2


def replace_observation(problem: Problem) -> Problem:
    """The same problem with tensors and a list of operators of its own."""
    assert isinstance(problem.operator, Each)
    return replace(
        problem,
        observation=problem.observation.clone(),
        operator=Each(list(problem.operator.operators)),
    )


def test_what_is_not_captured_says_why() -> None:
    """Operators of a user's own may do anything; other devices have no such graphs."""
    cuda = torch.device("cuda")
    for operator in (Identity(), Downsample(2), Each([Identity(), Mask(torch.ones(1, 1))])):
        assert uncaptured(cuda, operator) is None
    composed = Compose(Identity(), Identity())
    assert uncaptured(cuda, composed) == "the operator Compose may wait for the device"
    assert uncaptured(torch.device("mps"), Identity()) == "mps has none"


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_accelerators_take_native_and_say_why(kind: str) -> None:
    """One line for each backend that was passed over."""
    backend, precision, notes = select("auto", torch.device(kind), replace(TINY, precision="auto"))
    assert (backend.name, precision) == ("native", "fp32")
    assert notes == ["backend triton cannot run here: it runs on NVIDIA GPUs only"]


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [
        (None, (7, 5), "it needs compute capability 8.0, this GPU has 7.5"),
        ("6.4", (9, 4), "it runs on NVIDIA GPUs only"),
    ],
)
def test_old_and_other_gpus_take_native_in_a_graph(
    hip: str | None, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of NVIDIA before Ampere, and one of AMD."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: False)
    cuda = torch.device("cuda")
    backend, _, notes = select("auto", cuda, replace(TINY, precision="auto"))
    assert (backend.name, notes) == ("native", [f"backend triton cannot run here: {reason}"])
    assert uncaptured(cuda, problems(1)[0].operator) is None
