"""Line charts as SVG, for pages that load nothing."""

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 34


def line_chart(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float | None],
    *,
    log: bool = False,
    mark: float | None = None,
    unit: str = "",
) -> str:
    """Draw one curve over iterations.

    Args:
        title: Above it; plain text.
        xs: Ascending.
        ys: None where there is no value.
        log: Whether the vertical axis is logarithmic; values that are not positive are left out.
        mark: Where to draw a vertical line.
        unit: Of the values.

    Returns:
        An <svg> element, or nothing if there are fewer than two values.
    """
    known = [
        (x, math.log10(y) if log else y)
        for x, y in zip(xs, ys, strict=True)
        if y is not None and math.isfinite(y) and (y > 0 or not log)
    ]
    if len(known) < 2:
        return ""
    left, right = min(0.0, known[0][0]), known[-1][0]
    low, high = min(y for _, y in known), max(y for _, y in known)
    margin = 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for tick in ticks(low, high):
        _, y = place(left, tick)
        label = f"{10**tick:.3g}" if log else f"{tick:.6g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}">{label}{unit}</text>')
    for tick in ticks(left, right):
        x, _ = place(tick, low)
        parts.append(f'<text class="foot" x="{x}" y="{_HEIGHT - 14}">{tick:.6g}</text>')
    if mark is not None and left <= mark <= right:
        x, _ = place(mark, low)
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    points = " ".join("{},{}".format(*place(x, y)) for x, y in known)
    parts.append(f'<polyline class="curve" points="{points}"/></svg>')
    return "".join(parts)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round numbers in [low, high], evenly spaced."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)][:most]
