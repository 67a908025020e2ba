"""No figure is shown of a backend that computes something else."""

import pytest
from torch import Tensor

from flashdip.bench import correct
from flashdip.bench.baselines import PlainLoop
from flashdip.bench.correct import (
    WrongResultError,
    check,
    check_plain,
    judged,
    judged_plain,
    published_options,
)
from flashdip.engine.networks.skip import SkipConfig

SIZE = 64


def test_reference_agrees_with_the_published_network() -> None:
    found = check(SIZE, "cpu", "reference", "fp64")
    assert found["output"][0] < 1e-12
    assert found["gradient"][0] < 1e-11


def test_another_network_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    other = published_options(SkipConfig(upsample="nearest"))
    monkeypatch.setattr(correct, "published_options", lambda network: other)
    with pytest.raises(WrongResultError, match=r"native .*no figures are shown"):
        check(SIZE, "cpu", "native", "bf16")


@pytest.mark.parametrize("name", ["quick", "balanced"])
def test_presets_of_our_own_are_judged_too(name: str) -> None:
    """In float32, beside what the backend would choose."""
    found = judged(SIZE, "cpu", "native", "bf16", name)
    assert set(found) == {"output, bf16", "gradient, bf16", "output, fp32", "gradient, fp32"}
    assert all(0 < each["error"] < each["allowed"] for each in found.values())


def test_the_last_of_fits_side_by_side_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has weights of its own: compared with those of the first it is wrong."""
    assert check(SIZE, "cpu", "native", "fp32", "quick", 2)["output"][0] < 1e-4
    moments = correct.first_moments
    monkeypatch.setattr(correct, "first_moments", lambda step: moments(step)[:1])
    with pytest.raises(WrongResultError, match="gradient"):
        check(SIZE, "cpu", "native", "fp32", "quick", 2)


@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
def test_another_way_to_enlarge_is_judged_against_its_own(upsample: str) -> None:
    """Ours in float32; PyTorch's bf16 loop in both precisions."""
    settings = (("network.upsample", upsample),)
    assert check(SIZE, "cpu", "native", "fp32", settings=settings)["output"][0] < 1e-4
    found = judged_plain(SIZE, upsample)
    assert set(found) == {"output, bf16", "gradient, bf16", "output, fp32", "gradient, fp32"}
    assert found["output, fp32"]["error"] < 1e-4 < found["output, bf16"]["error"]


def test_a_wrong_loop_of_pytorch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = PlainLoop._draw

    def off(self: PlainLoop, z: Tensor) -> tuple[Tensor, Tensor]:
        loss, output = draw(self, z)
        return loss * 1.2, output

    monkeypatch.setattr(PlainLoop, "_draw", off)
    with pytest.raises(WrongResultError, match=r"PyTorch, eager \(fp32\): the gradient"):
        check_plain(SIZE, "fp32")
