"""The pages of a profile and of the leaderboard in a real browser, in wide and narrow windows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashdip.bench import leaderboard, profile_page, profiling
from flashdip.bench.ceilings import Ceilings
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem
from tests.bench.results import score
from tests.browser.webdriver import Browser, browser, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SIZES = ((1200, 1000), (500, 900))
HOSTILE = "<img src=http://127.0.0.1:9/x onerror=alert(1)>"
# Whether the page itself need not be moved sideways: tables move within it.
FITS = "return document.documentElement.scrollWidth <= window.innerWidth"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def profile() -> str:
    """Draw the page of a small fit."""
    network = SkipConfig(inputs=4, down=(8, 8))
    config = FitConfig(network=network, read_every=2, precision="fp32", stop=("fixed",))
    problem = Problem(torch.rand(1, 3, 32, 32), (3, 32, 32), sigma=0.1)
    limits = Ceilings(1e10, {"fp32": 1e11})
    options = {"backend": "native", "device": "cpu", "iterations": 2, "limits": limits}
    return profile_page.draw(profiling.profile_fit(problem, config, **options).record)  # type: ignore[arg-type]


def opened(window: Browser, page: str, path: Path, size: tuple[int, int]) -> str:
    """Show a page; return its text once it is clear that it asked for nothing and has no errors."""
    path.write_text(page, encoding="utf-8")
    window.log("performance")
    window.log("browser")
    window.resize(*size)
    window.open(path)
    assert window.log("browser") == []
    assert window.requests(path.as_uri()) == [path.as_uri()]
    assert window.run(FITS)
    return str(window.run("return document.body.innerText"))


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
def test_a_profile_opens(
    size: tuple[int, int], window: Browser, profile: str, tmp_path: Path
) -> None:
    text = opened(window, profile, tmp_path / "report.html", size)
    assert "32x32 pixels, backend native on cpu, fp32" in text
    last = text.split("What should I fix first?")[1].strip().splitlines()
    assert last[0].startswith("1. ") and "ms" in last[0]
    for shape in ("svg.bar", "svg.line"):
        script = f"return document.querySelector('{shape}').getBoundingClientRect().toJSON()"
        drawn = window.run(script)
        assert drawn["width"] > 50 and drawn["height"] > 5
    window.screenshot(tmp_path / "shot.png")


@pytest.mark.parametrize("size", SIZES, ids=["wide", "narrow"])
def test_the_leaderboard_opens(size: tuple[int, int], window: Browser, tmp_path: Path) -> None:
    results = {"a.json": score(12345.6, HOSTILE), "b.json": score(100.0, "a slow one")}
    text = opened(window, leaderboard.draw(results), tmp_path / "leaderboard.html", size)
    assert text.index(HOSTILE) < text.index("a slow one")
    for figure in ("12350", "3000, 900, -", "600", "99%", "5.0x"):
        assert figure in text
    bars = "[...document.querySelectorAll('svg.bar rect')]"
    best, slow = window.run(f"return {bars}.map(bar => bar.getBoundingClientRect().width)")
    assert slow == pytest.approx(best * 100 / 12345.6, abs=0.5)
    window.screenshot(tmp_path / "shot.png")
