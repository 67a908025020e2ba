"""What the page of a result says, and that nothing from outside can become markup."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashdip.engine import report
from flashdip.engine.chart import line_chart, ticks
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import OutputError
from flashdip.engine.fit import fit
from flashdip.engine.html import page
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Linear, Mask
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from tests.results import result

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


class Tags(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(text: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_names_and_metadata_are_escaped(tmp_path: Path) -> None:
    outside: dict[str, Any] = {
        "notes": [HOSTILE],
        "stop_reason": HOSTILE,
        "device": HOSTILE,
        "backend": HOSTILE,
    }
    versions = {HOSTILE: HOSTILE}
    config = FitConfig().record() | {HOSTILE: HOSTILE}
    hostile = result(**outside, versions=versions, config=config)
    hostile.report(tmp_path / "r.html", name="line\nbreak \x1b[31m" + HOSTILE)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    harmless = result(notes=["a"], versions={"a": "a"}, config=FitConfig().record() | {"b": 1})
    found, expected = Tags(text), Tags(report.render(harmless, "a"))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags]
    assert found.text.count(HOSTILE) == 10
    assert "\x1b" not in text
    assert "<h1>line break ?[31m" in text


def test_nothing_in_it_points_outside() -> None:
    """Every address is data, there is no inline handler or style, and the policy is strict."""
    text = report.render(result(), "a")
    tags = Tags(text).tags
    for tag, attributes in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "audio", "video")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("style", "href", "srcset", "action")
            if name == "src":
                assert str(value).startswith("data:image/png;base64,")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|WebSocket|import\(", text)
    (policy,) = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules.pop("default-src") == "'none'"
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(kind) == f"'sha256-{digest}'"
    assert rules == {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_a_page_without_script_allows_none() -> None:
    text = page(HOSTILE, "<p>body</p>")
    assert "script-src" not in text
    assert [tag for tag, _ in Tags(text).tags].count("script") == 0
    assert Tags(text).text.count(HOSTILE) == 1


def test_it_holds_the_pictures_themselves() -> None:
    made = result(channels=1, factor=2)
    after, before, residual, lags = pictures(report.render(made, "a"))
    bits = (made.image[0].numpy() * 255).round()
    np.testing.assert_array_equal(after, bits)
    observed = (made.measurement["observation"][0].clamp(0, 1).numpy() * 255).round()
    np.testing.assert_array_equal(before, observed)
    noise = made.measurement["residual"][0].numpy()
    assert np.corrcoef(residual.ravel(), noise.ravel())[0, 1] > 0.98
    assert lags.shape == (17, 17, 3)
    np.testing.assert_array_equal(lags[8, 8], 128)  # the centre says nothing


def test_it_says_what_the_record_says() -> None:
    text = Tags(report.render(result(seconds_fit=12.34, psnr=27.6543), "house.png")).text
    for words in ("house.png", "27.65 dB", "iteration 90 of 100", "es-wmv", "12.34 s", "8.33 it/s"):
        assert words in text
    for words in ("0.9, 0.999", "network.upsample", "perturbation", "the noise has 20.00"):
        assert words in text
    assert "It is white" in text
    without = Tags(report.render(result(psnr=None, sigma=None), "a")).text
    assert "against the truth. " not in without
    assert "the noise has" not in without


def test_structure_in_the_residual_is_called_so() -> None:
    made = result()
    made.measurement["residual"] += 0.3 * made.image
    assert "It is not white" in report.render(made, "a")


def test_many_channels_and_large_pictures_are_shown_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = report.render(result(channels=5), "a")
    assert "channels 1 to 3 of 5" in text
    assert pictures(text)[0].shape == (48, 64, 3)
    assert "channel 1 of 2" in report.render(result(channels=2), "a")
    monkeypatch.setattr(report, "MOST_PIXELS", 1000)
    text = report.render(result(), "a")
    assert pictures(text)[0].shape == (27, 36, 3)
    assert "Reduced to 36x27 pixels" in text


TINY = FitConfig(
    network=SkipConfig(inputs=2, down=(4, 4), skip=2), iterations=4, read_every=2, precision="fp32"
)


def test_a_fit_keeps_what_it_was_given_and_what_it_left(tmp_path: Path) -> None:
    """The residual is that of the drawn pixels, not of pasted ones; saved and loaded alike."""
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    known = (torch.rand(1, 1, 20, 24, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    problem = Problem(known * image, (3, 20, 24), Mask(known), measured=known, known=known)
    made = fit(problem, TINY, device="cpu")
    drawn = fit(Problem(known * image, (3, 20, 24), Mask(known), measured=known), TINY).image
    torch.testing.assert_close(made.measurement["observation"], (known * image)[0])
    expected = (known * (image - drawn))[0]
    torch.testing.assert_close(made.measurement["residual"], expected, rtol=0, atol=1e-6)
    assert float(expected.abs().max()) > 0.1
    assert torch.equal(made.measurement["measured"], (known[0] > 0).expand(3, -1, -1))
    made.save(tmp_path / "run")
    loaded = Result.load(tmp_path / "run")
    assert loaded.measurement.keys() == made.measurement.keys()
    assert report.render(loaded, "a") == report.render(made, "a")


def test_measurements_that_are_no_images_have_a_report_too() -> None:
    """A projection onto 40 numbers: no slider, no picture of the residual."""
    matrix = torch.rand(40, 256, generator=torch.Generator().manual_seed(0)) / 256
    operator = Linear(
        lambda image: image.flatten(1) @ matrix.T.to(image),
        lambda numbers: (numbers @ matrix.to(numbers)).view(-1, 1, 16, 16),
    )
    made = fit(Problem(torch.full((1, 40), 0.3), (1, 16, 16), operator), TINY, device="cpu")
    text = report.render(made, "a")
    assert len(pictures(text)) == 1
    assert 'id="stage"' not in text
    assert "Residual" not in text


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        result().report(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == "mine"
    result().report(tmp_path / "r.html", force=True)
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_curves_go_through_their_points() -> None:
    """A straight line in the logarithm is drawn straight; gaps are left out; few are no curve."""
    ys: list[float | None] = [None, 1e-1, 1e-2, 0.0, 1e-4, float("nan")]
    svg = line_chart("t", [0, 10, 20, 30, 40, 50], ys, log=True, mark=20)
    (points,) = re.findall(r'points="([^"]*)"', svg)
    xy = np.array([[float(v) for v in each.split(",")] for each in points.split()])
    assert xy.shape == (3, 2)
    slopes = np.diff(xy[:, 1]) / np.diff(xy[:, 0])
    assert slopes[0] > 0  # downwards
    assert slopes[0] == pytest.approx(slopes[1], rel=0.01)
    assert 'class="mark"' in svg
    assert line_chart("t", [0, 1], [None, 2.0]) == ""
    assert "NaN" not in line_chart("flat", [1, 2], [3.0, 3.0])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, -0.1), (0, 3000), (30.1, 30.4), (7, 1e6)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0])
    digits = f"{steps[0]:.3e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "5")
