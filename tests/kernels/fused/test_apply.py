"""Values stored before a convolution, statistics taken behind it: the same step."""

from dataclasses import replace

import pytest
import torch

from flashdip.engine.backends import plans
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.kernels.fused.tiles import ARCHITECTURES
from flashdip.kernels.opset import Pad
from tests.kernels.fused.test_program import problem, step_of

NETWORK = SkipConfig(inputs=3, down=(5, 6), upsample=("nearest", "bilinear"))
ALWAYS = ARCHITECTURES["interpreter"]._replace(stores=0, counts=0)


def names(step: TritonStep) -> list[str]:
    return [launch.name for launch in step.program.launches]


@pytest.mark.parametrize("pad", ["reflection", "zero"])
def test_the_same_step_in_more_launches(monkeypatch: pytest.MonkeyPatch, pad: Pad) -> None:
    """What is read is rounded alike; only sums over pixels are taken in another order."""
    config = FitConfig(network=replace(NETWORK, pad=pad), stop=("fixed",), iterations=20)
    of = problem(2, (16, 17), masked=True)
    together = step_of(config, of, torch.float32)
    monkeypatch.setitem(ARCHITECTURES, "interpreter", ALWAYS)
    apart = step_of(config, of, torch.float32)
    more = [name for name in names(apart) if name not in names(together)]
    values = [name for name in more if name.endswith("value")]
    assert values and set(more) - set(values) == {n for n in more if n.endswith("statistics")}
    assert len(set(more)) == len(more) > len(values)
    assert [name for name in names(apart) if name not in more] == names(together)
    for step in (together, apart):
        step()
    torch.testing.assert_close(apart.watch.output, together.watch.output, rtol=0, atol=2e-6)
    one, other = (step.program.moments[0] for step in (together, apart))
    assert (one - other).norm() <= 1e-5 * one.norm() > 0


def test_a_stored_value_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, to the last bit: the image, and all gradients but those of a thin skip's weight.

    That is summed in float32 in another order.
    """
    config = FitConfig(network=replace(NETWORK, skip=0), stop=("fixed",), iterations=20)
    together = step_of(config, problem(), torch.float16)
    monkeypatch.setitem(ARCHITECTURES, "interpreter", ALWAYS._replace(counts=None))
    apart = step_of(config, problem(), torch.float16)
    assert len(names(apart)) > len(names(together))
    for step in (together, apart):
        step()
    assert torch.equal(apart.watch.output, together.watch.output)
    assert torch.equal(apart.program.moments[0], together.program.moments[0])


def test_it_is_a_matter_of_layer_and_architecture() -> None:
    """Large maps only: the switch is a number of pixels."""
    some = ARCHITECTURES["sm_80"]._replace(stores=256 * 256, counts=512 * 512)
    plain, apart = (
        [each.name for each in plans.planned(FitConfig(), (512, 512), torch.float16, a).launches]
        for a in (ARCHITECTURES["sm_80"], some)
    )
    more = [name for name in apart if name not in plain]
    assert more == [
        "level0.skip statistics",
        "level0.down value",
        "level0.conv value",
        "level0.one statistics",
    ]
