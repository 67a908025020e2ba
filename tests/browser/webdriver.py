"""A headless Chromium, driven through the WebDriver protocol with the standard library alone."""

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,1000",
)
_ELEMENT = (
    "element-6066-11e4-a52e-4f735466cecf"  # what the protocol calls a reference to an element
)
_SECONDS = 120.0  # for an answer


def missing() -> str | None:
    """Return what is missing to drive a browser, or None."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not found: install Debian's chromium and chromium-driver"


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, path: Path) -> None:
        """Load a page from the disk."""
        self.visit(path.as_uri())

    def visit(self, address: str) -> None:
        """Load the page at an address."""
        self._post("url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script's body returns; what it promises is waited for."""
        return self._post("execute/sync", {"script": script, "args": list(arguments)})

    def box(self, identity: str) -> dict[str, float]:
        """Return x, y, width and height of an element in the window."""
        script = "return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()"
        found: dict[str, float] = self.run(script, identity)
        return found

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one point of the window and release it at another."""

        def move(point: tuple[float, float]) -> dict[str, Any]:
            return {"type": "pointerMove", "duration": 50, "x": int(point[0]), "y": int(point[1])}

        actions = [move(start), {"type": "pointerDown", "button": 0}, move(end)]
        actions.append({"type": "pointerUp", "button": 0})
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self._post("actions", {"actions": [pointer | {"actions": actions}]})

    def type(self, identity: str, keys: str) -> None:
        """Send keys to an element."""
        found = self._post("element", {"using": "css selector", "value": f"#{identity}"})
        self._post(f"element/{found[_ELEMENT]}/value", {"text": keys})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Return, and forget, the entries of a log: "browser" (the console) or "performance"."""
        entries: list[dict[str, Any]] = self._post("se/log", {"type": kind})
        return entries

    def requests(self, page: str) -> list[str]:
        """Return what the page at an address asked for since the last call, itself included."""
        messages = (json.loads(entry["message"])["message"] for entry in self.log("performance"))
        sent = (m["params"] for m in messages if m["method"] == "Network.requestWillBeSent")
        # The browser's own pages ask for things too.
        return [str(s["request"]["url"]) for s in sent if s["documentURL"] == page]

    def resize(self, width: int, height: int) -> None:
        """Make the window as large, in pixels."""
        self._post("window/rect", {"width": width, "height": height})

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(_call("GET", f"{self._session}/screenshot")))

    def _post(self, command: str, values: dict[str, Any]) -> Any:
        return _call("POST", f"{self._session}/{command}", values)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile; end it, and its driver, afterwards.

    Args:
        profile: A folder that does not exist yet.
    """
    command = [str(shutil.which("chromedriver")), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            line = next(line for line in driver.stdout if "successfully on port" in line)
            address = f"http://127.0.0.1:{int(line.split()[-1].rstrip('.'))}/session"
            options = {
                "binary": shutil.which("chromium"),
                "args": [*SWITCHES, f"--user-data-dir={profile}"],
            }
            logs = {"browser": "ALL", "performance": "ALL"}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
            session = _call("POST", address, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            try:
                yield Browser(f"{address}/{session}")
            finally:
                _call("DELETE", f"{address}/{session}")
        finally:
            driver.terminate()


def _call(method: str, address: str, values: dict[str, Any] | None = None) -> Any:
    body = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(address, body, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_SECONDS) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(f"{method} {address}: {error.read().decode()[:500]}") from None
