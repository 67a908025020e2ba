"""What a batch leaves at its end: summary.json, summary.csv, and a page with thumbnails.

Names and reasons come from outside: in the page they are escaped, in the table no cell can become a
formula.
"""

import base64
import csv
import io
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib import metadata, resources
from itertools import islice
from typing import Any
from urllib.parse import quote

from flashdip.engine.batch.journal import Journal
from flashdip.engine.batch.pictures import COLUMNS
from flashdip.engine.batch.progress import Tally
from flashdip.engine.batch.storage import Outputs
from flashdip.engine.files import one_line
from flashdip.engine.html import page

FILES = ("summary.json", "summary.csv", "index.html")
MOST_ROWS = 20_000  # of the page
_OWN = ("name", "source", "state", "attempts", "reason")
_SIZE = ("width", "height", "channels")
_FORMULA = ("=", "+", "-", "@")


def write(journal: Journal, outputs: Outputs, task: str, tally: Tally) -> dict[str, Any]:
    """Publish the three files, and return what summary.json holds.

    Raises:
        OutputError: They cannot be written.
    """
    jobs = [{name: row[name] for name in _OWN} | row["record"] for row in journal.rows()]
    counts = {"done": 0, "kept": 0, "failed": 0, "waiting": 0} | journal.counts()
    summary = {
        "flashdip": metadata.version("flashdip"),
        "task": task,
        "complete": counts["waiting"] == 0,
        "counts": counts | {"diverged": tally.diverged},
        "seconds": tally.seconds,
        "images_per_hour": tally.per_hour,
        "jobs": jobs,
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    outputs.publish("summary.json", text.encode())
    outputs.publish("summary.csv", table(jobs).encode())
    outputs.publish("index.html", _page(journal, summary).encode())
    return summary


def table(jobs: Sequence[dict[str, Any]]) -> str:
    """Return the jobs as CSV, one a line under a head line.

    Text that a spreadsheet would take for a formula gets an apostrophe before it (OWASP, "CSV
    injection").
    """
    columns = (*_OWN, *_SIZE, *COLUMNS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(job.get(column)) for column in columns] for job in jobs)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    if isinstance(value, str):
        line = one_line(value, limit=1000)
        return f"'{line}" if line.startswith(_FORMULA) else line
    return "" if value is None else value


def _page(journal: Journal, summary: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items() if count)
    head = ("before", "after", "picture", "state", "PSNR, dB", "iterations", "seconds", "ended by")
    cells = "".join(f'<th scope="col"><button type="button">{each}</button></th>' for each in head)
    total = len(summary["jobs"])
    rows = islice(_rows(journal), MOST_ROWS)
    cut = "" if total <= MOST_ROWS else f" Shown: the first {MOST_ROWS:,}, failures before others."
    body = (
        f"<h1>{escape(summary['task'])}: {total:,} pictures</h1>"
        f"<p>{escape(counts)}; {summary['images_per_hour']:.0f} an hour.{cut} A heading sorts.</p>"
        f'<table id="jobs"><thead><tr>{cells}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table>"
    )
    files = resources.files("flashdip.engine.batch")
    script, style = (files.joinpath(f"summary.{kind}").read_text("utf-8") for kind in ("js", "css"))
    return page(f"{summary['task']}: FlashDIP", body, script, style)


def _rows(journal: Journal) -> Iterator[str]:
    """Yield a row of the page for each job; the second value of a cell is what it sorts by."""
    for row in journal.rows(failed_first=True):
        record = row["record"]
        name, state = escape(row["name"]), escape(row["state"])
        published = row["state"] in ("done", "kept")
        link = f'<a href="{escape(quote(row["name"]))}">{name}</a>' if published else name
        seconds = None
        if published:
            seconds = (record.get("seconds_setup") or 0) + (record.get("seconds_fit") or 0)
        psnr, iterations = record.get("psnr"), record.get("iterations")
        cells = (
            (_image(row["before"], "before"), ""),
            (_image(row["after"], "after"), ""),
            (link, name),
            (f'<span class="{state}">{state}</span>', state),
            ("" if psnr is None else f"{psnr:.2f}", psnr),
            ("" if iterations is None else str(iterations), iterations),
            ("" if seconds is None else f"{seconds:.1f}", seconds),
            (escape(row["reason"] or record.get("stop_reason") or ""), None),
        )
        yield "<tr>{}</tr>".format(
            "".join(
                f"<td>{text}</td>" if key in ("", None) else f'<td data-key="{key}">{text}</td>'
                for text, key in cells
            )
        )


def _image(data: bytes | None, alt: str) -> str:
    if data is None:
        return ""
    source = base64.b64encode(data).decode()
    return f'<img alt="{alt}" src="data:image/webp;base64,{source}">'
