"""Whole fits whose guard and stopping rules are launches: the host follows one reading behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.events import Event, Noted, Retried
from flashdip.engine.fit import fit
from flashdip.engine.fit_many import fit_many
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Identity
from flashdip.engine.problems import Problem
from flashdip.kernels.fused.launch import Launch
from tests.kernels.fused.test_program import Silent

SHAPE = (1, 16, 16)
TINY = FitConfig(
    network=SkipConfig(inputs=2, outputs=1, down=(4,), skip=2, upsample="nearest"),
    iterations=5,
    read_every=2,
    average=0.5,
    precision="fp32",
    stop=("es-emv",),
    window=2,
    perturbation=0.1,
)
HERE: dict[str, Any] = {"backend": "triton", "device": "cpu"}


def image(seed: int) -> Tensor:
    """A few random pixels."""
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def spoil(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[TritonStep] | type[EagerStep],
    done: Callable[[Any], bool],
) -> None:
    """Make the loss infinite behind iterations for which this holds."""
    advance = kind.advance

    def spoiled(step: Any, count: int) -> None:
        advance(step, count)
        if done(step):
            step.watch.loss.fill_(float("inf"))

    monkeypatch.setattr(kind, "advance", spoiled)


def test_going_back_is_that_of_the_eager_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, at iteration 4, where the host learns of it at iteration 4 again.

    The reading that is due at the end, by itself, is not missed.
    """
    gone: set[int] = set()

    def once(step: Any) -> bool:
        first = step.slots[0].iteration == 4 and id(type(step)) not in gone
        gone.update([id(type(step))] if first else [])
        return first

    for kind in (TritonStep, EagerStep):
        spoil(monkeypatch, kind, once)
    events: list[Event] = []
    problem = Problem(image(0), SHAPE)
    found = fit(problem, TINY, **HERE, callback=events.append)
    exact = fit(problem, replace(TINY, precision="fp64"), backend="reference", device="cpu")
    assert exact.record["retries"] == 1
    for name in ("iterations", "best_iteration", "stop_reason", "retries"):
        assert found.record[name] == exact.record[name]
    assert found.record["history"]["iteration"] == exact.record["history"]["iteration"]
    losses = found.record["history"]["loss"], exact.record["history"]["loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(found.image, exact.image, rtol=0, atol=1e-4)
    (retried,) = (event for event in events if isinstance(event, Retried))
    assert (retried.iteration, retried.retry) == (4, 1)


def test_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    """The same bits, though the device was ahead of the host."""
    problem, path = Problem(image(1), SHAPE), tmp_path / "fit.ckpt"
    whole = fit(problem, TINY, **HERE)
    left = iter((False, True))
    part = fit(problem, TINY, **HERE, checkpoint=path, interrupted=lambda: next(left))
    assert (part.stop_reason, part.iterations) == ("interrupted", 4)
    rest = fit(problem, TINY, **HERE, checkpoint=path)
    assert torch.equal(rest.image, whole.image)
    assert rest.record["history"] == whole.record["history"]
    assert all(torch.equal(rest.weights[n], weight) for n, weight in whole.weights.items())
    again = fit(problem, TINY, **HERE, checkpoint=path)
    assert torch.equal(again.image, whole.image)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy: it overflows
def test_what_overflows_16_bits_is_done_in_float32(tmp_path: Path) -> None:
    """Gradients of a picture a million times too bright: said so, and done, alone and in a line."""
    network = replace(TINY.network, sigmoid=False)
    config = replace(TINY, network=network, precision="fp16", retries=0, iterations=1, read_every=1)
    bright = Problem(1e6 * image(2), SHAPE)
    note = "iteration 1: numbers were not finite in fp16 after 0 retries; fp32 from iteration 0 on"
    events: list[Event] = []
    path = tmp_path / "fit.ckpt"
    result = fit(bright, config, **HERE, callback=events.append, checkpoint=path)
    wide = fit(bright, replace(config, precision="fp32"), **HERE)
    assert result.record["notes"] == [note]
    assert [event.message for event in events if isinstance(event, Noted)] == [note]
    assert (result.record["precision"], result.iterations) == ("fp32", 1)
    assert torch.equal(result.image, wide.image)
    again = fit(bright, config, **HERE, checkpoint=path)
    assert torch.equal(again.image, wide.image)
    assert again.record["notes"] == [note]
    results = dict(fit_many([bright, Problem(image(3), SHAPE)], config, at_once=2, **HERE))
    assert [results[index].record["precision"] for index in (0, 1)] == ["fp32", "fp16"]
    torch.testing.assert_close(results[0].image, wide.image)


def test_a_reading_is_launches_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and readings as a fit does them: only the letter to the host is copied."""
    cpu = torch.device("cpu")
    step = TritonStep(Problem(image(0), SHAPE, Identity()), TINY, cpu, torch.float16, None)
    run: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch: run.append(launch))
    monkeypatch.setattr(step._mail, "send", lambda issued: None)
    reading = step.program.reading
    assert reading is not None
    with Silent():
        step.advance(2)
        assert not list(step.measure([0]))
    assert run == [*step.program.launches * 2, *reading.launches]
    names = [launch.name for launch in reading.launches]
    assert names == ["reading", "keep"]


def test_other_operators_are_named() -> None:
    """In the notes of a step, and so in the record."""
    problem = Problem(image(0), SHAPE, lambda x: x)
    step = TritonStep(problem, TINY, torch.device("cpu"), torch.float16, None)
    (note,) = step.notes
    assert note == "the operator function has no kernel: torch computes the loss between graphs"
