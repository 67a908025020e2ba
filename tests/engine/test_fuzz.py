"""A short run of the mutations of `tests/fuzz.py`, in a process that a hang cannot outlive."""

import subprocess
import sys
from pathlib import Path


def test_mutated_files_give_a_picture_or_one_line() -> None:
    fuzz = Path(__file__).parents[1] / "fuzz.py"
    run = subprocess.run(
        [sys.executable, str(fuzz), "40"], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.stderr == ""
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("\n0 findings\n")
    assert run.stdout.count("40 mutations") == 13
