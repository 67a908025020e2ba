"""The kernels that ship, compiled for two architectures: what `flashdip kernels --check` allows.

All architectures and sizes are compiled by `make kernels`.
"""

import json
import os
import subprocess
import sys

import pytest

ARCHITECTURES = ("sm_80", "sm_90")
COMMAND = "from flashdip.cli import main; main()"


@pytest.mark.slow
def test_no_kernel_breaks_a_rule() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [part for arch in ARCHITECTURES for part in ("--arch", arch)]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "kernels", *arguments, "--size", "512", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["breaches"] == []
    assert {row["arch"] for row in found["kernels"]} == set(ARCHITECTURES)
    shares = {step["gpu"]: step["roof_share"] for step in found["steps"]}
    assert shares["H100 SXM"] >= 0.6
    assert all(step["launches"] <= 80 for step in found["steps"])
