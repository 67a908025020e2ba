"""No figure is shown of a backend that computes something else."""

import pytest

from flashdip.bench import table
from flashdip.bench.published import DENOISE

SIZE = 64


def test_reference_agrees_with_the_published_network() -> None:
    output, gradient = table.check(SIZE, "cpu", "reference", "fp64")
    assert output < 1e-12
    assert gradient < 1e-11


def test_another_network_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DENOISE", dict(DENOISE) | {"upsample_mode": "nearest"})
    with pytest.raises(table.WrongResultError, match=r"native .*no figures are shown"):
        table.check(SIZE, "cpu", "native", "bf16")


@pytest.mark.slow
def test_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    table.main(
        f"--size={SIZE} --rounds=1 --steps=1 --warmup=0 --device=cpu --backends=native:fp32".split()
    )
    out = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == [
        "published",
        "published + host work",
        "native (fp32)",
    ]
    assert float(rows[2][4]) == 1.0  # times as fast as itself
    assert all(float(row[1]) > 0 and float(row[5]) > 100 for row in rows[2:])
