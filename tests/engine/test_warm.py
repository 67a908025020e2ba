"""Warm starts: what a fit begins with, that it is faster then, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashdip.engine import tasks
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.events import Event, Started
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import Skip
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.engine.warm import warm
from flashdip.kernels import reference
from tests.engine.test_fit import ON_CPU, SEARCHING, TINY, StopAt, noisy, truth

STILL = replace(TINY, learning_rate=0.0, perturbation=0.0, average=None, iterations=1)


@pytest.fixture(scope="module")
def earlier() -> Result:
    """A fit of the same picture with another seed."""
    return fit(noisy(), replace(TINY, iterations=60, seed=7), device="cpu")


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_first_output_is_what_the_earlier_network_draws(earlier: Result, backend: str) -> None:
    """With its own z, not with that of this fit's seed."""
    names = [parameter.name for parameter in Skip(TINY.network).parameters]
    parameters = [earlier.weights[name][None] for name in names]
    drawn = Skip(TINY.network).forward(reference, parameters, earlier.weights["z"][None])
    found = fit(noisy(), STILL, backend=backend, device="cpu", init=earlier)
    torch.testing.assert_close(found.image, drawn[0, :, :21, :18], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.weights["z"], earlier.weights["z"], rtol=0, atol=0)


def test_it_begins_where_the_earlier_fit_ended(earlier: Result) -> None:
    """Ten iterations from there leave less than ten from random weights; seeds still matter."""
    config = replace(TINY, iterations=10)
    cold, begun = (fit(noisy(), config, device="cpu", init=init) for init in (None, earlier))
    assert begun.record["history"]["loss"][0] < 0.5 * cold.record["history"]["loss"][0]
    other = fit(noisy(), replace(config, seed=1), device="cpu", init=earlier)
    assert not torch.equal(other.image, begun.image)


def test_a_folder_is_as_good_as_the_result_and_is_recorded(earlier: Result, tmp_path: Path) -> None:
    earlier.save(tmp_path / "first")
    events: list[Event] = []
    named = fit(noisy(), TINY, device="cpu", init=tmp_path / "first", callback=events.append)
    assert torch.equal(named.image, fit(noisy(), TINY, device="cpu", init=earlier).image)
    assert isinstance(events[0], Started)
    assert events[0].notes == (f"begins with the weights of {tmp_path / 'first'}",)
    assert named.record["init"]["source"] == str(tmp_path / "first")
    assert named.record["init"]["sha256"] == warm(earlier, TINY, (21, 18)).digest
    assert fit(noisy(), TINY, device="cpu").record["init"] is None


@pytest.mark.parametrize("config", [TINY, SEARCHING], ids=["fixed", "es-wmv"])
def test_a_checkpoint_goes_on_to_the_same_bits(
    earlier: Result, tmp_path: Path, config: FitConfig
) -> None:
    whole = fit(noisy(), config, device="cpu", init=earlier)
    path = tmp_path / "fit.ckpt"
    fit(noisy(), config, device="cpu", init=earlier, checkpoint=path, interrupted=StopAt(12))
    rest = fit(noisy(), config, device="cpu", init=earlier, checkpoint=path)
    assert torch.equal(rest.image, whole.image)
    assert torch.equal(rest.weights["z"], earlier.weights["z"])
    with pytest.raises(InputError, match="belongs to another picture, other settings"):
        fit(noisy(), config, device="cpu", checkpoint=path)


def test_what_does_not_fit_is_refused(earlier: Result, tmp_path: Path) -> None:
    """One line that says what was expected and what came."""
    network = replace(TINY.network, down=(8, 8, 8))
    with pytest.raises(
        ConfigError, match=r"expected the network of this fit, network\.down=8,8,8, got 8,8 from a"
    ):
        fit(noisy(), replace(TINY, network=network), device="cpu", init=earlier)
    clean = truth(3, 40, 18)
    with pytest.raises(ShapeError, match=r"z of shape \(4, 40, 20\) for a picture of 18x40, got"):
        fit(Problem(clean[None], (3, 40, 18)), TINY, device="cpu", init=earlier)
    with pytest.raises(
        InputError, match=r"expected a folder with the fit\.safetensors of an earli"
    ):
        fit(noisy(), TINY, device="cpu", init=tmp_path)
    (tmp_path / "fit.safetensors").write_bytes(b"something else")
    with pytest.raises(InputError, match="init: expected a folder"):
        fit(noisy(), TINY, device="cpu", init=tmp_path)
    spoilt = {name: tensor / 0 for name, tensor in earlier.weights.items()}
    with pytest.raises(InputError, match="got NaN or infinity"):
        fit(noisy(), TINY, device="cpu", init=replace(earlier, weights=spoilt))


def test_tasks_take_it(tmp_path: Path) -> None:
    """Whatever the task, and also from another task of the same network."""
    image = truth().numpy().transpose(1, 2, 0)
    settings = {"network.down": "8,8", "network.inputs": "4", "read_every": "2"}
    settings["network.upsample"] = "nearest"
    first = tasks.denoise(image, sigma=20, iterations=4, precision="fp32", settings=settings)
    first.save(tmp_path / "a")
    second = tasks.dejpeg(
        image, iterations=4, precision="fp32", settings=settings, init=tmp_path / "a"
    )
    assert second.record["init"]["source"] == str(tmp_path / "a")
