"""The report in a real browser: it draws, its slider and zoom work, nothing leaves the page."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flashdip.engine.html import page
from tests.browser.webdriver import Browser, browser, missing
from tests.results import result

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def report(window: Browser, tmp_path: Path) -> Path:
    """Open the report of a picture with a hostile name."""
    path = tmp_path / "report.html"
    name = "<img src=http://127.0.0.1:9/x onerror=alert(1)>.png"
    result(factor=2, notes=["<script>document.title = 'taken'</script>"]).report(path, name=name)
    window.log("performance")
    window.open(path)
    return path


def shares(window: Browser) -> tuple[float, float, float]:
    """Return where divider, clipping and slider stand, in percent of the picture's width."""
    divider, stage = window.box("divider"), window.box("stage")
    middle = divider["x"] + divider["width"] / 2
    clip = window.run("return document.getElementById('before').style.clipPath")
    hidden = float(clip.split()[1].rstrip("%"))
    value = window.run("return document.getElementById('split').value")
    return 100 * (middle - stage["x"]) / stage["width"], 100 - hidden, float(value)


def test_it_opens_without_errors_and_asks_for_nothing(window: Browser, report: Path) -> None:
    assert window.log("browser") == []
    asked = window.requests(report.as_uri())
    assert [address for address in asked if not address.startswith("data:")] == [report.as_uri()]
    assert window.run("return document.title").startswith("<img src=http")
    script = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])"
    assert window.run(script)[:2] == [[True, 128, 96], [True, 64, 48]]
    assert len(window.run("return [...document.querySelectorAll('polyline')]")) == 3


def test_the_slider_moves(window: Browser, report: Path) -> None:
    """By the mouse on the picture and by the keyboard; divider and clipping follow together."""
    assert shares(window) == pytest.approx((50, 50, 50), abs=0.2)
    stage = window.box("stage")
    down = stage["y"] + 40
    window.drag(
        (stage["x"] + 0.5 * stage["width"], down), (stage["x"] + 0.2 * stage["width"], down)
    )
    dragged = shares(window)
    assert dragged == pytest.approx((20, 20, 20), abs=0.5)
    window.type("split", "\ue014" * 3)  # arrow right
    after = shares(window)
    assert after[2] > dragged[2]
    assert after == pytest.approx((after[2],) * 3, abs=0.2)
    window.type("split", "\ue010")  # end
    assert shares(window) == pytest.approx((100, 100, 100), abs=0.2)


def test_both_pictures_lie_on_each_other_at_every_zoom(window: Browser, report: Path) -> None:
    choose = (
        "const zoom = document.getElementById('zoom'); zoom.value = arguments[0];"
        "zoom.dispatchEvent(new Event('change'))"
    )
    for value, width in (("1", 128), ("4", 512), ("8", 1024)):
        window.run(choose, value)
        stage, before = window.box("stage"), window.box("before")
        assert (stage["width"], stage["height"]) == pytest.approx((width, width * 0.75), abs=1)
        assert before == pytest.approx(stage, abs=1)
    rendering = "return getComputedStyle(document.getElementById('before')).imageRendering"
    assert window.run(rendering) == "pixelated"
    window.run(choose, "1")
    assert window.run(rendering) == "auto"
    window.run(choose, "fit")
    stage, around = window.box("stage"), window.box("viewport")
    assert stage["width"] > 500
    assert max(stage["width"] - around["width"], stage["height"] - around["height"]) < 0
    assert window.log("browser") == []


def test_the_screenshot_shows_both_sides(window: Browser, report: Path, tmp_path: Path) -> None:
    """Noise to the left of the divider, none to the right."""
    import numpy as np
    from PIL import Image

    window.screenshot(tmp_path / "shot.png")
    stage = window.box("stage")
    with Image.open(tmp_path / "shot.png") as shot:
        grey = np.asarray(shot.convert("L"), dtype=float)
    scale = grey.shape[1] / window.run("return window.innerWidth")
    rows = slice(int((stage["y"] + 20) * scale), int((stage["y"] + 300) * scale))
    edges = [int((stage["x"] + share * stage["width"]) * scale) for share in (0.1, 0.4, 0.6, 0.9)]
    lag = round(stage["width"] / 64 * scale)  # the width of an observed pixel

    def roughness(left: int, right: int) -> float:
        part = grey[rows, left:right]
        bent = part[:, 2 * lag :] - 2 * part[:, lag:-lag] + part[:, : -2 * lag]
        return float(np.abs(bent).mean())

    assert roughness(*edges[:2]) > 5 * roughness(*edges[2:])


def test_the_policy_lets_nothing_slip_in(window: Browser, tmp_path: Path) -> None:
    """Markup that was not escaped neither runs nor loads; the page's own script does."""
    path = tmp_path / "page.html"
    hostile = (
        "<script>document.title = 'taken'</script>"
        "<img src='http://127.0.0.1:9/x.png' onerror=\"document.title = 'taken'\">"
        "<link rel=stylesheet href='http://127.0.0.1:9/x.css'>"
    )
    path.write_text(page("plain", hostile, "document.body.dataset.ran = 'yes';"))
    window.open(path)
    assert window.run("return [document.title, document.body.dataset.ran]") == ["plain", "yes"]
    refused = [entry["message"] for entry in window.log("browser")]
    assert len(refused) >= 3
    assert all("Content Security Policy" in message for message in refused)
