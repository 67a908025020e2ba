"""Configs and presets: settings as text, ranges, the published values."""

from dataclasses import replace

import pytest

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.presets import PRESETS, TASKS, names, preset
from flashdip.engine.task_options import FitOptions, config_of
from tests import golden


def test_override_parses_text() -> None:
    """Numbers, lists, none, single entries of lists, fields of the network."""
    config = FitConfig().override(
        {
            "average": "none",
            "betas": "0.8,0.9",
            "stop": "fixed",
            "iterations": "12",
            "network.down": "8",
            "network.up": "none",
            "network.skip": "0",
            "network.conv1x1_up": "false",
            "network.upsample": "nearest",
        }
    )
    assert (config.average, config.betas, config.stop) == (None, (0.8, 0.9), ("fixed",))
    assert config.iterations == 12
    expected = SkipConfig(down=(8,), skip=0, conv1x1_up=False, upsample="nearest")
    assert config.network == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": "1"}, "rate: no such field; expected one of input, input_scale, iterations"),
        ({"network.width": "1"}, "network.width: no such field"),
        ({"network": "1"}, "network: no such field"),
        ({"network.outputs": "1"}, "network.outputs: it follows the image's channels"),
        ({"network.bias": "0"}, "network.bias: expected true or false, got 0"),
        ({"seed": "9" * 20}, r"seed: expected a whole number below 2\^62"),
        ({"iterations": "1.5"}, "iterations: expected a whole number of at least 1, got 1.5"),
        ({"iterations": "0"}, "iterations: expected a whole number of at least 1, got 0"),
        ({"average": "1"}, r"average: expected a number in \[0, 1\), got 1"),
        ({"learning_rate": "nan"}, r"learning_rate: expected a number in \[0, 1000\), got nan"),
        ({"betas": "0.9"}, "betas: expected two numbers"),
        ({"stop": "never"}, "stop: expected one of fixed, es-wmv, es-emv, discrepancy, budget"),
        ({"stop": "budget"}, "stop: the rule budget needs a number of seconds"),
        ({"precision": "int8"}, "precision: expected one of auto, fp16, bf16, fp32, fp64, got 'in"),
        ({"input": "meshgrid"}, "network.inputs: a meshgrid has 2 channels, got 32"),
        ({"seed": "-1"}, "seed: expected a whole number of at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, str], message: str) -> None:
    """One line: the field, what was expected, what came."""
    with pytest.raises(ConfigError, match=message) as error:
        FitConfig().override(settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", PRESETS, ids="/".join)
def test_record_round_trips(key: tuple[str, str]) -> None:
    """What result.json holds builds the same config again, through JSON."""
    import json

    config = PRESETS[key].config
    assert FitConfig.from_record(json.loads(json.dumps(config.record()))) == config


def test_every_task_has_the_three_presets() -> None:
    """And "default" is "balanced"."""
    for task in TASKS:
        assert names(task)[:3] == ["quick", "balanced", "best"]
        assert preset(task) == preset(task, "balanced")
    with pytest.raises(ConfigError, match="preset: expected default, quick, balanced, best, pub"):
        preset("denoise", "fast")
    with pytest.raises(ConfigError, match="task: expected one of denoise"):
        preset("sharpen")


@pytest.mark.parametrize("name", ["quick", "balanced", "best"])
def test_presets_adapt_to_the_noise(name: str) -> None:
    """Little noise has more iterations, much a stronger perturbation and no rule that fails there.

    What users set holds.
    """
    usual = preset("denoise", name)
    assert preset("denoise", name, 25 / 255) == usual
    little, much = (preset("denoise", name, level / 255) for level in (10, 50))
    longer = replace(usual, iterations=round(1.6 * usual.iterations))
    by_residual = "discrepancy" in usual.stop
    assert little == replace(longer, discrepancy=0.98 if by_residual else 1.0)
    assert usual.discrepancy == (0.995 if by_residual else 1.0)
    assert usual.window == (200 if by_residual else 100)
    assert much.perturbation == pytest.approx(preset("denoise", "published-denoise50").perturbation)
    assert much.window == (150 if by_residual else 200)
    assert much.stop == ("es-wmv",)
    assert usual.add_back > 0 == much.add_back
    calmer = replace(much, perturbation=usual.perturbation, add_back=usual.add_back)
    assert replace(calmer, stop=usual.stop, window=usual.window) == usual
    for task, other in (("denoise", "published-denoise"), ("dejpeg", name), ("inpaint", name)):
        assert preset(task, other, 50 / 255) == preset(task, other)
    own: FitOptions = {"preset": name, "sigma": 50.0, "settings": {"perturbation": "0.02"}}
    assert config_of("denoise", own) == replace(much, perturbation=0.02)
    assert config_of("denoise", {**own, "stop": "discrepancy"}).stop == ("discrepancy",)
    assert config_of("denoise", {"preset": name, "iterations": 7}, 10 / 255).iterations == 7


@pytest.mark.parametrize(
    ("task", "name", "case", "iterations", "rate", "perturbation"),
    [
        ("denoise", "published-denoise", "published-denoise/64x64", 3000, 0.01, 1 / 30),
        ("denoise", "published-denoise50", "published-denoise/64x64", 3000, 0.01, 1 / 20),
        ("dejpeg", "published-dejpeg", "published-dejpeg/64x96", 2400, 0.01, 1 / 30),
        ("superres", "published-sr4", "published-denoise/64x64", 2000, 0.01, 0.03),
        ("superres", "published-sr8", "published-denoise/64x64", 4000, 0.01, 0.05),
        ("inpaint", "published-inpaint-hole", "published-inpaint-hole/64x64", 5001, 0.01, 0.03),
        ("inpaint", "published-inpaint-text", "published-inpaint-text/64x64", 6001, 0.01, 0.03),
        ("inpaint", "published-inpaint-large", "published-inpaint-large/192x192", 3001, 0.01, 0.0),
        ("restore", "published-restore50", "published-denoise/64x64", 11000, 0.001, 0.03),
        ("restore", "published-restore2", "published-restore2/64x64", 1000, 0.01, 0.0),
    ],
)
def test_published_presets(
    task: str, name: str, case: str, iterations: int, rate: float, perturbation: float
) -> None:
    """Network, count, rate and perturbation of the notebooks."""
    config = preset(task, name)
    shapes = [p.shape for p in Skip(config.network).parameters]
    known = golden.case(case)
    assert shapes == known.shapes
    modes = (known.options["upsample_mode"], known.options.get("downsample_mode", "stride"))
    assert (config.network.upsample, config.network.downsample) == modes
    assert (config.network.pad, config.network.act, config.network.sigmoid) == (
        "reflection",
        "LeakyReLU",
        True,
    )
    assert config.network.scale == "uniform"  # as PyTorch drew scales then
    kind = "meshgrid" if name == "published-inpaint-hole" else "noise"
    assert (config.input, config.input_scale) == (kind, 0.1)
    found = (config.iterations, config.learning_rate, config.perturbation, config.betas)
    assert found == (iterations, rate, perturbation, (0.9, 0.999))


def test_cosine_schedule_ends_at_a_hundredth() -> None:
    """From the rate to a hundredth of it."""
    config = FitConfig(schedule="cosine", iterations=100, learning_rate=0.01)
    assert config.rate(1) == 0.01
    assert config.rate(51) == pytest.approx(0.00505)
    assert config.rate(100) == pytest.approx(0.0001, rel=0.05)


def test_warm_up_rises_to_the_rate() -> None:
    """Linearly, and then the schedule goes on as without it."""
    config = FitConfig(warmup=3, learning_rate=0.01, iterations=100)
    rates = [config.rate(i) for i in range(1, 6)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    cosine = FitConfig(warmup=3, schedule="cosine", iterations=100)
    assert cosine.rate(51) == pytest.approx(0.00505)
