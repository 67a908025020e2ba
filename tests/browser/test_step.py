"""The page of docs/step.md in a real browser: it fits a picture as the backend does."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.browser.test_render import ABSENT, ROOT, RUNTIME, served
from tests.browser.webdriver import Browser, browser
from tests.engine.onnx.stepping import export_step, fitted, write_pictures

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
EXAMPLE = ROOT / "docs" / "step" / "fit.mjs"
ITERATIONS = 12


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


def documented() -> str:
    """The page in the documentation, with fewer iterations."""
    text = (ROOT / "docs" / "step.md").read_text()
    found = re.search(r"```html\n(.*?)```", text, re.DOTALL)
    assert found is not None
    page = found[1]
    assert page.count(", 500, ") == 1
    return '<link rel="icon" href="data:,">' + page.replace(", 500, ", f", {ITERATIONS}, ")


def test_the_documented_page_fits_the_picture(
    window: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On WebAssembly: the pixels on the canvas are those of the backend."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    export_step("noisy.png", "-o", "step.onnx", "--preset", "quick")
    (tmp_path / "index.html").write_text(documented())
    (tmp_path / "fit.mjs").symlink_to(EXAMPLE)
    (tmp_path / "node_modules").symlink_to(RUNTIME.parents[1])
    size = "return [document.getElementById('picture').width, picture.height]"
    with served(tmp_path) as address:
        window.visit(f"{address}/index.html")
        until = time.monotonic() + 100
        while window.run(size) != [18, 21]:
            faults = [entry for entry in window.log("browser") if entry["level"] == "SEVERE"]
            assert not faults and time.monotonic() < until, faults
            time.sleep(0.1)
        drawn = window.run(
            "return Array.from(document.getElementById('picture').getContext('2d')"
            ".getImageData(0, 0, 18, 21).data)"
        )
    found = np.array(drawn).reshape(21, 18, 4)[..., :3] / 255
    expected = fitted("denoise", ITERATIONS, preset="quick").picture.pixels
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01 / 255)
    assert len(EXAMPLE.read_text().splitlines()) <= 60
