"""A profile as one page of HTML that loads nothing."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from flashdip.bench.advice import advice
from flashdip.bench.show import number
from flashdip.engine.html import page

_STYLE = """
div.wide { overflow-x: auto; }
td.number, th.number { text-align: right; white-space: nowrap; }
svg.bar { width: 10rem; height: 0.8rem; }
svg.bar .took { fill: var(--line); }
svg.bar .roof { fill: var(--first); }
svg.line { width: 100%; max-width: 48rem; height: 12rem; }
svg.line polyline { fill: none; stroke: var(--first); vector-effect: non-scaling-stroke; }
"""
_TITLES = ("layer", "pass", "ms", "share", "", "GFLOP", "MB", "roof ms", "of the roof")


def draw(record: Mapping[str, Any]) -> str:
    """Return the page of a profile; see `profiling.Profile`. Its last lines say what to fix."""
    setting, step, gaps = record["setting"], record["step"], record["gaps"]
    hardware, software = record["machine"]["hardware"], record["machine"]["software"]
    height, width = setting["size"]
    waits, allocator = record["waits"], record["allocator"]
    product = record["ceilings"]["product"][setting["precision"]]
    facts = {
        "fit": f"{width}x{height} pixels, backend {setting['backend']} on {setting['device']}, "
        f"{setting['precision']}; {setting['iterations']} iterations under the profiler",
        "machine": f"{hardware['device']}, {hardware['cores']} cores; torch {software['torch']}, "
        f"{software['threads']} threads; commit {software['commit']}",
        "ceilings, measured": f"copy {number(record['ceilings']['copy'] / 1e9, 3)} GB/s, matrix "
        f"product {number(product / 1e12, 3)} TFLOP/s",
        "an iteration": f"{number(step['ms'])} ms without the profiler, "
        f"{number(step['profiled_ms'])} ms under it",
        "gaps": f"{number(gaps['ms'], 3)} ms ({gaps['share']:.1%}), "
        + ("outside of operations" if gaps["launches"] is None else
           f"between {gaps['launches']:.0f} kernels"),
        "the host waited": f"{_times(waits['in_iterations'])} within iterations, where it must "
        f"not; {_times(waits['in_readings'])} at readings of the statistics",
        "allocator": f"{allocator['allocations']:.0f} allocations an iteration, "
        f"{number(allocator['bytes'] / 1e6)} MB; at most {number(allocator['peak_bytes'] / 1e6)} "
        "MB above the start",
    }  # fmt: skip
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items()
    )
    body = [
        "<h1>Profile of a fit</h1>",
        f"<table>{rows}</table>",
        "<h2>Layers and passes</h2>",
        "<p>Milliseconds of an iteration. Roof: the least that counted operations and bytes take "
        "at the measured ceilings; in the bar the coloured part.</p>",
        _table(record["parts"]),
        "<h2>Memory over time</h2>",
        _timeline(record["memory"]),
        "<h2>What should I fix first?</h2>",
        *(f"<p>{escape(line)}</p>" for line in advice(record)),
    ]
    return page("Profile of a fit", "\n".join(body), style=_STYLE)


def cells(part: Mapping[str, Any]) -> list[str]:
    """Return a part's row as plain text, in the order of the page's columns, without the bar."""
    known = part["roof_ms"] is not None
    return [
        part["name"],
        part["pass"],
        number(part["ms"]),
        f"{part['share']:.1%}",
        number(part["flops"] / 1e9, 3) if known else "",
        number(part["bytes"] / 1e6, 3) if known else "",
        number(part["roof_ms"], 3) if known else "",
        f"{part['roof_share']:.1%}" if part["roof_share"] is not None else "",
    ]


def _times(found: Mapping[str, int]) -> str:
    total = sum(found.values())
    named = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"{total} times ({named})" if found else "0 times"


def _table(parts: Sequence[Mapping[str, Any]]) -> str:
    longest = max((part["ms"] for part in parts), default=0.0) or 1.0
    lines = ['<div class="wide"><table>', _row("th", _TITLES)]
    for part in parts:
        took = 100 * part["ms"] / longest
        least = min(took, 100 * (part["roof_ms"] or 0.0) / longest)
        bar = (
            '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none">'
            f'<rect class="took" width="{took:.2f}" height="8"/>'
            f'<rect class="roof" width="{least:.2f}" height="8"/></svg>'
        )
        texts = [escape(text) for text in cells(part)]
        lines.append(_row("td", [*texts[:4], bar, *texts[4:]]))
    return "\n".join([*lines, "</table></div>"])


def _row(tag: str, texts: Iterable[str]) -> str:
    row = "".join(
        f"<{tag}>{text}</{tag}>" if title in ("layer", "pass", "") else
        f'<{tag} class="number">{text}</{tag}>'
        for title, text in zip(_TITLES, texts, strict=True)
    )  # fmt: skip
    return f"<tr>{row}</tr>"


def _timeline(points: Sequence[Sequence[float]]) -> str:
    """Draw the bytes held over milliseconds, as steps."""
    if len(points) < 2:
        return "<p>Nothing was allocated.</p>"
    (left, _), (right, _) = points[0], points[-1]
    low = min(0.0, *(held for _, held in points))
    high = max(1.0, *(held for _, held in points))
    breadth = max(right - left, 1e-9)
    placed = [
        (1000 * (at - left) / breadth, 200 - 200 * (held - low) / (high - low))
        for at, held in points
    ]
    corners = [f"{x:.1f},{y:.1f}" for x, y in placed[:1]]
    for (_, before), (x, y) in pairwise(placed):
        corners += [f"{x:.1f},{before:.1f}", f"{x:.1f},{y:.1f}"]
    return (
        f'<figure><svg class="line" viewBox="0 0 1000 200" preserveAspectRatio="none">'
        f'<polyline points="{" ".join(corners)}"/></svg><figcaption>From {number(low / 1e6)} to '
        f"{number(high / 1e6)} MB beyond what was held at the start, over {number(breadth)} ms."
        "</figcaption></figure>"
    )
