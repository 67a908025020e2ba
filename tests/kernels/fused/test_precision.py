"""The emulation of 16-bit storage rounds where the kernels do, and counts what that does."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashdip.bench import precision
from flashdip.bench.emulated import Count, Emulated, emulate
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.kernels import reference
from tests.kernels.fused.test_program import autograd, gradients, problem, step_of

NEAREST = SkipConfig(inputs=3, down=(9,), upsample="nearest")
BILINEAR = SkipConfig(inputs=3, down=(9,))
WIDE = SkipConfig(inputs=3, down=(5, 6), skip=(4, 8), downsample="avg")


def errors(network: SkipConfig, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make one step of the kernels and of their emulation from the same state.

    Returns:
        For each gradient that has an effect: the kernels' error against float64, the emulation's,
        and the distance of the two, all relative to the gradient.
    """
    config = FitConfig(network=network, seed=seed, iterations=20)
    of = problem(side=(16, 17))
    kernels = step_of(config, of, dtype)
    emulated, ops = emulate(of, config, dtype)
    assert ops.loss_scale == kernels.program.loss_scale
    with torch.no_grad():
        kernels.program.layout.unpack(
            kernels.program.parameters, emulated.network.views(emulated.parameters)
        )
    _, _, exact = autograd(kernels, of, reference, torch.float64)
    kernels()
    emulated()
    rows = []
    views = emulated.network.views(emulated.gradients / ops.loss_scale)
    found = zip(emulated.network.parameters, gradients(kernels), views, exact, strict=True)
    for parameter, one, other, truth in found:
        if one is not None and not parameter.name.endswith("join.beta"):  # without effect
            apart = [one - truth, other - truth, one - other]
            rows.append(torch.stack([t.double().norm() / truth.norm() for t in apart]))
    theirs, ours, apart_ = torch.stack(rows).T
    return theirs, ours, apart_


def test_errors_are_as_large() -> None:
    """In fp16, where a step soon differs in its last bits, errors are still of the same size."""
    theirs, ours, _ = (e.square().mean().sqrt() for e in errors(WIDE, torch.float16, 0))
    assert theirs / 2 < ours < 2 * theirs


@pytest.mark.parametrize("network", [NEAREST, BILINEAR], ids=["nearest", "bilinear"])
def test_errors_are_the_same(network: SkipConfig) -> None:
    """In bfloat16 they agree in every rounding, unless one was on the edge.

    Sums in another order may then round it the other way, and all that follows differs: of four
    seeds one has to be without. A single place that is not rounded, whichever, makes more than 3 %.
    """
    for seed in range(4):
        theirs, _, apart = errors(network, torch.bfloat16, seed)
        if (apart < 0.03 * theirs).all():
            return
    pytest.fail("the emulation rounds elsewhere")


def test_what_is_lost_is_counted() -> None:
    ops = Emulated(torch.float16, 100)
    assert ops.loss_scale == 64
    x = torch.tensor([1.0, 0.0, 7e4, -1e6, 1e-9, -1e-5, math.inf])
    y = ops._narrow(x, ("layer", "place"))
    assert y.tolist()[:5] == [1.0, 0.0, math.inf, -math.inf, 0.0]
    assert y[5] == torch.tensor(-1e-5).half()
    count = ops.counts["layer", "place"]
    assert count == Count(7, overflowed=2, flushed=1, subnormal=1, largest=math.inf)
    assert count + Count(3, largest=1.0) == replace(count, stored=10)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of the pairs, their mean difference, and the counts: in float32 none."""
    precision.main(["--precisions=fp32", "--images=1", "--seeds=2", "--size=32", "--iterations=10"])
    out = capsys.readouterr().out
    pairs = re.findall(r"^astronaut +\d +(\d+\.\d{3}) +(\d+\.\d{3})$", out, re.MULTILINE)
    assert len(pairs) == 2
    mean = re.search(r"fp32 less float32: mean ([+-]\S+) dB, .* n 2", out)
    assert mean is not None
    expected = sum(float(b) - float(a) for a, b in pairs) / 2
    assert math.isclose(float(mean[1]), expected, abs_tol=0.002)
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| level0.up")]
    cells = [cell.strip() for cell in rows[0]]
    assert cells[2:5] == cells[6:9] == ["0", "0", "0"]
    assert float(cells[1]) > 0 and float(cells[5]) > 0


def test_several_fits_are_those_of_each() -> None:
    """Side by side two fits compute what each computes alone, up to the order of sums."""
    config = replace(FitConfig(network=WIDE), iterations=20)
    of = problem(2)
    both, _ = emulate(of, config, torch.float32)
    both()
    for fit in range(2):
        alone = replace(of, observation=of.observation[fit : fit + 1])
        one, _ = emulate(alone, replace(config, seed=fit), torch.float32)
        one()
        torch.testing.assert_close(both.watch.output[fit : fit + 1], one.watch.output)
