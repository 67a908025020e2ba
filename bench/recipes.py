"""Which settings restore best in the least time: a search that can be interrupted and goes on.

    python -m flashdip.bench.recipes --task denoise --data parity-images -o recipes

Successive halving (Jamieson and Talwalkar, 2016): every recipe is tried on two small pictures with
one seed; those near the front of quality over work go on to four larger pictures and two seeds; the
front of these is confirmed on pictures that had no part in the choice. A trial records the PSNR of
the averaged output over iterations, where each stopping rule would have ended it, the operations of
an iteration, and its seconds as they were on this machine at that time. The front is drawn over
operations: they are the same on a busy machine. Presets are chosen from what this finds.
"""

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from flashdip.bench.explore.overfit import overfit
from flashdip.bench.work import count, total
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, DivergedError, InputError
from flashdip.engine.images import load
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Downsample, Mask
from flashdip.engine.problems import Problem

SIGMA = 25 / 255
NEAR = 0.1  # dB below the front, up to which a recipe goes on


@dataclass(frozen=True)
class Rung:
    """A round of the search.

    Attributes:
        name: Of the round.
        pictures: Names; see `picture`.
        size: Pixels a side.
        seeds: Of the fits.
    """

    name: str
    pictures: tuple[str, ...]
    size: int
    seeds: tuple[int, ...]


RUNGS = (
    Rung("screen", ("house", "chelsea"), 128, (0,)),
    Rung("final", ("house", "F16", "chelsea", "coffee"), 256, (0, 1)),
    Rung("confirm", ("kodim03", "Cameraman256", "astronaut", "rocket"), 256, (0, 1)),
)

Settings = Mapping[str, str]
_WIDTHS = {
    "8": "8,16,32,64,64",
    "16": "16,32,64,128,128",
    "16 thin": "16,32,64,64,64",
    "24": "24,48,96,128,128",
    "32": "32,64,128,128,128",
    "32 thin": "32,64,64,64,64",
    "64": "64,64,128,128,128",
    "128": "128,128,128,128,128",
    "16 x4": "16,32,64,128",
    "32 x4": "32,64,128,128",
    "64 x4": "64,64,128,128",
}
_ALTERED: dict[str, Settings] = {
    "8 inputs": {"network.inputs": "8"},
    "16 inputs": {"network.inputs": "16"},
    "no skips": {"network.skip": "0"},
    "skips of 16": {"network.skip": "16"},
    "scales uniform": {"network.scale": "uniform"},
    "betas .9 .999": {"betas": "0.9,0.999"},
    "betas .9 .99": {"betas": "0.9,0.99"},
    "betas .9 .95": {"betas": "0.9,0.95"},
    "betas .8 .95": {"betas": "0.8,0.95"},
    "betas .7 .8": {"betas": "0.7,0.8"},
    "rate .005": {"learning_rate": "0.005"},
    "rate .02": {"learning_rate": "0.02"},
    "cosine": {"schedule": "cosine"},
    "warm-up": {"warmup": "50"},
    "perturbation .02": {"perturbation": "0.02"},
    "perturbation .05": {"perturbation": "0.05"},
    "average .98": {"average": "0.98"},
    "average .995": {"average": "0.995"},
}
BASE: Settings = {"network.down": _WIDTHS["16"], "betas": "0.8,0.9"}
_UP = {
    "nearest": "nearest",
    "bilinear": "bilinear",
    "bilinear outside": "bilinear,bilinear,nearest,nearest,nearest",
    "bilinear inside": "nearest,nearest,bilinear,bilinear,bilinear",
}


def recipes() -> dict[str, Settings]:
    """Return all recipes by name: each width and each alteration of the width 16, by upsampling."""
    found: dict[str, Settings] = {}
    for name, up in _UP.items():
        base = {**BASE, "network.upsample": up}
        found[f"{name}, width 16"] = base
        if name in ("nearest", "bilinear"):
            widths = {f"width {width}": {"network.down": down} for width, down in _WIDTHS.items()}
            for change, settings in (widths | _ALTERED).items():
                found[f"{name}, {change}"] = {**base, **settings}
    return found


def picture(name: str, size: int, data: Path | None) -> Tensor:
    """Return the centre of a picture, shrunk to this shorter side, [C, size, size] in [0, 1].

    Args:
        name: Of a photograph in scikit-image, or of a truth in a folder as `flashdip parity` reads.
        size: Pixels a side.
        data: That folder.

    Raises:
        InputError: There is no such picture.
    """
    from skimage import data as photographs

    if hasattr(photographs, name):
        image = torch.from_numpy(getattr(photographs, name)()).movedim(-1, 0)[None] / 255
    else:
        files = sorted(data.glob(f"*/{name}_GT.png")) if data else []
        if not files:
            raise InputError(f"{name}: expected NAME_GT.png in a folder of --data, found none")
        image = load(files[0]).tensor()
    scale = size / min(image.shape[2:])
    if scale < 1:
        sides = [round(side * scale) for side in image.shape[2:]]
        image = torch.nn.functional.interpolate(image, sides, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in image.shape[2:])
    return image[0, :, top : top + size, left : left + size].clamp(0, 1).contiguous()


def damaged(task: str, clean: Tensor, seed: int, sigma: float = SIGMA) -> Problem:
    """Return a problem whose answer is `clean` [C, H, W]: noise, x4, or half the pixels missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (clean.shape[0], clean.shape[1], clean.shape[2])
    image = clean[None]
    if task == "denoise":
        noise = torch.randn(image.shape, generator=generator)
        return Problem((image + sigma * noise).clamp(0, 1), shape, sigma=sigma)
    if task == "superres":
        shrink = Downsample(4)
        return Problem(shrink(image), shape, operator=shrink)
    if task == "restore":
        mask = (torch.rand(1, 1, *shape[1:], generator=generator) < 0.5).float()
        return Problem(image * mask, shape, operator=Mask(mask), measured=mask)
    raise ConfigError(f"task: expected denoise, restore or superres, got {task!r}")


def trial(
    task: str, settings: Settings, name: str, size: int, seed: int, data: Path | None
) -> dict[str, Any]:
    """Fit once; return what happened, as plain values."""
    clean = picture(name, size, data)
    network = SkipConfig(outputs=clean.shape[0])
    config = replace(FitConfig(network=network).override(settings), seed=seed)
    work = total(count(config, (size, size), "bf16"))
    begun = time.perf_counter()
    found: dict[str, Any]
    try:
        found = overfit(damaged(task, clean, seed), clean[None], config)
    except DivergedError:
        found = {"iterations": [], "decibels": [], "rules": {}}
    seconds = time.perf_counter() - begun
    return {**found, "flops": work.flops, "seconds": seconds}


class Journal:
    """All trials, one a line of a file, each written as soon as it is done.

    Args:
        path: The file; made if it is not there. A last line that was cut off is not counted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        for line in whole.splitlines():
            entry = json.loads(line)
            self.trials[entry["key"]] = entry
        path.write_text(f"{whole}\n" if whole else "")

    def run(
        self, task: str, settings: Settings, rung: Rung, data: Path | None
    ) -> Iterator[dict[str, Any]]:
        """Yield a recipe's trials of a round, those made before included."""
        for name in rung.pictures:
            for seed in rung.seeds:
                what: dict[str, Any] = {"task": task, "settings": dict(settings)}
                what |= {"picture": name, "size": rung.size, "seed": seed}
                key = json.dumps(what, sort_keys=True)
                if key not in self.trials:
                    entry = {"key": key, **what} | trial(
                        task, settings, name, rung.size, seed, data
                    )
                    with self.path.open("a") as file:
                        file.write(json.dumps(entry) + "\n")
                    self.trials[key] = entry
                yield self.trials[key]


@dataclass(frozen=True)
class Curve:
    """A recipe's quality over its work, averaged over trials.

    Attributes:
        iterations: Of the points.
        decibels: Mean PSNR there.
        flops: Mean operations up to there.
    """

    iterations: list[int]
    decibels: list[float]
    flops: list[float]

    @classmethod
    def of(cls, trials: Sequence[Mapping[str, Any]]) -> "Curve":
        """Average trials that all went as far; one that diverged makes the curve empty."""
        points = list(zip(*(t["decibels"] for t in trials), strict=False))
        iterations = trials[0]["iterations"][: len(points)]
        each = statistics.mean(t["flops"] for t in trials)
        return cls(iterations, [statistics.mean(p) for p in points], [each * i for i in iterations])

    @property
    def best(self) -> tuple[float, int]:
        """The highest point: PSNR and iteration."""
        return max(zip(self.decibels, self.iterations, strict=True), default=(0.0, 0))

    def within(self, flops: float) -> float:
        """Return the best PSNR that so much work brings."""
        reached = [d for d, f in zip(self.decibels, self.flops, strict=True) if f <= flops]
        return max(reached, default=0.0)


def front(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Return how far each recipe stays below the best of all, in dB, where it comes closest."""
    budgets = sorted({flops for curve in curves.values() for flops in curve.flops})
    top = {each: max(curve.within(each) for curve in curves.values()) for each in budgets}
    rising = [
        each
        for before, each in zip([None, *budgets], budgets, strict=False)
        if before is None or top[each] > top[before] + 0.01
    ]
    worth = [each for each in rising if top[each] > max(top.values()) - 2]  # dB
    return {
        name: min(top[each] - curve.within(each) for each in worth)
        for name, curve in curves.items()
    }


def search(
    task: str,
    listed: Mapping[str, Settings],
    rungs: Iterable[Rung],
    journal: Journal,
    data: Path | None,
    tell: Any = typer.echo,
) -> dict[str, Curve]:
    """Let recipes compete in round after round; return the last round's curves."""
    names = list(listed)
    curves: dict[str, Curve] = {}
    for rung in rungs:
        curves = {}
        for name in names:
            curves[name] = Curve.of(list(journal.run(task, listed[name], rung, data)))
            decibels, at = curves[name].best
            tell(f"{rung.name}: {name}: {decibels:.2f} dB at {at}")
        below = front(curves)
        names = [name for name in names if below[name] <= NEAR]
        tell(f"{rung.name}: the front: {', '.join(names)}")
    return curves


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw quality over work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([f / 1e12 for f in curve.flops], curve.decibels, label=name)
    axes.set(xscale="log", xlabel="TFLOP of a fit", ylabel="PSNR, dB, mean over trials")
    top = max(curve.best[0] for curve in curves.values())
    axes.set_ylim(top - 4, top + 0.2)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path)


def main(
    task: Annotated[str, typer.Option(help="denoise, restore or superres.")] = "denoise",
    data: Annotated[Path | None, typer.Option(help="A folder as 'flashdip parity' reads.")] = None,
    output: Annotated[Path, typer.Option("-o", help="Folder of journal and picture.")] = Path(
        "recipes"
    ),
    only: Annotated[
        str, typer.Option(metavar="TEXT;...", help="Recipes that contain one of these.")
    ] = "",
    rounds: Annotated[str, typer.Option(help="screen, final, confirm.")] = "screen,final,confirm",
    iterations: Annotated[int, typer.Option(help="Of each fit.")] = 700,
) -> None:
    """Search, and draw the front of each round that was asked for."""
    base = {"iterations": str(iterations)} | ({} if task == "denoise" else {"perturbation": "0.03"})
    listed = {
        name: {**base, **settings}
        for name, settings in recipes().items()
        if any(text in name for text in only.split(";"))
    }
    journal = Journal(output / "trials.jsonl")
    asked = [rung for rung in RUNGS if rung.name in rounds.split(",")]
    draw(search(task, listed, asked, journal, data), output / f"{task}.png")


if __name__ == "__main__":
    typer.run(main)
