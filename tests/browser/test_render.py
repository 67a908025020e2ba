"""An exported model in a real browser: ONNX Runtime for the web draws what the engine draws."""

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from flashdip.engine.metrics import psnr
from flashdip.engine.onnx.export import CLOSE, export
from flashdip.engine.onnx.providers import open_session
from tests.browser.webdriver import Browser, browser, missing
from tests.engine.onnx.fitted import fitted

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / ".cache" / "browser" / "node_modules" / "onnxruntime-web" / "dist"
ABSENT = missing() or (
    None if RUNTIME.is_dir() else "onnxruntime-web not found: make test-browser fetches it by npm"
)
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))


class Quiet(SimpleHTTPRequestHandler):
    """Serve a folder without a word."""

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder to this machine alone; yield its address: pages from a disk load no module."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.mark.parametrize("fp16", [False, True])
def test_the_same_picture(window: Browser, tmp_path: Path, fp16: bool) -> None:
    """On WebAssembly, z left out; nothing is asked for but the page's own files."""
    result = fitted()
    made = export(result, fp16=fp16)
    (tmp_path / "model.onnx").write_bytes(made.model)
    (tmp_path / "render.html").symlink_to(Path(__file__).with_name("render.html"))
    (tmp_path / "ort").symlink_to(RUNTIME)
    window.log("performance")
    with served(tmp_path) as address:
        window.visit(f"{address}/render.html")
        while window.run("return document.title") != "ready":
            assert window.log("browser") == []
            time.sleep(0.1)
        drawn = window.run("return draw('model.onnx')")
        asked = window.requests(f"{address}/render.html")
    assert all(each.startswith(address) for each in asked)
    assert window.log("browser") == []
    image = torch.tensor(drawn["data"]).reshape(drawn["dims"])[0]
    assert image.shape == result.image.shape
    (here,) = open_session(made.model, ["cpu"]).run(["image"], {})
    assert float((image - torch.from_numpy(here)[0]).abs().max()) <= (2e-3 if fp16 else CLOSE)
    assert psnr(image, result.image) == pytest.approx(made.quality, abs=0.1)
    box = window.box("picture")
    assert (box["width"], box["height"]) == (31, 24)
