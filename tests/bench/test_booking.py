"""The suite under pytest-benchmark: its figures are those of `measure`, gates come first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAKE = """
import pytest
from flashdip.bench import bench_step, machine, suite
from flashdip.bench.measure import summarise

SECONDS = {"published": 0.4, "published + host work": 0.5, "native (fp32)": 0.1}

def results(benches, plan, **options):
    assert all(bench.check is None or bench.check() == {} for bench in benches)
    return {"results": [
        suite.row(each.name, each.parameters, summarise([t, 2 * t, 3 * t], 0.4 / t), "published")
        for each in benches if (t := SECONDS.get(each.name))
    ], "left_out": {each.name: "it is wrong" for each in benches if each.name not in SECONDS}}

class Plugin:
    @pytest.fixture(autouse=True)
    def fake(self, monkeypatch):
        from flashdip.bench import ceilings, scenarios
        monkeypatch.setattr(suite, "results", results)

def judged(*arguments):
    print("judged", arguments)
    return {}

from flashdip.bench import ceilings, scenarios
scenarios.judged = judged
ceilings.ceilings = lambda *arguments: ceilings.Ceilings(1e10, {"fp32": 1e11, "bf16": 1e11})
raise SystemExit(pytest.main(ARGUMENTS, plugins=[Plugin()]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the suite in a process of its own, with measurements made up."""
    common = [str(ROOT / "bench" / "bench_step.py"), "-q", "--bench-sizes=64"]
    common += ["-p", "no:cacheprovider"]
    listed = [*common, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *arguments]
    code = FAKE.replace("ARGUMENTS", repr(listed))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measure the rows of float32, and keep them."""
    path = tmp_path_factory.mktemp("bench") / "a.json"
    done = run("-k", "published or native and fp32", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_the_samples_of_measure_are_what_is_kept(saved: Path) -> None:
    found = json.loads(saved.read_text())
    rows = {row["extra_info"]["name"]: row for row in found["benchmarks"]}
    assert set(rows) == {"published", "published + host work", "native (fp32)"}
    native = rows["native (fp32)"]
    assert native["stats"]["data"] == pytest.approx([0.1, 0.2, 0.3])
    assert native["stats"]["median"] == pytest.approx(0.2)
    assert native["group"] == "step 64"
    assert native["extra_info"]["ratio"] == pytest.approx(4.0)
    assert native["extra_info"]["parameters"]["backend"] == "native"
    machine = found["machine_info"]["flashdip"]
    assert machine["hardware"]["cores"] >= 1
    assert machine["software"]["source"]
    assert found["flashdip"]["before"]["load"] >= 0
    assert found["flashdip"]["ceilings"]["copy"] == 1e10


def test_it_is_compared_on_the_same_machine_only(saved: Path, tmp_path: Path) -> None:
    same = ("-k", "native and fp32", f"--benchmark-compare={saved}")
    newer: dict[str, Any] = json.loads(saved.read_text())
    newer["machine_info"]["flashdip"]["software"]["torch"] = "3.0"
    saved.write_text(json.dumps(newer))
    done = run(*same, "--benchmark-compare-fail=median:5%")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(saved.read_text())
    found["machine_info"]["flashdip"]["hardware"]["cpu"] = "another CPU"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    refused = run("-k", "native and fp32", f"--benchmark-compare={other}")
    assert refused.returncode != 0
    assert "--across-machines" in refused.stdout + refused.stderr
    asked = run("-k", "native and fp32", f"--benchmark-compare={other}", "--across-machines")
    assert asked.returncode == 0, asked.stdout + asked.stderr


def test_what_is_wrong_fails_without_a_figure() -> None:
    done = run("-k", "reference and fp32 or published")
    assert done.returncode == 1
    assert "it is wrong" in done.stdout
    assert "2 passed" in done.stdout and "1 failed" in done.stdout


def test_disabled_it_runs_the_gates_alone() -> None:
    done = run("-k", "native and fp32", "--benchmark-disable", "-s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "judged (64, 'cpu', 'native', 'fp32', 'published-denoise', 1)" in done.stdout
