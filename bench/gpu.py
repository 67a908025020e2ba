"""What the kernels do on the NVIDIA GPU at hand: whether they are right, then how fast they are.

    python -m flashdip.bench.gpu [--full]

Each part runs in a process of its own, has a time limit, and leaves its result in a file when it is
done; called again, what is done for this GPU and this code is shown and the rest is gone on with.
No figure is shown before the gate is passed (`flashdip.bench.gate`). All timing is that of
`flashdip.bench.measure`: variants in processes of their own take turns.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from flashdip.bench import baselines, gate, machine, rendering
from flashdip.bench.cases import configuration
from flashdip.bench.correct import WrongResultError
from flashdip.bench.measure import worker
from flashdip.bench.turns import Make, Plan, compare
from flashdip.engine.backends import TRITON
from flashdip.engine.files import atomic, one_line

PRECISIONS = ("fp16", "bf16")
GOALS = {"published": 4.0, "published + host work": 10.0, "torch.compile max-autotune": 1.5}


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        name: Of its file.
        limit: Seconds that it may take.
        compute: Returns its result, plain values for JSON; given the seconds it may take.
        gate: Whether no other part is run if it fails.
    """

    name: str
    limit: float
    compute: Callable[[float], dict[str, Any]]
    gate: bool = False


def parts(full: bool) -> list[Part]:
    """Return what is to be done, in order."""
    device = torch.device("cuda")

    def steps(precision: str) -> Callable[[float], dict[str, Any]]:
        return lambda limit: gate.check_steps(gate.topologies(), device, precision)

    def photograph(limit: float) -> dict[str, Any]:
        torch.backends.cudnn.allow_tf32 = False  # `reference` is to be float32
        return gate.check_photograph(device, PRECISIONS)

    def speed(size: int, fits: int) -> Callable[[float], dict[str, Any]]:
        return lambda limit: measured(variants(size, fits), limit, full)

    listed = [Part(f"gate-steps-{each}", 900, steps(each), gate=True) for each in PRECISIONS]
    listed.append(Part("gate-photograph", 300, photograph, gate=True))
    sizes, counts = ((512, 256, 1024), (1, 4, 16)) if full else ((512,), (1, 4))
    listed += [Part(f"speed-{s}-F{f}", 900, speed(s, f)) for s in sizes for f in counts]
    listed.append(Part("quick-512", 300, quick))
    listed.append(Part("onnx-512", 600, lambda limit: rendering.drawings(512, limit)))
    return listed


def variants(size: int, fits: int) -> dict[str, tuple[Make, int]]:
    """Return how each variant is made, and how many fits its step advances."""
    others: dict[str, Make] = {
        "published": (baselines.published, (size, False, "cuda")),
        "published + host work": (baselines.published, (size, True, "cuda")),
        "bf16 channels-last": (baselines.plain, (size,)),
        "bf16 channels-last, CUDA graph": (baselines.captured, (size,)),
        "torch.compile max-autotune": (baselines.plain, (size, True)),
    }
    made: dict[str, tuple[Make, int]] = {
        f"triton {each}": ((baselines.engine, (size, "cuda", "triton", each, fits)), fits)
        for each in PRECISIONS
    }
    return made | {name: (make, 1) for name, make in others.items()}


def measured(made: Mapping[str, tuple[Make, int]], limit: float, energy: bool) -> dict[str, Any]:
    """Measure variants for so many seconds; see `turns.compare`, and "tf32" beside it."""
    meter = machine.joules(torch.device("cuda")) if energy else None
    tf32 = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
    }
    return compare(made, Plan(limit), meter=meter) | {"tf32": tf32}


def quick(limit: float) -> dict[str, Any]:
    """Measure a restoration by the preset of that name, preparation included."""
    with worker(baselines.restoration, 512, "quick", limit=limit) as running:
        return {"restoration": running.seconds(steps=1, warmup=1)}


def identity() -> dict[str, str]:
    """Return what a result holds for: the GPU, what drives it, and the code."""
    driver = "unknown"
    with contextlib.suppress(Exception):  # only told
        import pynvml

        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "source": machine.source(),
    }


def unavailable() -> str | None:
    """Return in one line why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    reasons = TRITON.unavailable(torch.device("cuda"), configuration("fp16"))
    return "; ".join(reasons) or None


def run(
    listed: Sequence[Part],
    directory: Path,
    of: dict[str, str],
    execute: Callable[[Part], str | None],
    show: Callable[[Part, dict[str, Any]], None],
) -> int:
    """Do the parts that are not done, and show all; return the exit code.

    Args:
        listed: The parts.
        directory: Where results lie.
        of: What they have to hold for.
        execute: Does a part, which stores its result; returns what went wrong.
        show: Shows a result.
    """
    code = 0
    for part in listed:
        result, wrong = stored(part, directory, of), None
        if result is None:
            wrong = execute(part)
            result = stored(part, directory, of)
        if result is not None:
            show(part, result)
            continue
        print(f"{part.name}: {wrong or 'it left no result'}", flush=True)
        code = 1
        if part.gate:
            print("No figures are shown.")
            break
    return code


def stored(part: Part, directory: Path, of: dict[str, str]) -> dict[str, Any] | None:
    """Return a part's result; None if there is none that holds here."""
    try:
        found = json.loads((directory / f"{part.name}.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("of") != of:
        return None
    result = found.get("result")
    return result if isinstance(result, dict) else None


def store(part: Part, directory: Path, of: dict[str, str], result: dict[str, Any]) -> None:
    """Write a part's result: all of it or nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    with atomic(directory / f"{part.name}.json", force=True) as path:
        path.write_text(json.dumps({"of": of, "result": result}, indent=1))


def execute(command: Sequence[str], limit: float) -> str | None:
    """Run a command; return what went wrong. All its processes are killed at the limit."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"cut after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if code == 0 else f"failed (exit code {code})"


def show(console: Console, part: Part, result: dict[str, Any]) -> None:
    """Print a part's result."""
    if part.gate:
        console.print(f"{part.name}: passed")
    elif "pictures" in result:
        rates = [f"{name} {1 / each:.1f} pictures/s" for name, each in result["pictures"].items()]
        console.print(f"{part.name}: {', '.join(rates) or 'nothing'} (measured, exported model)")
        for name, reason in result["left_out"].items():
            console.print(f"{name}: {reason}", soft_wrap=True)
    elif "rows" not in result:
        seconds = ", ".join(f"{name} {value:.3f} s" for name, value in result.items())
        console.print(f"{part.name}: {seconds} (measured)")
    else:
        console.print(f"\n{part.name}: measured; an iteration of one fit")
        console.print(_table(result))
        on = [name for name, value in result["tf32"].items() if value] or ["nothing"]
        console.print(f"The published loop is float32, with TF32 in {' and '.join(on)}.")
        for name, reason in result["left_out"].items():
            console.print(f"{name}: {reason}", soft_wrap=True)
        if part.name == "speed-512-F1":
            console.print(_goals(result["rows"]), soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=MARKDOWN)
    table.add_column("")
    titles = ("ms", "p10", "p90", "it/s", "times as fast", "first step s", "peak MiB", "J")
    for title in titles:
        table.add_column(title, justify="right")
    for name, row in result["rows"].items():
        energy = row.get("joules")
        table.add_row(
            name,
            *(f"{1000 * row[key]:.3f}" for key in ("median", "p10", "p90")),
            f"{1 / row['median']:.1f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['first_step']:.1f}",
            f"{row['memory'] / 2**20:.0f}",
            "" if energy is None else f"{energy:.3g}",
        )
    return table


def _goals(rows: dict[str, Any]) -> str:
    ours = rows.get("triton fp16")
    reached = [
        f"{rows[name]['median'] / ours['median']:.2f} times {name} (goal {goal:g})"
        for name, goal in GOALS.items()
        if ours is not None and name in rows
    ]
    return f"triton fp16: {', '.join(reached) or 'nothing to compare'}. Goals are for an H100."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done; return the exit code: 2 without a GPU, 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="256 and 1024 pixels, F = 16, energy")
    parser.add_argument("--directory", type=Path, default=Path("bench-gpu"), help="of the results")
    parser.add_argument("--part", help="do this part only, in this process")
    chosen = parser.parse_args(arguments)
    reason = unavailable()
    if reason is not None:
        print(f"bench-gpu: this measures on an NVIDIA GPU, and there is none to use: {reason}")
        return 2
    of, listed = identity(), parts(chosen.full)
    if chosen.part is not None:
        part = next(each for each in listed if each.name == chosen.part)
        try:
            store(part, chosen.directory, of, part.compute(0.9 * part.limit))
        except (WrongResultError, TimeoutError) as error:
            print(one_line(error))
            return 1
        return 0

    console = Console(width=110)
    console.print(", ".join(f"{name} {value}" for name, value in of.items()))

    def execute_part(part: Part) -> str | None:
        console.print(f"{part.name}: at most {part.limit:.0f} s ...")
        command = [sys.executable, "-m", "flashdip.bench.gpu", "--part", part.name]
        command += ["--directory", str(chosen.directory), *(["--full"] if chosen.full else [])]
        return execute(command, part.limit)

    return run(
        listed, chosen.directory, of, execute_part, lambda part, result: show(console, part, result)
    )


if __name__ == "__main__":
    sys.exit(main())
