"""The figures of the experiments, by matplotlib, which is optional."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashdip.bench.parity.table import NAMES
from flashdip.engine.errors import UnavailableError
from flashdip.engine.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0d74ce", "#ab6400", "#18794e", "#ce2c31")


def require() -> None:
    """Check that figures can be drawn, before hours are spent on what they are to show.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UnavailableError("matplotlib is not installed: pip install 'flashdip[plots]'")


def impedance(found: Mapping[str, Any]) -> "Figure":
    """Draw the losses of the four targets."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for (name, one), colour in zip(found.items(), _COLOURS, strict=True):
        axes.plot(one["iterations"], one["losses"], label=name, color=colour)
    axes.set(xlabel="iteration", ylabel="mean squared error", yscale="log")
    axes.set_title("The network fits noise reluctantly")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def priors(found: Mapping[str, Any]) -> "Figure":
    """Draw an image of each architecture, with what its spectrum says."""
    titles = [
        f"{name}\nslope {one['slope']:.1f}, {one['wavelength']:.0f} px"
        for name, one in found.items()
    ]
    return _pictures([[one["image"] for one in found.values()]], [titles], columns=4)


def overfit(found: Mapping[str, Any]) -> "Figure":
    """Draw the PSNR and where each rule stops."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    axes.plot(found["iterations"], found["decibels"], color="#60646c")
    best = found["best"]
    label = f"best, {best['decibels']:.2f} dB: needs the truth"
    axes.plot(best["iteration"], best["decibels"], "k*", markersize=12, label=label)
    for (name, rule), colour in zip(found["rules"].items(), _COLOURS, strict=False):
        if rule["iteration"] is not None:
            label = f"{name}, {rule['decibels']:.2f} dB"
            axes.plot(rule["iteration"], rule["decibels"], "o", color=colour, label=label)
        if rule["stopped"] is not None:
            axes.axvline(rule["stopped"], color=colour, linestyle=":", alpha=0.7)
    axes.set(xlabel="iteration", ylabel="PSNR of the averaged output, dB")
    axes.set_title("Too long a fit learns the noise; dotted: where a rule ends it")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def tv(found: Mapping[str, Any]) -> "Figure":
    """Draw what came of each damage by each method."""
    images, titles = [], []
    for name, one in found.items():
        images.append(list(one["images"].values()))
        decibels = one["decibels"]
        titles.append(
            [
                f"{NAMES.get(method, method)}, {decibels[method]:.2f} dB"
                if method in decibels
                else name
                for method in one["images"]
            ]
        )
    return _pictures(images, titles, columns=max(map(len, images)))


def write(figure: "Figure", path: Path, *, force: bool) -> None:
    """Write a figure as PNG.

    Raises:
        OutputError: It exists and `force` is False, or it cannot be written.
    """
    with atomic(path, force=force) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _figure(width: float, height: float) -> "Figure":
    # Not pyplot, which has a global state and may want a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _pictures(
    rows: Sequence[Sequence[NDArray[np.float32]]],
    titles: Sequence[Sequence[str]],
    columns: int,
) -> "Figure":
    """Lay pictures out in rows, longer ones broken after so many columns."""
    broken = [
        (list(images[start : start + columns]), list(names[start : start + columns]))
        for images, names in zip(rows, titles, strict=True)
        for start in range(0, len(images), columns)
    ]
    figure = _figure(2.4 * columns, 2.8 * len(broken))
    grid = figure.subplots(len(broken), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (images, names) in zip(grid, broken, strict=True):
        for axes, image, name in zip(line, images, names, strict=False):
            axes.imshow(np.clip(image, 0, 1), interpolation="nearest", vmin=0, vmax=1)
            axes.set_title(name, fontsize=9)
    return figure
