"""`flashdip profile` on a small fit: every layer is found, waits are, and the page holds it all."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashdip import cli
from flashdip.bench import attribution, ceilings, profile_page, profiling
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.marks import Marked
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import UnavailableError
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem

LIMITS = Ceilings(1e10, {"fp32": 1e11})
SMALL = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8)), read_every=2, precision="fp32", stop=("es-wmv",)
)
PROBLEM = Problem(torch.rand(1, 3, 32, 32), (3, 32, 32), sigma=0.1)


def profiled(config: FitConfig = SMALL, backend: str = "native") -> dict[str, Any]:
    found = profiling.profile_fit(
        PROBLEM, config, backend=backend, device="cpu", iterations=4, limits=LIMITS
    )
    return found.record


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return profiled()


def test_every_layer_and_pass_is_found(record: dict[str, Any]) -> None:
    layers = [f"level{i}.{part}" for i in (0, 1) for part in ("skip", "down", "conv", "up", "one")]
    both = {(name, way) for name in (*layers, "head") for way in ("forward", "backward")}
    others = {(name, "") for name in ("perturb", "adam", "statistics", attribution.OTHER)}
    assert {(part["name"], part["pass"]) for part in record["parts"]} == both | others
    for part in record["parts"]:
        counted = part["name"] not in ("statistics", attribution.OTHER)
        assert (part["flops"] is not None) == counted
    assert all(part["ms"] > 0 for part in record["parts"])


def test_shares_add_up_to_the_iteration(record: dict[str, Any]) -> None:
    parts = sum(part["share"] for part in record["parts"])
    assert parts + record["gaps"]["share"] == pytest.approx(1)
    assert 0 < record["gaps"]["share"] < 1
    assert record["step"]["profiled_ms"] > 0 and record["step"]["ms"] > 0


def test_the_allocator_is_watched(record: dict[str, Any]) -> None:
    assert record["allocator"]["allocations"] > 50
    assert record["allocator"]["bytes"] > 4 * 8 * 32 * 32  # at least one map
    assert max(held for _, held in record["memory"]) <= record["allocator"]["peak_bytes"]
    times = [at for at, _ in record["memory"]]
    assert times == sorted(times)


def test_a_backend_that_cannot_be_seen_into_is_refused() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(UnavailableError, match="sees nothing of what backend onnx computes"):
        profiled(backend="onnx")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_waits_within_an_iteration(backend: str) -> None:
    assert profiled(backend=backend)["waits"]["in_iterations"] == {}


def test_a_wait_within_an_iteration_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One `.item()` in the last layer, in each of four iterations."""
    honest = Marked.__getattr__

    def waiting(self: Marked, name: str) -> Any:
        call = honest(self, name)
        if name != "head":
            return call

        def late(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            x.sum().item()
            return call(x, *arguments, **options)

        return late

    monkeypatch.setattr(Marked, "__getattr__", waiting)
    assert profiled()["waits"]["in_iterations"] == {"aten::_local_scalar_dense": 4}


def test_the_operator_has_a_name_of_its_own() -> None:
    def operator(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    problem = Problem(torch.rand(1, 3, 16, 16), (3, 32, 32), operator)
    config = replace(SMALL, stop=("fixed",))
    found = profiling.profile_fit(
        problem, config, backend="native", device="cpu", iterations=1, limits=LIMITS
    )
    assert "operator" in {part["name"] for part in found.record["parts"]}


def test_the_page_loads_nothing_and_ends_with_what_to_fix(record: dict[str, Any]) -> None:
    named = record | {"setting": record["setting"] | {"backend": "<img src=x>"}}
    page = profile_page.draw(named)
    assert "&lt;img src=x&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|<img|<script|<link|url\(", page)
    for part in record["parts"]:
        assert f"<td>{part['name']}</td>" in page
    lines = re.findall(r"<p>(\d\. [^<]*)</p>", page)
    assert len(lines) == 5
    assert page.index("What should I fix first?") < page.index(lines[0])
    assert page.rstrip().endswith(f"<p>{lines[-1]}</p>\n</body>\n</html>")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ceilings, "SAMPLE", 1e-3)
    monkeypatch.setattr(profiling, "ceilings", lambda *arguments: LIMITS)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashdip", "profile", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


SMALL_RUN = (
    *("--size", "32", "--iterations", "2", "--device", "cpu", "--precision", "fp32"),
    *("--set", "network.down=8,8", "--set", "network.inputs=4", "--set", "read_every=2"),
)


def test_the_command_writes_table_trace_and_page(run: Any) -> None:
    code, out, err = run(*SMALL_RUN)
    assert (code, "Traceback" in err) == (0, False)
    assert "| level0.up " in out
    lines = out.splitlines()
    assert lines[-6] == "what should I fix first?"
    assert [line[0] for line in lines[-5:]] == list("12345")
    trace = json.loads(Path("profile/trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"flashdip: level0.up", "flashdip: iteration", "flashdip: reading"} <= names
    kept = json.loads(Path("profile/profile.json").read_text())
    assert kept["parts"]
    assert Path("profile/report.html").read_text().startswith("<!DOCTYPE html>")
    code, _, err = run(*SMALL_RUN)
    assert (code, "--force" in err) == (2, True)
    code, out, _ = run(*SMALL_RUN, "--force", "--json")
    assert (code, set(json.loads(out))) == (0, set(kept))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "fats"], "'fats'"),
        (["--set", "speed"], "FIELD=VALUE"),
        (["--precision", "fp8"], "precision"),
        (["-o", "no/where"], "cannot be made"),
    ],
)
def test_bad_input_gets_one_line(run: Any, options: list[str], said: str) -> None:
    code, out, err = run(*SMALL_RUN[:6], *options)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("flashdip: error: ")
    assert said in err
