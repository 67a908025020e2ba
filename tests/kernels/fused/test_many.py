"""Many fits in one list of launches: slots that change hands, and the memory they take."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdip.engine.backends import plans, triton
from flashdip.engine.backends.plans import memory
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.fit import fit
from flashdip.engine.fit_many import fit_many, fits_in_memory
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Each, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import noise
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.tiles import ARCHITECTURES

SHAPE = (1, 16, 16)
TINY = FitConfig(
    network=SkipConfig(inputs=2, outputs=1, down=(4,), skip=2, upsample="nearest"),
    iterations=2,
    read_every=1,
    average=0.5,
    precision="fp32",
    stop=("discrepancy", "es-wmv", "es-emv"),
    window=2,
)


def image(seed: int) -> Tensor:
    """A few pixels, some of them brighter than white: nothing was clipped."""
    return 1.2 * torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def masked(seed: int, sigma: float) -> Problem:
    """With a mask of its own."""
    known = (image(100 + seed) > 0.5).float()
    return Problem(known * image(seed), SHAPE, Mask(known), sigma, measured=known)


def side_by_side(problems: Sequence[Problem], dtype: torch.dtype) -> TritonStep:
    """A step with these in its slots."""
    together = Problem(
        torch.cat([problem.observation for problem in problems]),
        SHAPE,
        Each([problem.operator for problem in problems]),
    )
    return TritonStep(together, TINY, torch.device("cpu"), dtype, None)


def test_each_fit_is_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends at once, the third takes its slot while the second goes on: no new plan.

    Alone means: by the reference, in float64.
    """
    line = [masked(0, 100.0), masked(1, 0.001), masked(2, 0.001)]
    seeds = [3, 3, 8]
    planned = []
    program = plans.program

    def counted(*arguments: Any) -> Any:
        planned.append(arguments)
        return program(*arguments)

    monkeypatch.setattr(triton, "program", counted)
    results = dict(fit_many(line, TINY, at_once=2, seeds=seeds, backend="triton", device="cpu"))
    assert len(planned) == 1
    assert [results[index].iterations for index in range(3)] == [1, 2, 2]
    for index, result in results.items():
        config = replace(TINY, seed=seeds[index], precision="fp64")
        alone = fit(line[index], config, backend="reference", device="cpu")
        assert result.iterations == alone.iterations
        torch.testing.assert_close(result.image, alone.image, rtol=0, atol=1e-4)
        for name in ("loss", "variance"):
            pairs = zip(result.record["history"][name], alone.record["history"][name], strict=True)
            assert all(a == b or a == pytest.approx(b, rel=1e-3) for a, b in pairs)
        head = "head.weight"
        torch.testing.assert_close(result.weights[head], alone.weights[head], rtol=0, atol=1e-3)


def test_other_operators_are_compared_fit_by_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch, each slot by its own: losses and gradients, before and after a change."""
    monkeypatch.setattr(Launch, "__call__", lambda launch: None)

    def scaled(factor: float) -> Problem:
        return Problem(factor * image(0), SHAPE, lambda x: factor * x)

    step = side_by_side([scaled(1.0), scaled(2.0)], torch.float32)
    assert step.program.after
    drawn = torch.cat([image(1), image(2)])
    step.watch.output.copy_(drawn)
    for factors in ((1.0, 2.0), (1.0, 3.0)):
        if factors[1] == 3.0:
            step.slots[1].replace(scaled(3.0), 0, None)
            step.watch.output[1].copy_(drawn[1])
        step()
        for index, factor in enumerate(factors):
            off = drawn[index] - image(0)[0]
            loss = factor**2 * off.square().mean()
            torch.testing.assert_close(step.watch.loss[index], loss)
            gradient = 2 * factor**2 * off / off.numel()
            torch.testing.assert_close(step.program.doutput[index], gradient)


def test_a_slot_changes_hands_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the launches read is where it was, and as if the fit had been there from the start.

    What a launch keeps from step to step is in these tensors, or zero.
    """
    monkeypatch.setattr(Launch, "__call__", lambda launch: None)
    line = [masked(seed, 0.1) for seed in range(3)]

    def tensors(step: TritonStep) -> dict[str, Tensor]:
        program, watch = step.program, step.watch
        reading = program.reading
        assert step.mask is not None and reading is not None
        return step.trained | {
            "copies": program.copies,
            "z": program.z,
            "keys": program.keys,
            "counters": program.counters,
            "rate": program.rate_scale,
            "books": reading.state.books,
            "board": reading.state.board.nan_to_num(),
            "prefixes": reading.state.prefixes,
            "good": reading.good["parameters"],
            "mask": step.mask,
            "observation": watch.observation,
            "average": watch.average,
            "window": watch.window.transpose(0, 1),
            "moving_mean": watch.moving_mean,
            "moving_variance": watch.moving_variance,
        }

    step, fresh = (side_by_side(pair, torch.float16) for pair in (line[:2], line[::2]))
    places = {n: t.data_ptr() for n, t in tensors(step).items() if n != "board"}
    neighbour = {name: tensor[0].clone() for name, tensor in tensors(step).items()}
    for tensor in tensors(step).values():
        tensor[1].fill_(77)  # as a fit leaves them
    step.slots[1].rate_scale, step.slots[1].retry = 0.5, 2
    step.slots[1].replace(line[2], TINY.seed + 1, None)
    for name, tensor in tensors(step).items():
        assert name not in places or tensor.data_ptr() == places[name]
        assert torch.equal(tensor[0], neighbour[name])
        assert torch.equal(tensor[1], tensors(fresh)[name][1]), name
    torch.testing.assert_close(step.sigma, torch.tensor([math.nan, 0.1]), equal_nan=True)


def allocated(run: Callable[[], None], path: Path) -> int:
    """Return the most bytes that were allocated while it ran, by torch's own account."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("fits", [1, 3])
@pytest.mark.parametrize("stop", [("fixed",), ("es-wmv", "es-emv")], ids="+".join)
def test_memory_is_as_planned(
    fits: int, stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step takes on the CPU, at most: while fits are read by torch."""
    monkeypatch.setattr(Launch, "__call__", lambda launch: None)
    noise.table()
    config = replace(TINY, stop=stop, window=15, iterations=100)
    config = replace(config, network=SkipConfig(inputs=8, down=(32, 32), outputs=3))
    shape = (3, 96, 128)
    white = torch.ones(fits, *shape)  # clipped, so that the noise takes its share of memory
    mask, truth = Mask(torch.ones(1, 1)), torch.zeros(shape, dtype=torch.float64)
    together = Problem(white, shape, Each([mask] * fits), 0.1)
    single = replace(together, observation=white[:1], operator=mask)
    kept: list[Any] = []

    def run() -> None:
        step = TritonStep(together, config, torch.device("cpu"), torch.float16, None)
        for slot in step.slots:
            slot.replace(single, 0, truth)
        for _ in range(3):
            step.advance(10)
            assert not list(step.measure(range(fits)))  # the board is empty
        assert not list(step.drain())
        step.read()
        kept.append(step)

    found = allocated(run, tmp_path / "trace.json")
    found += white.nbytes - kept[0].initial.nbytes  # shared on the CPU; not on the device
    planned = memory(config, shape, torch.float16, ARCHITECTURES["interpreter"], fits)
    assert found == pytest.approx(planned, rel=1e-3)


def test_the_default_network_fits_in_little_memory() -> None:
    """At most 2.5 GB a megapixel from 512x512 on, whatever is watched; as many fits as fit in."""
    configs = FitConfig(), FitConfig(stop=("es-wmv", "es-emv"))
    for config, side in itertools.product(configs, (512, 1024)):
        shape = 3, side, side
        need = memory(config, shape, torch.float16, ARCHITECTURES["sm_90"], 1)
        assert need <= 2.5e9 * side * side / 1e6
    for free in (1 << 20, 2 << 30, 20 << 30):
        fits = fits_in_memory(FitConfig(), (3, 512, 512), free, "fp16")
        needs = [
            memory(FitConfig(), (3, 512, 512), torch.float16, ARCHITECTURES["sm_90"], count)
            for count in (max(fits, 1), fits + 1)
        ]
        assert fits == 0 or needs[0] <= free
        assert needs[1] > free
