"""What 16-bit storage costs: paired fits that begin alike."""

import re

import pytest

from flashdip.bench import precision


def test_pairs_of_the_backend_begin_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """The same arithmetic on both sides takes the same course; bfloat16 takes another one."""
    asked = ["--backend", "native", "--precisions", "fp32,bf16", "--images", "1", "--seeds", "2"]
    precision.main([*asked, "--size", "32", "--iterations", "20"])
    out = capsys.readouterr().out
    rows = [line.split()[2:] for line in out.splitlines() if line.startswith("astronaut")]
    assert len(rows) == 2
    for float32, again, bfloat16 in rows:
        assert float32 == again
        assert float(bfloat16) == pytest.approx(float(float32), abs=2)
        assert bfloat16 != float32
    assert re.search(r"^fp32 less float32: mean \+0\.000 dB, spread 0\.000", out, re.M)
    assert "overflow" not in out  # counted only where storage is emulated
