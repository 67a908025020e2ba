"""The backend of ONNX Runtime: what a step computes, and that a fit with it is a fit."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdip.engine.backends import ONNX, select
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.hosted import HostedStep
from flashdip.engine.backends.onnx import OnnxStep
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, UnavailableError
from flashdip.engine.events import Event, Progress, Retried
from flashdip.engine.fit import fit
from flashdip.engine.fit_many import fit_many
from flashdip.engine.operators import Downsample, Each, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import reference
from tests.engine.onnx.cases import TOPOLOGIES, excess_of_gradients, live, shrunk
from tests.engine.test_fit import SEARCHING, TINY, noisy, truth
from tests.kernels.fused.judge import excess

CPU = torch.device("cpu")
SHAPE = (3, 21, 18)


def step_of(problem: Problem, config: FitConfig) -> OnnxStep:
    return OnnxStep(problem, config, CPU, None, ("cpu",))


def problems() -> dict[str, Problem]:
    """One for each operator."""
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(1, *SHAPE, generator=generator)
    known = (torch.rand(1, 1, *SHAPE[1:], generator=generator) > 0.4).float()
    small = torch.rand(1, 3, 7, 6, generator=generator)
    return {
        "identity": Problem(image, SHAPE),
        "mask": Problem(known * image, SHAPE, Mask(known), measured=known),
        "downsample": Problem(small, SHAPE, Downsample(3, kernel="lanczos3")),
    }


@pytest.mark.parametrize(
    ("name", "operator"),
    [(name, "identity") for name in TOPOLOGIES]
    + [("published-restore50", operator) for operator in ("mask", "downsample")],
)
def test_one_step(name: str, operator: str) -> None:
    """Image, loss, first moment (the gradients), average: judged against float64, as kernels are.

    On a picture that the network's size exceeds, of every published topology shrunk.
    """
    config = FitConfig(network=replace(shrunk(TOPOLOGIES[name]), outputs=3), seed=2)
    problem = problems()[operator]
    excesses = []
    for seed in range(5):
        three = [after_a_step(step, seed) for step in steps_of(problem, config)]
        for name in ("output", "average"):
            own, true, plain = (getattr(step.watch, name) for step in three)
            excesses.append(excess(own, true, plain, torch.float32))
        found, exact, _ = three
        torch.testing.assert_close(found.watch.loss.double(), exact.watch.loss, rtol=1e-5, atol=0)
        network = found.network
        moments = (network.views(step.trained["moment1"]) for step in three)
        excesses.append(excess_of_gradients(network, *moments))
    for kind in range(3):
        assert median(excesses[kind::3]) <= 1, excesses


def steps_of(problem: Problem, config: FitConfig) -> Iterator[HostedStep]:
    """Ours, the reference in float64 and in float32."""
    yield step_of(problem, config)
    for dtype in (torch.float64, torch.float32):
        yield EagerStep(reference, problem, config, CPU, dtype, None)


def after_a_step(step: HostedStep, seed: int) -> HostedStep:
    """One iteration with parameters as in a fit that is on its way."""
    step.trained["parameters"].copy_(live(step.network, (8, 8), seed)[0])
    step()
    return step


def test_all_of_the_state_agrees_after_twenty_steps() -> None:
    """With float64: image, average and the moments of Adam, whose betas are short and long."""
    config = replace(
        TINY, betas=(0.0, 0.999), schedule="cosine", warmup=3, stop=("es-wmv", "es-emv"), window=4
    )
    exact = EagerStep(reference, noisy(), config, CPU, torch.float64, truth())
    found = OnnxStep(noisy(), config, CPU, truth(), ("cpu",))
    for step in (exact, found):
        step.advance(20)
    (expected,), (statistics,) = exact.read(), found.read()
    assert statistics == pytest.approx(expected, rel=2e-3, nan_ok=True)
    torch.testing.assert_close(found.watch.output.double(), exact.watch.output, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.watch.average.double(), exact.watch.average, rtol=0, atol=2e-4)


def test_nothing_moves_between_iterations() -> None:
    """The state lies in two places in turns; a fit that goes back, there as well."""
    step = step_of(noisy(), TINY)
    places: list[set[int]] = []
    for _ in range(4):
        step()
        state = {**step.trained, "average": step.watch.average}
        places.append({tensor.data_ptr() for tensor in state.values()})
    assert places[0] == places[2] != places[1] == places[3]
    (slot,) = step.slots
    slot.keep()
    kept = slot.good_state()
    step.advance(3)  # to the other place
    assert not torch.equal(step.trained["parameters"], kept["parameters"])
    slot.go_back(4)
    for name, tensor in slot.good_state().items():
        assert torch.equal(tensor, kept[name])
    step()
    again = step.trained["parameters"].clone()
    slot.go_back(4)
    step()
    assert torch.equal(step.trained["parameters"], again)


def test_a_retry_draws_other_noise_and_a_smaller_rate_moves_less() -> None:
    """What the guard sets, a step heeds."""
    plain, other, slow = (step_of(noisy(), TINY) for _ in range(3))
    other.slots[0].retry, slow.slots[0].rate_scale = 1, 0.5
    start = plain.trained["parameters"].clone()
    for step in (plain, other, slow):
        step()
    assert not torch.equal(plain.watch.output, other.watch.output)
    assert torch.equal(plain.watch.output, slow.watch.output)
    moved, half = ((s.trained["parameters"] - start).abs().max() for s in (plain, slow))
    torch.testing.assert_close(half, moved / 2, rtol=1e-3, atol=0)


def test_same_seed_same_bits_and_an_interruption_does_not_show(tmp_path: Path) -> None:
    """Ended after 13 iterations, resumed from its checkpoint: as if it had never stopped."""
    config = replace(SEARCHING, stop=("es-wmv", "es-emv"))
    whole, again = (fit(noisy(), config, backend="onnx", device="cpu") for _ in range(2))
    assert torch.equal(whole.image, again.image)
    left = itertools.count(1)
    file: dict[str, Any] = {"checkpoint": tmp_path / "fit.ckpt", "backend": "onnx", "device": "cpu"}
    fit(noisy(), config, interrupted=lambda: next(left) > 12, **file)
    resumed = fit(noisy(), config, **file)
    assert torch.equal(resumed.image, whole.image)
    assert resumed.record["history"] == whole.record["history"]
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)


def test_a_fit_that_jumps_away_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that are spoilt once: a retry, and a sound end."""
    advance = OnnxStep.__call__

    def call(step: OnnxStep) -> None:
        advance(step)
        if step.slots[0].iteration == 13 and step.slots[0].retry == 0:
            step.trained["parameters"].fill_(float("nan"))

    monkeypatch.setattr(OnnxStep, "__call__", call)
    events: list[Event] = []
    result = fit(noisy(), TINY, backend="onnx", device="cpu", callback=events.append)
    assert [event.iteration for event in events if isinstance(event, Retried)] == [15]
    assert [e.iteration for e in events if isinstance(e, Progress)] == [5, 10, 15, 20, 25, 30]
    assert result.record["retries"] == 1
    assert torch.isfinite(result.image).all()


def test_a_slot_changes_hands_in_place() -> None:
    """Two fits side by side, each as if alone; another mask takes a slot, its neighbour stays."""
    known = [(torch.rand(1, 1, 21, 18) > share).float() for share in (0.3, 0.5, 0.7)]
    singles = [Problem(k * noisy().observation, SHAPE, Mask(k), measured=k) for k in known]

    def together(chosen: Sequence[int]) -> OnnxStep:
        observation = torch.cat([singles[index].observation for index in chosen])
        masks = Each([singles[index].operator for index in chosen])
        return step_of(Problem(observation, SHAPE, masks), TINY)

    step, fresh = together((0, 1)), together((0, 2))
    step.advance(3)
    neighbour: dict[str, Tensor] = step.slots[0].good_state()
    step.slots[1].replace(singles[2], TINY.seed + 1, None)
    for name, tensor in step.slots[0].good_state().items():
        assert torch.equal(tensor, neighbour[name])
    step.advance(3)
    fresh.advance(3)
    for name, tensor in step.slots[1].good_state().items():
        assert torch.equal(tensor, fresh.slots[1].good_state()[name])
    alone = step_of(singles[0], TINY)
    alone.advance(6)
    for name, tensor in step.slots[0].good_state().items():
        assert torch.equal(tensor, alone.slots[0].good_state()[name])


def test_many_fits_are_as_if_alone() -> None:
    """Masks, and nothing, in two slots that change hands."""
    line = [problems()["mask"], problems()["identity"], replace(problems()["mask"], sigma=0.1)]
    config = replace(TINY, iterations=10)
    place: dict[str, Any] = {"backend": "onnx", "device": "cpu"}
    results = dict(fit_many(line, config, at_once=2, seeds=[0, 4, 5], **place))
    for index, seed in enumerate((0, 4, 5)):
        alone = fit(line[index], replace(config, seed=seed), **place)
        torch.testing.assert_close(results[index].image, alone.image, rtol=0, atol=1e-6)


def test_what_it_cannot_do_is_said() -> None:
    """A user's own operator; precisions, devices and providers that do not go together."""
    own = Problem(2 * noisy().observation, SHAPE, lambda x: 2 * x)
    with pytest.raises(UnavailableError, match=r"onnx: expected the operator Identity, .* native$"):
        fit(own, TINY, backend="onnx", device="cpu")
    with pytest.raises(UnavailableError, match="it computes in fp32, not fp64"):
        fit(noisy(), replace(TINY, precision="fp64"), backend="onnx", device="cpu")
    with pytest.raises(
        UnavailableError, match=r"provider cuda: .* pip .*; the provider cuda works"
    ):
        fit(noisy(), TINY, backend="onnx", device="cpu", providers=["cuda"])
    with pytest.raises(ConfigError, match=r"provider: expected some of tensorrt, cuda, .* 'npu'"):
        fit(noisy(), TINY, backend="onnx", device="cpu", providers=["npu"])
    with pytest.raises(ConfigError, match="provider: expected with the backend onnx alone, got"):
        fit(noisy(), TINY, device="cpu", providers=["cpu"])
    assert select("auto", CPU, TINY)[0].name == "native"
    half = replace(TINY, precision="fp16")
    assert "not fp16" in ONNX.unavailable(CPU, half)[0]
