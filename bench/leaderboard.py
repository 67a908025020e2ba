"""The leaderboard: a page drawn from the results that people contributed."""

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from flashdip.bench import schema
from flashdip.bench.show import number
from flashdip.engine.errors import InputError
from flashdip.engine.files import one_line
from flashdip.engine.html import page

_STYLE = """
div.wide { overflow-x: auto; }
th, td { overflow-wrap: normal; }
td.number, th.number { text-align: right; }
svg.bar { width: 12rem; height: 0.8rem; }
svg.bar rect { fill: var(--first); }
"""
_COLUMNS = (
    "machine",
    "restorations an hour",
    "",
    "backend",
    "precision",
    "F",
    "it/s at 256, 512, 1024",
    "W",
    "kept for 30 s",
    "against the published loop",
    "torch",
    "flashdip",
    "commit",
    "day",
)
_TEXTS = {"machine", "backend", "precision", "torch", "flashdip", "commit", "day", ""}


def collect(directory: Path) -> dict[str, dict[str, Any]]:
    """Read the results of a folder, by file name.

    Raises:
        InputError: The folder is not there, or a file in it is no result of `flashdip bench gpu`.
    """
    if not directory.is_dir():
        raise InputError(f"{one_line(directory)}: expected a folder of results")
    found = {}
    for path in sorted(directory.glob("*.json")):
        result = schema.read(path)
        if result["kind"] != "gpu":
            raise InputError(
                f"{one_line(path)}: expected a result of 'flashdip bench gpu', got one of "
                f"'flashdip bench {result['kind']}'"
            )
        found[path.name] = result
    return found


def draw(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of results, best first."""
    ranked = sorted(results.values(), key=lambda each: -float(each["score"][_SCORE]))
    body = [
        "<h1>FlashDIP leaderboard</h1>",
        "<p>512x512 restorations an hour with the preset <code>balanced</code>, measured by "
        "<code>flashdip bench gpu</code> on the machines of those who contributed. Every result "
        "passed the gate against float64 first; nothing here is modelled.</p>",
    ]
    if ranked:
        most = ranked[0]["score"][_SCORE]
        body += ['<div class="wide"><table>', _row("th", _COLUMNS)]
        body += [_row("td", _cells(each, most)) for each in ranked]
        body.append("</table></div>")
    else:
        body.append("<p>Nobody has contributed a result yet.</p>")
    body.append(
        "<p>To add yours: <code>flashdip bench gpu -o NAME.json</code>, put the file into "
        "<code>bench/results/</code>, and open a pull request.</p>"
    )
    return page("FlashDIP leaderboard", "\n".join(body), style=_STYLE)


_SCORE = "restorations_per_hour"


def _cells(result: Mapping[str, Any], most: float) -> Iterable[str]:
    score, machine = result["score"], result["machine"]
    software = machine["software"]
    width = 100 * score[_SCORE] / most if most else 0
    rates = [score["iterations_per_second"].get(size) for size in ("256", "512", "1024")]
    best = {"fits": score["fits"], "network": score["preset"], "size": score["size"]}
    own = [row["ratio"] for row in result["results"] if best.items() <= row["parameters"].items()]
    ratio = own[0] if own else None
    yield escape(machine["hardware"]["device"])
    yield number(score[_SCORE])
    yield (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{width:.0f} % of the best"><rect width="{width:.2f}" height="8"/></svg>'
    )
    yield escape(score["backend"])
    yield escape(score["precision"])
    yield str(score["fits"])
    yield ", ".join("-" if rate is None else number(rate, 3) for rate in rates)
    yield "-" if score["watts"] is None else f"{score['watts']:.0f}"
    yield f"{score['sustained']['kept']:.0%}"
    yield "-" if ratio is None else f"{ratio:.1f}x"
    for name in ("torch", "flashdip", "commit"):
        yield escape(str(software.get(name) or "-"))
    yield escape(result["created"][:10])


def _row(tag: str, cells: Iterable[str]) -> str:
    row = "".join(
        f"<{tag}>{cell}</{tag}>" if title in _TEXTS else f'<{tag} class="number">{cell}</{tag}>'
        for title, cell in zip(_COLUMNS, cells, strict=True)
    )
    return f"<tr>{row}</tr>"
