"""The Dockerfile: pinned, without root, and true to what the extras and the docs say."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# Instructions with their continuation lines joined, comments left out.
LINES = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", TEXT)).splitlines()
INSTRUCTIONS = [tuple(line.split(maxsplit=1)) for line in LINES if line.strip()]


def of(name: str) -> list[str]:
    return [rest for word, rest in INSTRUCTIONS if word == name]


def test_the_base_is_pinned_to_the_cuda_of_tensorrt() -> None:
    (base,) = of("FROM")
    found = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-base-ubuntu\d+\.\d+", base)
    assert found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wheel,) = [e for e in project["optional-dependencies"]["tensorrt"] if "tensorrt-cu" in e]
    assert wheel.startswith(f"tensorrt-cu{found[1]}")


def test_it_runs_as_a_user_of_its_own() -> None:
    """From the last instruction that changes anything on."""
    (user,) = of("USER")
    assert re.fullmatch(r"[1-9]\d{3,}", user)
    words = [word for word, _ in INSTRUCTIONS]
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :])
    assert f"--uid {user} " in TEXT


def test_nothing_of_the_set_up_stays_behind() -> None:
    for command in of("RUN"):
        assert "apt-get install" not in command or "rm -rf /var/lib/apt/lists/*" in command
        assert "pip install" not in command or "--no-cache-dir" in command
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".*", "tests"} <= set(ignored)  # .git and .venv are among the first
    assert (ROOT / "constraints" / "gpu.txt").is_file()


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if linter is None:
        pytest.skip("hadolint not found: make lint-docker installs it")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
