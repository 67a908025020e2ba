"""No figure is shown of a backend that computes something else."""

import pytest

from flashdip.bench import correct
from flashdip.bench.correct import WrongResultError, check, judged, published_options
from flashdip.engine.networks.skip import SkipConfig

SIZE = 64


def test_reference_agrees_with_the_published_network() -> None:
    output, gradient = check(SIZE, "cpu", "reference", "fp64")
    assert output < 1e-12
    assert gradient < 1e-11


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
