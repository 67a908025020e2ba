"""Does 16-bit storage cost quality? Paired fits on a CPU: with it, and in float32.

    python -m flashdip.bench.precision --precisions fp16,bf16 --seeds 4 --size 96
    python -m flashdip.bench.precision --backend native --precisions bf16 --seeds 4 --size 128

Fits that store as the Triton kernels do are those of `flashdip.bench.emulated`; those of the
backend native are what users of a CPU get. Each pair shares image, noise, initial weights, input
and perturbation. A fit is chaotic: the order of a sum is enough to send it another
way. How far that alone takes a pair apart is seen with `--precisions fp32`, which rounds nothing.

Where storage is emulated, what rounding did to numbers, by layer, stands beside the difference.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashdip.bench.emulated import Count, emulate
from flashdip.bench.perturbation import PICTURES, SIGMA, best, picture
from flashdip.engine.backends.base import DTYPES
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.config import FitConfig
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.kernels import native
from flashdip.kernels.memory import kept_pages


def noisy(name: str, seed: int, size: int) -> tuple[Problem, Tensor]:
    """Return a photograph with noise, to be denoised, and the photograph."""
    truth = picture(name, size)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1000 + seed))
    return Problem((truth + SIGMA * noise).clamp(0, 1)[None], (3, size, size)), truth


def layers(counts: dict[tuple[str, str], Count]) -> Table:
    """Tell by layer what rounding did: to values and weights, and to gradients as they are scaled.

    What became 0 or subnormal is told as a share of all that was stored.
    """
    table = Table(box=MARKDOWN)
    table.add_column("layer")
    for kind in ("forward", "backward"):
        for title in ("largest", "overflow", "to 0", "subnormal"):
            table.add_column(f"{kind} {title}", justify="right")
    for layer in dict.fromkeys(layer for layer, _ in counts):
        cells: list[str] = []
        for backward in (False, True):
            of_layer = (
                count
                for (name, place), count in counts.items()
                if name == layer and place.startswith("gradient") == backward
            )
            total = sum(of_layer, Count())
            cells += [f"{total.largest:.1e}", str(total.overflowed)]
            cells += [_share(n, total.stored) for n in (total.flushed, total.subnormal)]
        table.add_row(layer, *cells)
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1e}" if part else "0"


def _native(problem: Problem, config: FitConfig, dtype: torch.dtype) -> EagerStep:
    return EagerStep(native, problem, config, torch.device("cpu"), dtype, None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all pairs; print each, the mean difference, its spread, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", default="triton", choices=("triton", "native"))
    parser.add_argument("--precisions", default="fp16,bf16", help="comma-separated")
    parser.add_argument("--images", type=int, default=2, help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="pixels a side")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--preset", default="quick")
    chosen = parser.parse_args(arguments)
    config = replace(
        preset("denoise", chosen.preset), iterations=chosen.iterations, stop=("fixed",)
    )
    precisions = chosen.precisions.split(",")
    differences: dict[str, list[float]] = {each: [] for each in precisions}
    counts: dict[str, dict[tuple[str, str], Count]] = {each: {} for each in precisions}
    console = Console(width=120)
    console.print(f"best averaged output in dB; {chosen.preset}, {chosen.size} pixels a side")
    console.print(f"picture     seed   float32  {'  '.join(f'{e:>7s}' for e in precisions)}")
    with kept_pages():
        for name in PICTURES[: chosen.images]:
            for seed in range(chosen.seeds):
                problem, truth = noisy(name, seed, chosen.size)
                own = replace(config, seed=seed)
                score = best(_native(problem, own, torch.float32), truth, own.iterations)
                row = []
                for each in precisions:
                    if chosen.backend == "native":
                        step, found = _native(problem, own, DTYPES[each]), {}
                    else:
                        step, ops = emulate(problem, own, DTYPES[each])
                        found = ops.counts
                    row.append(best(step, truth, own.iterations))
                    differences[each].append(row[-1] - score)
                    for key, count in found.items():
                        counts[each][key] = counts[each].get(key, Count()) + count
                cells = "  ".join(f"{value:7.3f}" for value in row)
                console.print(f"{name:10s}  {seed:4d}  {score:8.3f}  {cells}")
    for each in precisions:
        of = differences[each]
        spread = statistics.stdev(of) if len(of) > 1 else math.nan
        console.print(
            f"\n{each} less float32: mean {statistics.mean(of):+.3f} dB, "
            f"spread {spread:.3f}, standard error {spread / len(of) ** 0.5:.3f}, n {len(of)}"
        )
        if counts[each]:
            console.print(layers(counts[each]))


if __name__ == "__main__":
    main()
