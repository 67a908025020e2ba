"""Float32 is a check of 16 bits: no product of it may be shortened to TF32, which holds 11 of 24.

Compiling needs a process in which Triton does not interpret.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUSED = Path(__file__).parents[3] / "kernels" / "fused"

SCRIPT = """
import dataclasses, json, os, sys
import torch
from flashdip.engine.backends import plans
from flashdip.engine.networks.skip import SkipConfig
from flashdip.kernels.fused import inspect
from tests.kernels.fused.matmul import matmul

arch = sys.argv[1]
network = SkipConfig(inputs=16, down=(16,), skip=4, upsample="nearest")
launches = plans.launches(network, 16, 16, arch, torch.float32)
# One of each kernel; which of them multiply matrices, its intermediate code says.
launches = list({launch.kernel: launch for launch in reversed(launches)}.values())

# A kernel that leaves the choice to Triton is shortened.
left = matmul(64, 16, 16, 16, 4, 1)
factors = {name: left.arguments[name].float() for name in ("a_ptr", "b_ptr")}
launches.append(dataclasses.replace(left, arguments=left.arguments | factors))

compiled = inspect.compile_launches([(launch, arch) for launch in launches], os.cpu_count() or 1)
products = [
    (launch.name, sorted(done.code.matrix))
    for launch, done in zip(launches, compiled, strict=True)
    if "tt.dot" in done.ttir
]
print(json.dumps(products))
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_product_of_float32_is_shortened(arch: str, tmp_path: Path) -> None:
    """The machine code has no matrix instruction, but where Triton was left the choice."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arch],
        capture_output=True,
        text=True,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    *products, (_, shortened) = json.loads(done.stdout)
    names = [name for name, _ in products]
    assert {"head", "level0.one backward", "level0.conv forward"} <= set(names), names
    assert all("TF32" in kind for kind in shortened), shortened
    assert shortened
    assert not [(name, matrix) for name, matrix in products if matrix]


def test_every_product_says_how_precise_it_is() -> None:
    """All kernels multiply by a call that asks for all bits of its factors."""
    calls = [
        (path.name, node)
        for path in sorted(FUSED.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.dot", "tl.dot_scaled")
    ]
    assert calls
    for name, call in calls:
        precision = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("input_precision")
        assert precision == "'ieee'", f"{name}:{call.lineno}: {precision}"
