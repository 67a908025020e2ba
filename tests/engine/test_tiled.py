"""Tiles: how a picture is cut and joined, that nothing done is done again, and the seams."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdip.engine import memory, planning, tasks
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError, StoppedError, UnavailableError
from flashdip.engine.events import Event, Noted, Started
from flashdip.engine.fit import fit
from flashdip.engine.images import save
from flashdip.engine.metrics import psnr
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Downsample, Linear, Mask
from flashdip.engine.picture import Picture
from flashdip.engine.planning import bytes_of, plan
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.engine.tiled import fit_tiled
from flashdip.engine.tiling import Tiling, cut
from tests.engine.test_fit import StopAt, truth

TINY = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), skip=2, upsample="nearest"),
    iterations=20,
    read_every=5,
    precision="fp32",
)
FOUR = Tiling((40, 52), (24, 32), 6)


def noisy(sigma: float = 0.1) -> tuple[Problem, Tensor]:
    clean = truth(3, 40, 52)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    return Problem((clean + sigma * noise)[None], (3, 40, 52), sigma=sigma), clean


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (40, 52), (33, 97), (64, 20)])
def test_tiles_cover_everything_and_cross_fade(size: tuple[int, int], factor: int) -> None:
    """Cutting and joining gives the same image; neighbours share at least the overlap."""
    tiling = Tiling(size, (min(24, size[0]), min(32, size[1])), 5, factor)
    for starts, side, length in zip((tiling.rows, tiling.columns), tiling.side, size, strict=True):
        assert (starts[0], starts[-1] + side) == (0, length)
        assert all(one + side - other >= 5 for one, other in itertools.pairwise(starts))
    image = torch.rand(2, factor * size[0], factor * size[1])
    windows = [image[:, rows, columns] for rows, columns in map(tiling.window, tiling.tiles)]
    assert {tuple(window.shape[1:]) for window in windows} == {tiling.image_side}
    joined = tiling.blend(2, lambda tile: windows[tile.index])
    torch.testing.assert_close(joined, image, rtol=0, atol=1e-6)
    assert all(seam.squared == 0 for seam in tiling.disagreement(lambda t: windows[t.index]))


def test_a_seam_is_a_ramp_and_is_measured() -> None:
    """A tile that is brighter fades in over the overlap; the disagreement is its difference."""
    tiling = Tiling((16, 40), (16, 24), 8)
    levels = [0.0, 0.5]
    assert len(tiling.tiles) == 2
    row = tiling.blend(1, lambda tile: torch.full((1, 16, 24), levels[tile.index]))[0, 3]
    assert torch.equal(row[:16], torch.zeros(16))
    assert torch.equal(row[24:], torch.full((16,), 0.5))
    assert (row.diff() >= 0).all()
    assert row.diff().max() < 0.5 / 6
    (seam,) = tiling.disagreement(lambda tile: torch.full((1, 16, 24), levels[tile.index]))
    assert (seam.tiles, seam.squared, seam.values) == ((0, 1), 0.25, 16 * 8)


def test_neighbours_are_fitted_before() -> None:
    tiling = Tiling((60, 60), (24, 24), 4)
    before = [tiling.neighbour(tile) for tile in tiling.tiles]
    assert [tile and tile.index for tile in before] == [None, 0, 1, 0, 3, 4, 3, 6, 7]
    assert [tiling.iterations(tile, 7) for tile in tiling.tiles] == [7] + 8 * [4]


def test_no_more_tiles_than_needed_and_no_larger() -> None:
    tiling = Tiling((100, 100), (72, 72), 8).tightened(8)
    assert tiling.side == (56, 56)
    assert len(tiling.tiles) == 4
    assert Tiling((100, 60), (100, 60), 8).tightened(8).side == (100, 60)


def test_problems_are_cut_with_all_that_belongs_to_them() -> None:
    """Masks of one channel or all, of the picture's size or smaller; the observation's grid."""
    clean = truth(3, 40, 52)[None]
    known = (torch.rand(1, 1, 40, 52, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    problem = Problem(known * clean, (3, 40, 52), Mask(known), measured=known, known=known)
    tile = FOUR.tiles[3]
    part = cut(problem, FOUR, tile)
    rows, columns = FOUR.window(tile)
    assert (rows, columns) == (slice(16, 40), slice(20, 52))
    assert torch.equal(part.observation, problem.observation[..., rows, columns])
    assert torch.equal(part.operator(torch.ones(1, 3, 24, 32))[:, :1], known[..., rows, columns])
    assert part.known is not None
    assert torch.equal(part.known, known[..., rows, columns])

    small = Problem(Downsample(2)(clean), (3, 40, 52), Downsample(2))
    half = Tiling.of((3, 40, 52), 2, 32)
    assert (half.size, half.side, half.image_side) == ((20, 26), (16, 16), (32, 32))
    part = cut(small, half, half.tiles[1])
    assert part.shape == (3, 32, 32)
    assert torch.equal(part.observation, small.observation[..., :16, 10:])

    blind = replace(problem, measured=known * (torch.arange(52) < 20))
    with pytest.raises(InputError, match="known pixels in each of the 4 tiles of 32x24, got none"):
        FOUR.check(blind)
    blur = Linear(lambda image: image, lambda image: image)
    with pytest.raises(InputError, match=r"acts nearby .* got Linear"):
        FOUR.check(Problem(clean, (3, 40, 52), blur))


def test_each_tile_begins_with_its_neighbours_weights() -> None:
    """And gets half the iterations; the record says how the tiles agree."""
    problem, clean = noisy()
    events: list[Event] = []
    result = fit_tiled(
        problem, TINY, FOUR, device="cpu", truth=clean, callback=events.append, notes=("hello",)
    )
    assert result.image.shape == problem.shape
    assert result.psnr == psnr(result.image, clean)
    tiles = result.record["tiles"]
    assert (tiles["grid"], tiles["side"], tiles["overlap"]) == ([2, 2], [24, 32], 6)
    assert tiles["iterations"] == [20, 10, 10, 10]
    assert result.iterations == 50
    assert 5 < tiles["least_agreement_db"] <= tiles["agreement_db"] < 60
    started = [event for event in events if isinstance(event, Started)]
    assert [event.size for event in started] == [(24, 32)] * 4
    assert started[0].notes == ("hello", "tile 1 of 4: from row 0, column 0")
    assert "begins with the weights of" in started[3].notes[-1]
    assert result.record["notes"][0] == "hello"
    assert events[-1] == Noted(result.record["notes"][-1])
    assert "4 tiles of 32x24 agree to" in result.record["notes"][-1]
    json.dumps(result.record, allow_nan=False)

    # The second tile, by hand.
    first = fit(cut(problem, FOUR, FOUR.tiles[0]), TINY, device="cpu")
    part = cut(problem, FOUR, FOUR.tiles[1])
    second = fit(part, replace(TINY, iterations=10), device="cpu", init=first)
    outer = result.image[:, :16, 32:]  # where no other tile reaches
    torch.testing.assert_close(outer, second.image[:, :16, 12:], rtol=0, atol=1e-6)


def count_started(events: list[Event]) -> int:
    return sum(isinstance(event, Started) for event in events)


@pytest.mark.parametrize("at", [3, 12, 34, 47])
def test_a_stopped_fit_goes_on_tile_by_tile(tmp_path: Path, at: int) -> None:
    """To the same bits, within a tile too; published tiles are not done again."""
    problem, _ = noisy()
    whole = fit_tiled(problem, TINY, FOUR, device="cpu")
    with pytest.raises(StoppedError, match=r"stopped in tile \d of 4: what is done is in .*shop"):
        fit_tiled(
            problem, TINY, FOUR, device="cpu", folder=tmp_path / "shop", interrupted=StopAt(at)
        )
    published = len(list((tmp_path / "shop").glob("*.safetensors")))
    assert published == (0 if at < 20 else (at - 10) // 10)
    events: list[Event] = []
    rest = fit_tiled(
        problem, TINY, FOUR, device="cpu", folder=tmp_path / "shop", callback=events.append
    )
    assert torch.equal(rest.image, whole.image)
    assert rest.record["tiles"] == whole.record["tiles"]
    assert count_started(events) == 4 - published
    with pytest.raises(InputError, match="belongs to another picture, other settings"):
        fit_tiled(noisy(0.2)[0], TINY, FOUR, device="cpu", folder=tmp_path / "shop")
    (tmp_path / "shop" / "tile-00002.safetensors").write_bytes(b"something else")
    with pytest.raises(InputError, match="is not a tile"):
        fit_tiled(problem, TINY, FOUR, device="cpu", folder=tmp_path / "shop")


def test_tiled_is_as_good_as_whole() -> None:
    """At most 0.3 dB less, of a picture that fits both ways; and each tile needs fewer iterations.

    `tests/stress_tiles.py` does this with a photograph.
    """
    clean = truth(3, 64, 80)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    problem = Problem((clean + 0.1 * noise)[None], (3, 64, 80), sigma=0.1)
    network = SkipConfig(inputs=8, down=(8, 16, 32), upsample="nearest")
    config = replace(TINY, network=network, iterations=400, stop=("discrepancy",))
    config = replace(config, betas=(0.8, 0.9), average=0.9)
    whole = fit(problem, config, device="cpu", truth=clean)
    tiling = Tiling.of(problem.shape, 1, 56)
    tiled = fit_tiled(problem, config, tiling, device="cpu", truth=clean)
    assert whole.psnr is not None
    assert tiled.psnr is not None
    assert psnr(problem.observation[0], clean) + 10 < whole.psnr
    assert tiled.psnr > whole.psnr - 0.3
    first, *others = tiled.record["tiles"]["iterations"]
    assert len(others) == 3
    assert max(others) < first
    assert tiled.record["tiles"]["least_agreement_db"] > 30


OPTIONS = {
    "iterations": 4,
    "precision": "fp32",
    "settings": {"network.down": "8,8", "network.inputs": "4", "read_every": "2"},
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("denoise", {"sigma": 20}),
        ("dejpeg", {}),
        ("superres", {"factor": 2}),
        ("inpaint", {"mask": np.indices((40, 52)).sum(0) % 3 > 0}),
        ("restore", {}),
    ],
)
def test_every_task_is_tiled(task: str, own: dict[str, object]) -> None:
    """The result is dressed as ever, and known pixels are kept."""
    pixels = np.rint(20 + 200 * truth(3, 40, 52).numpy().transpose(1, 2, 0)).astype(np.uint8)
    if task == "restore":
        pixels[10:14, 10:40] = 0
    result = getattr(tasks, task)(pixels, tile=33, **own, **OPTIONS)
    factor = 2 if task == "superres" else 1
    assert result.record["tiles"]["side"] == [33 // factor * factor] * 2
    assert result.picture.pixels.shape == (40 * factor, 52 * factor, 3)
    assert result.picture.dtype == "uint8"
    if task == "inpaint":
        known = np.indices((40, 52)).sum(0) % 3 > 0
        np.testing.assert_array_equal(np.rint(result.picture.pixels * 255)[known], pixels[known])
    assert "tiles" not in getattr(tasks, task)(pixels, tile=500, **own, **OPTIONS).record


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_24_megapixels_are_planned_within_6_gb(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default sizes of a small machine; the tiles cover the picture and each fits."""
    monkeypatch.setattr(memory, "available", lambda device: 8 * 10**9)
    monkeypatch.setattr(memory, "resident", lambda: 3 * 10**8)
    config = preset("denoise", "quick").override({"precision": precision})
    found = plan(config, (3, 4000, 6000), device="cpu", timed=False, limit="6GB")
    assert found.tiling is not None
    assert found.fits
    assert found.available_bytes == 57 * 10**8
    assert found.memory_bytes <= found.available_bytes
    covered = np.zeros((4000, 6000), bool)
    height, width = found.tiling.side
    for tile in found.tiling.tiles:
        covered[tile.top : tile.top + height, tile.left : tile.left + width] = True
    assert covered.all()


def test_what_does_not_fit_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fewest tiles that do, as small as they can then be; or it is said that none do."""
    config = replace(TINY, iterations=10)
    monkeypatch.setattr(memory, "available", lambda device: 10**8)
    monkeypatch.setattr(memory, "resident", lambda: 10**9)
    shape = (3, 1000, 1400)
    tiled = plan(config, shape, device="cpu", timed=False)
    assert tiled.tiling is not None
    assert tiled.fits
    assert tiled.fitted == (3, *tiled.tiling.image_side)
    count = len(tiled.tiling.tiles)
    assert tiled.iterations == 10 + 5 * (count - 1)
    assert f"1400x1000 pixels in {count} tiles of" in tiled.line()
    larger = max(tiled.tiling.side) + 4 * 8
    with monkeypatch.context() as context:
        context.setattr(memory, "available", lambda device: None)
        assert plan(config, shape, device="cpu", timed=False).tiling is None
    # Larger tiles would not have fitted, or would have been no fewer.
    other = Tiling.of(shape, 1, larger)
    need = plan(config, (3, *other.side), device="cpu", timed=False, factor=None).memory_bytes
    assert planning.MARGIN * need > 10**8 or len(other.tiles) == count

    whole = plan(config, shape, device="cpu", timed=False, factor=None)
    assert (whole.tiling, whole.fits) == (None, False)
    assert plan(config, (3, 64, 64), device="cpu", timed=False).tiling is None
    limited = plan(config, (3, 400, 400), device="cpu", timed=False, limit="1.05 GB")
    assert limited.available_bytes == 50_000_000
    assert limited.tiling is not None
    with pytest.raises(UnavailableError, match=r"expected at least .* for the smallest tiles, got"):
        plan(config, shape, device="cpu", timed=False, limit="1 GB")
    with pytest.raises(ConfigError, match="tile: expected a side of at least 32 pixels, got 8"):
        plan(config, shape, device="cpu", timed=False, tile=8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GB", 6 * 10**9), ("800 mb", 8 * 10**8), ("1.5GiB", 3 << 29), (12345, 12345), ("2k", 2000)],
)
def test_sizes_are_understood(text: str | int, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["six", "", "-3GB", "0", "3XB", "1.2.3GB", "5 i"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory: expected bytes such as 6GB"):
        bytes_of(text)


Command = Callable[..., list[str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return the command line that denoises a picture of two tiles, in its own folder."""
    problem, _ = noisy()
    picture = Picture(problem.observation[0].clamp(0, 1).numpy().transpose(1, 2, 0), dtype="uint8")
    save(tmp_path / "noisy.png", replace(picture, high=255.0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def line(iterations: int, *more: str) -> list[str]:
        fast = ("network.down=8,8", "network.inputs=4", "read_every=2")
        settings = [word for each in fast for word in ("--set", each)]
        limits = ["--sigma", "20", "--stop", "fixed", "--iterations", str(iterations)]
        task = [sys.executable, "-m", "flashdip.cli", "denoise", "noisy.png", "-o", "out.png"]
        return [*task, "--tile", "40", *settings, *limits, "--precision", "fp32", *more]

    return line


def test_killed_at_any_moment_the_same_command_goes_on(command: Command) -> None:
    """By SIGKILL once a tile is published; that tile is not touched again."""
    shop = Path("out.png.tiles")
    line = command(600)
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not (shop / "tile-00000.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not Path("out.png").exists()
    first = os.stat(shop / "tile-00000.safetensors")
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "tile 1 of 2 is done already" in done.stderr
    assert "agree to" in done.stderr
    assert Path("out.png").exists()
    assert not shop.exists()  # the picture has been written
    assert first.st_size > 0


def test_ctrl_c_keeps_what_is_done(command: Command) -> None:
    with subprocess.Popen(
        command(100000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for text in process.stderr:
            if "it/s" in text:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped in tile 1 of 2: what is done is in out.png.tiles" in err
    assert "Traceback" not in err
    assert [path.suffix for path in Path("out.png.tiles").iterdir()] == [".ckpt"]
    again = subprocess.run(command(600), capture_output=True, text=True, check=False)
    assert again.returncode == 2  # other settings: not mixed
    assert "belongs to another picture, other settings" in again.stderr


def test_a_dry_run_only_says_what_it_would_take(command: Command) -> None:
    line = command(600, "--dry-run")
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "52x40 pixels in 2 tiles of 40x40 on cpu (native, fp32): " in done.stdout
    assert "at most about" in done.stdout
    listed = subprocess.run([*line, "--json"], capture_output=True, text=True, check=True)
    record = json.loads(listed.stdout)
    assert record["tiles"] == {"grid": [1, 2], "side": [40, 40], "overlap": 5}
    assert record["iterations"] == 900
    assert {path.name for path in Path().iterdir()} == {"noisy.png"}


def test_a_tiled_result_is_saved_and_reported_like_any_other(tmp_path: Path) -> None:
    """The page says how the tiles agree; there are no weights to begin with."""
    problem, _ = noisy()
    result = fit_tiled(problem, TINY, FOUR, device="cpu")
    result.save(tmp_path / "run")
    loaded = Result.load(tmp_path / "run")
    assert torch.equal(loaded.image, result.image)
    assert loaded.record == result.record
    result.report(tmp_path / "page.html")
    assert "4 tiles of 32x24 agree to" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match=r"expected the finite weights level0\.skip\.weight in"):
        fit(problem, TINY, device="cpu", init=tmp_path / "run")
