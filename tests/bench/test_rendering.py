"""Exported models in `make bench-gpu`: judged before they are timed; what is missing is named."""

import io

import onnxruntime
import pytest
import torch
from rich.console import Console

from flashdip.bench import rendering
from flashdip.bench.correct import WrongResultError
from flashdip.bench.gpu import Part, show
from flashdip.engine.onnx.export import Generator


def test_a_model_is_judged_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rendering.drawing(64, "cpu")
    made.step()
    drawn = Generator.draw
    for wrong in (0.02, torch.nan):
        monkeypatch.setattr(Generator, "draw", lambda self, add=wrong: drawn(self) + add)
        with pytest.raises(WrongResultError, match=r"cpu: expected the engine's picture .* got"):
            rendering.drawing(64, "cpu")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has GPU providers",
)
def test_without_a_provider_there_is_a_reason_and_no_figure() -> None:
    found = rendering.drawings(64, 120)
    assert found["pictures"] == {}
    assert list(found["left_out"]) == ["tensorrt", "cuda"]
    assert all("pip install" in reason for reason in found["left_out"].values())
    console = Console(file=io.StringIO(), width=80)
    show(console, Part("onnx-512", 1, lambda limit: found), found)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "onnx-512: nothing (measured" in printed
    assert "cuda: provider cuda: " in printed


def test_figures_are_shown_as_rates() -> None:
    console = Console(file=io.StringIO(), width=80)
    found = {"pictures": {"cuda": 0.004}, "left_out": {}}
    show(console, Part("onnx-512", 1, lambda limit: found), found)
    assert "cuda 250.0 pictures/s" in console.file.getvalue()  # type: ignore[attr-defined]
