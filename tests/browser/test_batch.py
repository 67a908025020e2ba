"""The page of a batch in a real browser: it draws, its headings sort, nothing leaves the page."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashdip.engine.batch.jobs import Outcome, State
from flashdip.engine.batch.journal import Journal
from flashdip.engine.batch.pictures import thumbnail
from flashdip.engine.batch.progress import Tally
from flashdip.engine.batch.storage import Outputs
from flashdip.engine.batch.summary import write
from flashdip.engine.picture import Picture
from tests.browser.webdriver import Browser, browser, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ROWS = "return [...document.querySelectorAll('tbody tr')].map(r => r.cells[2].textContent)"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def summary(window: Browser, tmp_path: Path) -> Path:
    """Open the page of a batch, one of whose pictures has a hostile name."""
    hostile = "<img src=http://127.0.0.1:9/x onerror=alert(1)>.png"
    small = thumbnail(Picture(np.full((40, 60, 3), 0.5, np.float32)))
    outputs = Outputs(str(tmp_path))
    outputs.prepare()
    with Journal(":memory:") as journal:
        names = ["10.png", "9.png", "b.png", hostile]
        journal.add([(name, "/in", 1) for name in names])
        for name, psnr in zip(names, (9.5, 31.25, None, None), strict=True):
            state: State = "failed" if name == hostile else "done"
            record = {"psnr": psnr, "iterations": 10}
            thumbnails = None if name == hostile else (small, small)
            journal.ended(Outcome(name, state, "<script>1</script>", record, thumbnails), 1)
        write(journal, outputs, "denoise", Tally())
    window.log("performance")
    window.open(tmp_path / "index.html")
    return tmp_path / "index.html"


def press(window: Browser, heading: str) -> list[str]:
    """Press a heading; return the names in the order in which they stand then."""
    window.run(
        f"[...document.querySelectorAll('button')].find(b => b.textContent === '{heading}').click()"
    )
    names: list[str] = window.run(ROWS)
    return names


def test_it_opens_without_errors_and_asks_for_nothing(window: Browser, summary: Path) -> None:
    assert window.log("browser") == []
    asked = window.requests(summary.as_uri())
    assert [address for address in asked if not address.startswith("data:")] == [summary.as_uri()]
    script = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])"
    assert window.run(script) == [[True, 60, 40]] * 6


def test_headings_sort_up_and_down_with_the_empty_last(window: Browser, summary: Path) -> None:
    assert press(window, "PSNR, dB")[:2] == ["10.png", "9.png"]
    assert press(window, "PSNR, dB")[:2] == ["9.png", "10.png"]
    names = press(window, "picture")
    assert names.index("9.png") < names.index("10.png") < names.index("b.png")
    assert press(window, "picture") == names[::-1]
    assert press(window, "state")[-1].startswith("<img src=http")
