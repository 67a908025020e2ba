"""The paper's experiments show what the paper says: in numbers, on small pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashdip.bench.explore.impedance import TARGETS, impedance, targets
from flashdip.bench.explore.overfit import RULES, overfit
from flashdip.bench.explore.priors import ARCHITECTURES, priors, spectrum, stretched
from flashdip.bench.explore.subject import subject, tensor
from flashdip.bench.explore.tv import NETWORK, damage, tv
from flashdip.bench.parity.suites import SUITES
from flashdip.engine.demo import add_noise, photograph
from flashdip.engine.errors import InputError
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.engine.task_options import FitOptions

HOUSE = Path(__file__).parents[4] / "shared" / "parity" / "denoise25" / "house_GT.png"
SMALL = SkipConfig(inputs=16, down=(16, 32, 64), upsample="nearest")


def cat(size: int) -> np.ndarray:
    """Return a photograph of a cat, one of scikit-image's own, [size, size, 3]."""
    from skimage.data import cat as picture

    square = Image.fromarray(picture()[:, 75:375])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def test_the_four_targets_have_what_they_share() -> None:
    image = tensor(photograph(32))
    found = targets(image, 0)
    assert tuple(found) == TARGETS
    flat = {name: target.flatten(2)[0] for name, target in found.items()}
    # The same pixels, each with its own colour, elsewhere.
    weights = torch.tensor([[1.0, 1e3, 1e6]])
    keys = [torch.sort((weights.double() @ flat[name].double())[0]).values for name in TARGETS]
    torch.testing.assert_close(keys[2], keys[0], rtol=0, atol=0)
    assert float((flat["shuffled pixels"] - flat["image"]).abs().mean()) > 0.1
    noise = flat["image + noise"] - flat["image"]
    assert 15 < float(noise.std()) * 255 < 26
    assert float(flat["noise"].std()) == pytest.approx(12**-0.5, rel=0.05)
    for name, target in targets(image, 0).items():
        torch.testing.assert_close(target, found[name], rtol=0, atol=0)


def test_noise_is_fitted_more_slowly_than_the_image() -> None:
    """In the order of the paper, in the share that is left and in the time it takes."""
    found = impedance(tensor(photograph(48)), SMALL, iterations=60)
    shares = [found[name]["share"] for name in TARGETS]
    assert shares == sorted(shares)
    assert shares[0] < 0.5 * shares[2]
    assert shares[0] < 0.2 * shares[3]
    assert found["image"]["fitted"] < 60
    assert [found[name]["fitted"] for name in TARGETS[1:]] == [None] * 3
    third = len(found["image"]["losses"]) // 3
    assert found["image"]["losses"][third] < 0.3 * found["noise"]["losses"][third]


def test_the_spectrum_of_known_images() -> None:
    """White noise is flat; a power law has its exponent; a wave has its length."""
    generator = np.random.default_rng(0)
    white = generator.normal(size=(3, 64, 96))
    assert spectrum(white).slope == pytest.approx(0, abs=0.2)
    rows, columns = np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None]
    radius = np.hypot(rows, columns)
    radius[0, 0] = 1
    shaped = np.fft.ifft2(np.fft.fft2(generator.normal(size=(2, 128, 128))) / radius).real
    assert spectrum(shaped).slope == pytest.approx(-2, abs=0.2)
    wave = np.sin(2 * np.pi * np.arange(64) / 8)[None, None] * np.ones((1, 64, 1))
    assert spectrum(wave).wavelength == pytest.approx(8, rel=0.02)
    assert spectrum(5 + 0.01 * wave).wavelength == pytest.approx(8, rel=0.02)
    assert spectrum(np.moveaxis(photograph(64) / 255, 2, 0)).slope < -2


def test_architectures_draw_what_they_are_made_for() -> None:
    """Deeper is smoother; skips and nearest enlargement let detail through; ResNet draws noise."""
    found = priors(64, draws=2)
    assert found.keys() == ARCHITECTURES.keys()
    length = {name: one["wavelength"] for name, one in found.items()}
    slope = {name: one["slope"] for name, one in found.items()}
    depths = [length[f"depth {depth}"] for depth in (1, 2, 3, 4, 5)]
    assert depths == sorted(depths)
    assert depths[4] > 3 * depths[0]
    assert length["depth 5"] > length["depth 5, skips"] > length["depth 5, wide skips"]
    assert length["depth 5"] > 2 * length["depth 5, nearest"]
    assert abs(slope["ResNet"]) < 0.6
    assert slope["U-Net"] < slope["ResNet"] - 0.5
    assert slope["deep decoder"] < -3
    for one in found.values():
        assert one["image"].shape == (64, 64, 3)
        assert one["image"].std() > 0.1


def test_draws_repeat_and_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    for draw in ARCHITECTURES.values():
        first = draw(32, 3)
        torch.testing.assert_close(draw(32, 3), first, rtol=0, atol=0)
        assert float((draw(32, 4) - first).abs().max()) > 1e-3
        assert first.shape == (1, 3, 32, 32)
    assert torch.equal(torch.random.get_rng_state(), state)
    image = np.random.default_rng(0).normal(0.5, 1e-4, (3, 16, 16))
    assert (stretched(image).min(), stretched(image).max()) == (0, 1)


def test_too_long_a_fit_loses_what_it_had_and_each_rule_is_told() -> None:
    """The peak lies within; rules stop after what they select, as a fit with them alone does."""
    clean = photograph(32)
    noisy = add_noise(clean, 40, 0)
    config = preset("denoise", "quick").override(
        {"network.down": "16,32,64", "network.inputs": "16", "precision": "fp32", "window": "20"}
    )
    config = config.override(
        {"iterations": "300", "patience": "10", "average": "0.9", "add_back": "0"}
    )
    problem = Problem(tensor(noisy), (3, 32, 32), sigma=40 / 255)
    found = overfit(problem, tensor(clean), config, device="cpu")
    best, end = found["best"], found["end"]
    assert end["iteration"] == 300
    assert found["iterations"][0] < best["iteration"] < 200
    assert best["decibels"] > end["decibels"] + 1.5
    assert best["decibels"] == max(found["decibels"])
    assert tuple(found["rules"]) == RULES == ("es-wmv", "es-emv", "discrepancy")
    for rule, said in found["rules"].items():
        alone = fit(problem, config.override({"stop": rule}), device="cpu", truth=tensor(clean)[0])
        assert alone.stop_reason == rule
        assert alone.iterations < 300
        assert (said["stopped"], said["iteration"]) == (alone.iterations, alone.best_iteration)
        assert said["decibels"] == pytest.approx(alone.psnr, abs=1e-3)
        assert said["decibels"] > end["decibels"]


def quick(iterations: int | None = None) -> FitOptions:
    settings = {"network.down": "16,32,64,64"}
    return FitOptions(preset="quick", precision="fp32", settings=settings, iterations=iterations)


def test_variation_then_nlm_then_the_network() -> None:
    """The order of the paper in denoising, on a photograph."""
    found = tv(cat(64), quick(), suites=["denoise25"])["denoise25"]
    decibels = found["decibels"]
    assert decibels["tv"] + 0.2 < decibels["nlm"]
    assert decibels["nlm"] + 0.2 < decibels[NETWORK]
    assert set(found["images"]) == {"given", "nlm", "tv", NETWORK}


@pytest.mark.skipif(not HOUSE.exists(), reason="the paper's own pictures are not here")
@pytest.mark.slow
def test_variation_then_nlm_then_the_network_on_house() -> None:
    """The same on the paper's own picture, at half its size."""
    found = tv(subject(HOUSE, 128), quick(iterations=300), suites=["denoise25"])
    decibels = found["denoise25"]["decibels"]
    assert decibels["tv"] < decibels["nlm"] < decibels[NETWORK]


def test_the_damage_is_the_suites() -> None:
    clean = photograph(32)
    noise = damage(SUITES["denoise25"], clean, 0).astype(float) - clean
    assert 15 < noise.std() < 26
    holes = damage(SUITES["inpaint50"], clean, 0)
    known = holes.any(axis=2)
    assert 0.4 < known.mean() < 0.6
    np.testing.assert_array_equal(holes[known], np.maximum(clean, 1)[known])
    assert damage(SUITES["sr4"], clean, 0).shape == (8, 8, 3)


def test_pictures_are_shrunk_and_cut(tmp_path: Path) -> None:
    grey = np.tile(np.arange(200, dtype=np.uint8), (120, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = subject(tmp_path / "grey.png", 100)
    assert found.shape == (32, 96, 3)
    assert np.ptp(found, axis=2).max() == 0
    assert int(found[0, 0, 0]) == pytest.approx(
        4, abs=1
    )  # two of a hundred columns cut on each side
    assert subject(tmp_path / "grey.png", 1000).shape == (96, 192, 3)
    assert subject(None, 70).shape == (64, 64, 3)
    with pytest.raises(InputError, match="at least 32 pixels, got 40x24 at a size of 40"):
        subject(tmp_path / "grey.png", 40)
