"""The report of a restoration: one HTML page, to be opened from the disk, without a network.

Before and after under a slider, what was taken away and whether it looks like noise, the curves of
the fit, its config and its times. Names and metadata come from outside: all text is escaped.
"""

import base64
import io
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashdip.engine.chart import line_chart
from flashdip.engine.html import page
from flashdip.engine.whiteness import CONFIDENCE, REACH, Whiteness, whiteness

if TYPE_CHECKING:
    from torch import Tensor

    from flashdip.engine.result import Result

MOST_PIXELS = 16_000_000  # of a picture in the page; larger ones are reduced
_ZOOMS = ("fit", "1", "2", "4", "8")


def render(result: "Result", name: str) -> str:
    """Return the page of a result.

    Args:
        result: Of `fit`, of a task, or loaded.
        name: What was restored, such as the name of its file.
    """
    parts = [f"<h1>{escape(name)}</h1>", _summary(result.record), _compare(result)]
    parts += [_residual(result), _curves(result.record), _tables(result.record)]
    files = resources.files("flashdip.engine")
    script, style = (files.joinpath(f"report.{kind}").read_text("utf-8") for kind in ("js", "css"))
    return page(f"{name}: FlashDIP", "\n".join(parts), script, style)


def _summary(record: Mapping[str, Any]) -> str:
    quality = "" if record["psnr"] is None else f"{record['psnr']:.2f} dB against the truth. "
    notes = "".join(f"<p>{escape(str(note))}</p>" for note in record["notes"])
    image = f"Image of iteration {record['best_iteration']} of {record['iterations']}"
    if "runs" in record:
        image = f"Mean of {len(record['runs'])} runs, of {record['iterations']} iterations in all"
    return (
        f"<p>{quality}{image}, ended by {escape(str(record['stop_reason']))}, after "
        f"{record['seconds_fit']:.1f} s.</p>{notes}"
    )


def _compare(result: "Result") -> str:
    """Return both pictures on each other; the restored one alone where there is no other."""
    observation = result.measurement.get("observation")
    after = picture(result.image)
    if observation is None or not _is_image(observation, result.image.shape[0]):
        return f"<h2>Restored</h2>{_img(after, 'restored', 'residual')}"
    before = picture(observation)
    options = "".join(
        f'<option value="{z}">{z if z == "fit" else z + "x"}</option>' for z in _ZOOMS
    )
    sizes = [f"{tensor.shape[-1]}x{tensor.shape[-2]}" for tensor in (observation, result.image)]
    return (
        "<h2>Before and after</h2>"
        '<div class="tools"><label>before<input id="split" type="range" min="0" max="100" '
        'step="any" value="50">after</label>'
        f'<label>zoom<select id="zoom">{options}</select></label></div>'
        f'<div id="viewport"><div id="stage" data-width="{after.shape[1]}" '
        f'data-height="{after.shape[0]}">'
        f"{_img(after, 'restored', '')}{_img(before, 'measured', '', 'before')}"
        '<div id="divider"></div></div></div>'
        f"<p>Measured ({sizes[0]} pixels) to the left of the line, restored ({sizes[1]}) to the "
        f"right.{_shown(result.image, after)}</p>"
    )


def _residual(result: "Result") -> str:
    residual = result.measurement.get("residual")
    if residual is None or residual.ndim != 3:
        return ""
    mask = result.measurement.get("measured")
    values = residual.numpy().astype(np.float64)
    measured = np.ones(values.shape, bool) if mask is None else mask.numpy()
    found = whiteness(values, measured)
    if found is None:
        return "<h2>Residual</h2><p>There is none: the fit draws what was measured.</p>"
    scale = 6 * found.deviation
    drawn = np.where(measured, values / scale + 0.5, 0.5).astype(np.float32)
    shown = _pixels(drawn)
    return (
        '<h2>Residual: what was taken away</h2><div class="row">'
        f"<figure>{_img(shown, 'residual', 'residual')}<figcaption>Measured less drawn; grey is "
        "zero, black and white are three standard deviations. Where nothing was measured it is "
        f"grey.{_shown(residual, shown)}</figcaption></figure>"
        f"<figure>{_img(_lags(found), 'correlation', 'lags')}<figcaption>Its correlation with "
        f"itself, up to {REACH} pixels away. White noise is grey all over; red is positive, blue "
        f"negative.</figcaption></figure></div>{_verdict(found, result.record)}"
    )


def _verdict(found: Whiteness, record: Mapping[str, Any]) -> str:
    sigma = record["sigma"]
    noise = "" if sigma is None else f" (the noise has {sigma * 255:.2f})"
    return (
        f"<p>Standard deviation {found.deviation * 255:.2f} of 255{noise}. The clearest "
        f"correlation is {found.largest:+.4f}, between pixels {found.lag[0]} down and "
        f"{found.lag[1]} across; white noise of as many pixels stays below {found.bound:.4f} in "
        f"{CONFIDENCE:.0%} of cases. "
        f"<strong>It is {found.verdict}.</strong></p>"
    )


def _curves(record: Mapping[str, Any]) -> str:
    history, best = record["history"], record["best_iteration"]
    charts = (
        line_chart(title, history["iteration"], history[key], log=log, mark=best, unit=unit)
        for title, key, log, unit in (
            ("Loss: mean squared residual of the last output", "loss", True, ""),
            ("Variance of outputs that the stopping rule watches", "variance", True, ""),
            ("PSNR of the averaged output against the truth", "psnr", False, " dB"),
        )
    )
    drawn = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    if not drawn:
        return ""
    return (
        f'<h2>Curves</h2><div class="row">{drawn}</div>'
        f"<p>Over iterations; the dashed line is iteration {best}, whose image this is.</p>"
    )


def _tables(record: Mapping[str, Any]) -> str:
    peak = record["peak_memory_bytes"] / 2**20
    run = {
        "set-up": f"{record['seconds_setup']:.2f} s",
        "fit": f"{record['seconds_fit']:.2f} s",
        "rate": f"{record['iterations_per_second']:.2f} it/s",
        "peak memory": f"{peak:.0f} MiB",
        "retries": record["retries"],
        "backend": record["backend"],
        "device": record["device"],
        "precision": record["precision"],
    } | record["versions"]
    config = dict(record["config"])
    network = {f"network.{key}": value for key, value in config.pop("network").items()}
    return (
        f'<div class="row"><section><h2>Run</h2>{_table(run)}</section>'
        f"<section><h2>Config</h2>{_table(config | network)}</section></div>"
    )


def _table(rows: Mapping[str, Any]) -> str:
    cells = (
        f"<tr><th>{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def picture(image: "Tensor") -> NDArray[np.uint8]:
    """Return an image [C, H, W] in [0, 1] as 8 bits, [H, W] or [H, W, 3].

    Of two channels, or more than three, the first or the first three are shown. Pictures of more
    than `MOST_PIXELS` are reduced.
    """
    return _pixels(image.numpy())


def _pixels(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    from PIL import Image

    channels, height, width = image.shape
    values = np.moveaxis(image[: 3 if channels >= 3 else 1], 0, 2)
    bits: NDArray[np.uint8] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    bits = bits if channels >= 3 else bits[:, :, 0]
    if height * width > MOST_PIXELS:
        share = (MOST_PIXELS / (height * width)) ** 0.5
        size = max(1, int(width * share)), max(1, int(height * share))
        bits = np.asarray(Image.fromarray(bits).resize(size, Image.Resampling.BOX))
    return bits


def _shown(image: "Tensor", pixels: NDArray[np.uint8]) -> str:
    """Say what of an image [C, H, W] is not shown."""
    channels, height, width = image.shape
    notes = ""
    if channels not in (1, 3):
        notes += f" Shown: {'channels 1 to 3' if channels > 3 else 'channel 1'} of {channels}."
    if pixels.shape[:2] != (height, width):
        notes += f" Reduced to {pixels.shape[1]}x{pixels.shape[0]} pixels for this page."
    return notes


def _lags(found: Whiteness) -> NDArray[np.uint8]:
    """Paint correlations: red above, blue below zero, full at the largest or thrice the bound."""
    values = np.nan_to_num(found.correlation)
    values[REACH, REACH] = 0
    scaled = np.clip(values / max(abs(found.largest), 3 * found.bound), -1, 1)
    grey, ends = np.array([128.0] * 3), np.array([[40.0, 90.0, 220.0], [220.0, 50.0, 40.0]])
    target = ends[(scaled > 0).astype(int)]
    painted = grey + np.abs(scaled)[:, :, None] * (target - grey)
    bits: NDArray[np.uint8] = np.rint(painted).astype(np.uint8)
    return bits


def _img(pixels: NDArray[np.uint8], alt: str, kind: str, identity: str = "") -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode()
    names = "".join(
        f' {key}="{value}"' for key, value in (("class", kind), ("id", identity)) if value
    )
    return f'<img{names} alt="{alt}" src="data:image/png;base64,{source}">'


def _is_image(observation: "Tensor", channels: int) -> bool:
    return observation.ndim == 3 and observation.shape[0] == channels
