"""What the README shows works as it stands."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashdip
from flashdip.cli import COMMANDS
from flashdip.engine import presets
from flashdip.engine.networks.skip import SkipConfig

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block, one after another, with a preset that takes moments."""
    quick = {
        key: replace(
            value,
            config=replace(value.config, iterations=3, network=SkipConfig(inputs=2, down=(4, 4))),
        )
        for key, value in presets.PRESETS.items()
    }
    monkeypatch.setattr(presets, "PRESETS", quick)
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for name in ("noisy.png", "blurred.png"):
        flashdip.save(name, flashdip.Picture((picture / 255).astype(np.float32)))
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    for name in ("clean.png", "sharp.png"):
        assert flashdip.load(name).pixels.shape == (20, 24, 3)
    assert flashdip.Result.load("run").iterations == 3


def test_every_command_it_names_is_there() -> None:
    """And every restoring command is named in it."""
    named = set(re.findall(r"flashdip ([a-z]+)", README)) - {"import"}
    assert named <= COMMANDS.keys()
    for command, (_, section, _) in COMMANDS.items():
        if section == "Restore":
            assert f"| `{command}` |" in README


def test_its_links_lead_somewhere() -> None:
    """Relative links and pictures."""
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
