"""Does the table of draws cost quality? Paired fits with the table and with fresh draws.

    python -m flashdip.bench.perturbation --seeds 4 --size 128

Each pair shares image, noise, initial weights and input; only the perturbation differs. What counts
is the mean difference in dB of the best averaged output, beside its spread over pairs.
"""

import argparse
import statistics
import types
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.config import FitConfig
from flashdip.engine.metrics import psnr
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.kernels import native

PICTURES = ("astronaut", "coffee", "chelsea")
SIGMA = 25 / 255


def fresh_draws(seed: int) -> types.SimpleNamespace:
    """Return the native op set with a perturbation that draws anew in each step."""
    generator = torch.Generator().manual_seed(2000 + seed)

    def perturb(
        z: Tensor, table: Tensor, offsets: Sequence[int], std: float, dtype: torch.dtype
    ) -> Tensor:
        return (z + std * torch.randn(z.shape, generator=generator)).to(dtype)

    return types.SimpleNamespace(**{**vars(native), "perturb": perturb})


def picture(name: str, size: int) -> Tensor:
    """Return the centre of one of scikit-image's photographs, halved, [3, size, size] in [0, 1]."""
    from skimage import data

    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="area")[0]
    top, left = ((side - size) // 2 for side in image.shape[1:])
    return image[:, top : top + size, left : left + size].contiguous()


def best(step: EagerStep, truth: Tensor, iterations: int) -> float:
    """Return the highest PSNR that the averaged output reaches, looked at every tenth iteration."""
    scores = []
    slot = step.slots[0]
    while slot.iteration < iterations:
        step()
        if slot.iteration % 10 == 0:
            scores.append(psnr(slot.image()[0], truth))
    return max(scores)


def compare(name: str, seed: int, size: int, config: FitConfig) -> tuple[float, float]:
    """Return the best PSNR with the table and with fresh draws, of one pair."""
    truth = picture(name, size)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1000 + seed))
    problem = Problem((truth + SIGMA * noise).clamp(0, 1)[None], (3, size, size))
    config = replace(config, seed=seed)
    scores = [
        best(
            EagerStep(ops, problem, config, torch.device("cpu"), torch.float32, None),
            truth,
            config.iterations,
        )
        for ops in (native, fresh_draws(seed))
    ]
    return scores[0], scores[1]


def main() -> None:
    """Run all pairs; print each, the mean difference and its standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--preset", default="quick")
    arguments = parser.parse_args()
    config = replace(preset("denoise", arguments.preset), iterations=arguments.iterations)
    differences = []
    print("picture     seed  table dB  fresh dB  difference")
    for name in PICTURES:
        for seed in range(arguments.seeds):
            table, fresh = compare(name, seed, arguments.size, config)
            differences.append(table - fresh)
            print(
                f"{name:10s}  {seed:4d}  {table:8.3f}  {fresh:8.3f}  {table - fresh:+10.3f}",
                flush=True,
            )
    spread = statistics.stdev(differences)
    mean, error = statistics.mean(differences), spread / len(differences) ** 0.5
    print(
        f"mean {mean:+.3f} dB, standard error {error:.3f}, spread {spread:.3f}, "
        f"n {len(differences)}"
    )


if __name__ == "__main__":
    main()
