"""Operations are right before they are measured, and restorations end when they are good."""

import types
from typing import Any

import pytest
import torch

from flashdip.bench import baselines, ops, restoring
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.ops import check
from flashdip.kernels import native

CPU = torch.device("cpu")
LIMITS = Ceilings(1e10, {"fp32": 1e11, "bf16": 1e11})
SIZE = 24


@pytest.mark.parametrize("case", ops.cases(SIZE), ids=lambda case: case.name)
@pytest.mark.parametrize(("opset", "precision"), ops.providers(["fp32", "bf16"]))
def test_every_operation_passes_its_gate(case: ops.Case, opset: str, precision: str) -> None:
    found = check(case, CPU, opset, precision)
    assert "result" in found
    assert all(each["error"] <= each["allowed"] for each in found.values())


def test_an_operation_that_is_wrong_shows_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of one gradient is enough; the right op set is measured all the same."""

    def broken(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return native.conv_norm_act(x * 1.01 - 0.01 * x.detach(), *arguments, **options)

    wrong = types.SimpleNamespace(**{**vars(native), "conv_norm_act": broken})
    right = ops.op_set
    monkeypatch.setattr(ops, "op_set", lambda name: wrong if name == "native" else right(name))
    case = ops.cases(SIZE)[2]
    rows, left_out = ops.rows(case, CPU, ops.providers(["fp32"]), LIMITS, rounds=1, block=0.0)
    assert [row["parameters"]["opset"] for row in rows] == ["reference", "reference"]
    (reason,) = left_out.values()
    assert "the gradient 1 is off by 1.0e-02" in reason


def test_forward_is_measured_without_gradients() -> None:
    """And with them apart: three times the operations, all in the baseline's terms."""
    case = ops.cases(SIZE)[4]
    rows, _ = ops.rows(case, CPU, ops.providers(["fp32"]), LIMITS, rounds=2, block=0.0)
    names = [row["name"] for row in rows]
    assert names == [
        f"conv 1x1, 128, {passes}, {opset} (fp32)"
        for passes in ("forward", "forward and backward")
        for opset in ("reference", "native")
    ]
    forward, both = (row["work"]["flops"] for row in rows[::2])
    assert forward == 2 * 128 * 128 * SIZE * SIZE
    assert both == 3 * forward
    assert [row["baseline"] for row in rows] == [names[0], names[0], names[2], names[2]]
    assert all(row["roof_share"] > 0 for row in rows)


def test_restorations_end_when_they_are_good() -> None:
    """Each begins anew, with another seed, and tells its iterations."""
    made = restoring.engine(64, "cpu", 8.0, "native", "fp32", "quick")
    for _ in range(2):
        made.step()
    facts = made.facts()
    assert facts["target_db"] == 8.0
    assert len(facts["iterations"]) == 2
    assert all(count % restoring.LOOK_EVERY == 0 for count in facts["iterations"])


def test_a_restoration_that_misses_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "MOST", 10)
    made = restoring.published(64, "cpu", 60.0)
    with pytest.raises(restoring.MissedError, match="60 dB were not reached within 10"):
        made.step()


def test_steps_are_set_up() -> None:
    """The published loop with its host work; two fits of a preset with their statistics read."""
    for made in (
        baselines.published(64, True, "cpu"),
        baselines.engine(64, "cpu", "native", "fp32", 2, "quick", True),
    ):
        assert made.sync is None
        made.step()
        assert made.memory() > 0
