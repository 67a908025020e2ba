"""What a survey of all kernels refuses as a whole."""

import pytest

from flashdip.kernels.fused import checks
from flashdip.kernels.fused.checks import LAUNCHES, SPECIALISATIONS, slower, too_many


def test_a_slower_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "RECORDED", {("a GPU", 512): 1e-3})
    assert slower({("a GPU", 512): 1.005e-3, ("a GPU", 256): 9.0, ("another", 512): 9.0}) == []
    (line,) = slower({("a GPU", 512): 1.02e-3})
    assert line == "a GPU, 512x512: modelled 1.020 ms, recorded 1.000 ms"


def test_too_many_launches_or_kernels_are_named() -> None:
    most = {("sm_90", 512): LAUNCHES}, {"sm_90": SPECIALISATIONS}
    assert too_many(*most) == []
    launches, kernels = too_many({("sm_90", 256): LAUNCHES + 1}, {"sm_80": SPECIALISATIONS + 1})
    assert launches == "sm_90, 256x256: 81 launches a step, 80 at most"
    assert kernels == "sm_80: 81 kernels to compile, 80 at most"
