"""`flashdip explore`: tables on stdout, numbers and figures in a folder, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdip import cli
from flashdip.engine.presets import preset

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Run the command line in an empty folder, with presets of moments."""
    monkeypatch.chdir(tmp_path)
    small = (
        preset("denoise")
        .override(
            {"network.down": "4,8", "iterations": "6", "read_every": "2", "precision": "fp32"}
        )
        .override({"stop": "fixed", "window": "4"})
    )
    for place in ("flashdip.engine.presets.preset", "flashdip.engine.task_options.preset"):
        monkeypatch.setattr(place, lambda *asked: small)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashdip", "explore", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return command


EXPERIMENTS = {
    "impedance": (("--iterations", "10", "-q"), ("image + noise", "shuffled pixels", "never")),
    "priors": (("--draws", "1"), ("depth 5", "U-Net", "ResNet", "deep decoder", "white noise")),
    "overfit": (("--iterations", "12", "-q"), ("es-wmv", "es-emv", "discrepancy", "end")),
    "tv": (("-q",), ("denoise25", "inpaint50", "sr4", "NLM", "TV", "bicubic", "network")),
}


@pytest.mark.parametrize(("name", "given"), EXPERIMENTS.items(), ids=EXPERIMENTS.keys())
def test_each_prints_its_table_and_writes_numbers_and_a_figure(
    call: Call, name: str, given: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    options, words = given
    code, out, err = call(name, "--size", "32", *options)
    assert (code, err) == (0, "")
    for word in words:
        assert word in out
    numbers = json.loads(Path(f"explore/{name}.json").read_text())
    assert numbers
    figure = np.asarray(Image.open(f"explore/{name}.png").convert("RGB"))
    assert min(figure.shape[:2]) > 300
    assert len(np.unique(figure.reshape(-1, 3), axis=0)) > 50
    again = call(name, "--size", "32", *options)
    assert (again[0], again[1], "--force" in again[2]) == (2, "", True)
    assert call(name, "--size", "32", *options, "--force")[:2] == (0, out)


def test_a_missing_extra_is_said_before_anything_is_fitted(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashdip.bench.explore.figures.find_spec", lambda name: None)
    code, out, err = call("impedance")
    assert (code, out) == (2, "")
    assert err == ("flashdip: error: matplotlib is not installed: pip install 'flashdip[plots]'\n")
    assert not Path("explore").exists()


def test_progress_is_shown_for_each_fit(call: Call) -> None:
    _, _, err = call("impedance", "--size", "32", "--iterations", "10")
    for name in ("image", "image + noise", "shuffled pixels", "noise"):
        assert f"{name}: 10 iterations in" in err
