"""What ahead-of-time compilation finds, and the command that shows it.

Compiling needs a process in which Triton does not interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = """
import dataclasses, json, os, time
from pathlib import Path
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from flashdip.kernels.fused import checks, inspect
from tests.kernels.fused.matmul import matmul

def shown(launch, arch):
    compiled = inspect.compile_launch(launch, arch)
    found = dataclasses.asdict(compiled) | {"breaches": list(checks.breaches(launch, compiled))}
    del found["ttir"]
    return found | {"spills": compiled.spills, "matrix": compiled.matrix_instructions}

good, flat, wide = (128, 128, 64, 8, 3), (128, 128, 64, 8, 1), (128, 256, 64, 4, 4)
found = {arch: shown(matmul(512, *good), arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")}
found["flat"] = shown(matmul(512, *flat), "sm_80")
found["wide"] = shown(matmul(512, *wide), "sm_89")

# Launches that need the same code are compiled once, and found again in another process.
one, same, odd = matmul(512, *good), matmul(768, *good), matmul(500, *good)
made = inspect.compile_launches([(one, "sm_80"), (same, "sm_80")])
found["shared code"] = made[0] is made[1]
found["odd differs"] = inspect.specialise(odd, "sm_80") != inspect.specialise(one, "sm_80")
key = inspect.specialise(one, "sm_80")
kept = Path(os.environ["XDG_CACHE_HOME"]) / "flashdip" / "kernels" / f"{key.key}.json"
found["kept"] = inspect._load(key) == made[0]
kept.write_text(kept.read_text()[:100])
found["torn"] = inspect._load(key) is None and inspect.compile_launch(one, "sm_80") == made[0]

# Where a tensor begins in its allocation decides whether its loads may be wide.
memory = torch.empty(512 * 512 + 8, dtype=torch.float16, device="meta")
def begin(offset):
    part = memory[offset:][: 512 * 512].view(512, 512)
    launch = dataclasses.replace(one, arguments=one.arguments | {"a_ptr": part})
    return dict(inspect.specialise(launch, "sm_80").aligned).get("a_ptr")
found["aligned"] = [begin(offset) for offset in (0, 1, 4, 8)]
none = dataclasses.replace(one, arguments=one.arguments | {"c_ptr": None, "K": 1, "M": 2**40})
found["signature"] = dict(inspect.specialise(none, "sm_80").signature)
print(json.dumps(found))
"""

COMMAND = """
from flashdip.engine.backends import plans
from tests.kernels.fused.matmul import matmul

tile = (128, 128, 64, 8, 3)
plans.launches = lambda network, height, width, arch, dtype: [matmul(height, *tile)] * 2
plans.readings = lambda *of: []
import typer
from flashdip.engine.kernels_command import kernels
typer.run(kernels)
"""


def _run(
    script: str, cache: Path, *arguments: str, **more: str
) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"XDG_CACHE_HOME": str(cache), "COLUMNS": "200", **more}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(cache: Path) -> dict[str, Any]:
    done = _run(SCRIPT, cache)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout)
    return values


@pytest.mark.parametrize(
    ("arch", "instruction", "macs"),
    [("sm_80", "HMMA.16816.F32", 128 * 128 * 64), ("sm_90", "HGMMA.64x128x16.F32", 128 * 128 * 64)],
)
def test_a_product_has_its_matrix_instructions(
    found: dict[str, Any], arch: str, instruction: str, macs: int
) -> None:
    compiled = found[arch]
    (loop,) = compiled["code"]["loops"]
    assert list(compiled["code"]["matrix"]) == [instruction]
    assert loop["macs"] * compiled["threads"] // 32 == macs
    assert loop["loaded"] * compiled["threads"] // 32 == (128 + 128) * 64 * 2
    assert loop["copies"] == 8
    assert compiled["code"]["loads"] == {"128": compiled["code"]["copies"]}
    assert compiled["code"]["stores"] == {"128": 8}
    assert 0 < compiled["registers"] <= 255
    assert compiled["spills"] == compiled["stack"] == compiled["conversions"] == 0
    assert compiled["breaches"] == []


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_are_read_too(found: dict[str, Any], arch: str) -> None:
    compiled = found[arch]
    assert compiled["matrix"] > 0
    assert compiled["code"]["loops"]
    assert compiled["registers"] > 0
    assert compiled["breaches"] == []


def test_without_pipelining_tiles_pass_through_registers(found: dict[str, Any]) -> None:
    assert found["flat"]["code"]["copies"] == 0
    assert found["flat"]["breaches"] == ["async", "layout"]


def test_what_does_not_fit_is_a_breach(found: dict[str, Any]) -> None:
    assert found["wide"]["spills"] > 0
    assert found["wide"]["breaches"] == ["spill", "shared"]


def test_launches_share_code_and_a_cache(found: dict[str, Any]) -> None:
    names = ("shared code", "odd differs", "kept", "torn")
    assert [found[name] for name in names] == [True] * 4


def test_launches_are_specialised_as_triton_does(found: dict[str, Any]) -> None:
    assert found["aligned"] == ["D", None, None, "D"]
    signature = found["signature"]
    assert (signature["a_ptr"], signature["N"], signature["M"]) == ("*fp16", "i32", "i64")
    assert signature["c_ptr"] == signature["K"] == "constexpr"


def test_the_command_prints_what_was_asked_for(cache: Path, found: dict[str, Any]) -> None:
    done = _run(COMMAND, cache, "--arch", "sm_90", "--size", "256", "--size", "512", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    (kernel,) = shown["kernels"]
    assert {"name", "arch", "registers", "spills", "shared", "gemm", "matrix_instructions"} <= set(
        kernel
    )
    assert kernel["launches"] == 4
    assert [(step["gpu"], step["size"]) for step in shown["steps"]] == [
        ("H100 SXM", 256),
        ("H100 SXM", 512),
    ]
    step = shown["steps"][1]
    assert (step["dtype"], step["launches"]) == ("float16", 2)
    assert step["flops"] == 2 * 2 * 512**3
    assert step["bytes"] == 2 * 3 * 512**2 * 2
    assert step["modelled_its"] == pytest.approx(1e3 / step["modelled_ms"])
    assert step["roof_share"] == pytest.approx(0.886 / step["modelled_ms"])
    alone = sum(launch["us"] for launch in step["modelled_us"]) / 1e3
    assert alone < step["modelled_ms"] < alone + 0.01  # launches have gaps between them


def test_the_command_prints_tables(cache: Path, found: dict[str, Any]) -> None:
    done = _run(COMMAND, cache, "--arch", "sm_80", "--size", "512", "--check")
    assert done.returncode == 0, done.stderr
    assert "matmul 128x128x64" in done.stdout
    assert "modelled" in done.stdout
    assert "A100 80GB" in done.stdout


def test_the_command_refuses_to_interpret(cache: Path) -> None:
    done = _run(COMMAND, cache, TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr.splitlines()[-1]


TTIR = """
module {
  tt.func public @f(%x: !tt.ptr<f16>, %n: i32) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32
    %c1 = arith.constant 1 : i32
    %c3 = arith.constant 3 : i32
    %a = arith.constant dense<0.0> : tensor<16x16xf16>
    %z = arith.constant dense<0.0> : tensor<16x16xf32>
    %pid = tt.get_program_id x : i32
    %few = arith.cmpi slt, %pid, %c3 : i32
    %r:2 = scf.if %few -> (tensor<16x16xf32>, i32) {
      %s = scf.for %i = %c0 to %n step %c1 iter_args(%t = %z) -> (tensor<16x16xf32>)  : i32 {
        %d = tt.dot %a, %a, %t : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32>
        scf.yield %d : tensor<16x16xf32>
      }
      scf.yield %s, %c1 : tensor<16x16xf32>, i32
    } else {
      %s = scf.for %i = %c0 to %n step %c3 iter_args(%t = %z) -> (tensor<16x16xf32>)  : i32 {
        %first = arith.cmpi eq, %i, %c0 : i32
        %u = scf.if %first -> (tensor<16x16xf32>) {
          scf.yield %t : tensor<16x16xf32>
        } else {
          %d = tt.dot %a, %a, %t : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32>
          scf.yield %d : tensor<16x16xf32>
        }
        scf.yield %u : tensor<16x16xf32>
      }
      scf.yield %s, %c3 : tensor<16x16xf32>, i32
    }
    %true = arith.constant true
    %old = tt.atomic_rmw add, acq_rel, gpu, %x, %c1, %true : (!tt.ptr<i32>, i32, i1) -> i32
    %last = arith.cmpi eq, %old, %c3 : i32
    scf.if %last {
      %v = tt.load %x : !tt.ptr<f16>
    }
    tt.return
  }
}
"""


def test_programs_are_followed_through_loops_and_branches() -> None:
    """Three of five programs go one way; a loop's branch takes turns; one in four is the last."""
    from flashdip.kernels.fused.work import follow

    work = follow(TTIR, (5, 1, 1), [None, 7])
    assert [turns.tolist() for turns in work.turns] == [[7, 7, 7, 0, 0], [0, 0, 0, 3, 3]]
    macs = 16**3
    assert [done.tolist() for done in work.macs] == [
        [7 * macs] * 3 + [0, 0],
        [0] * 3 + [2 * macs] * 2,
    ]
    assert np.allclose(work.rounds, 1 + 1 / 4)  # the counter, and what the last one reads
    assert work.tail == 1


def test_conversions_that_move_nothing_do_not_count() -> None:
    """Two conversions in the main loop and one behind it, of which some only rename a layout."""
    from flashdip.kernels.fused.mlir import conversions

    product = next(line for line in TTIR.splitlines() if "tt.dot" in line)
    change = "%{} = ttg.convert_layout %a : tensor<16x16xf16, #a> -> tensor<16x16xf16, #b>"
    inside = "\n".join([change.format("x"), change.format("y"), product])
    text = TTIR.replace(product, inside, 1).replace("tt.return", f"{change.format('z')}\ntt.return")
    cases = [True, True, True], [False, True, True], [False, False, True]
    assert [conversions(text, moves) for moves in cases] == [2, 1, 0]
