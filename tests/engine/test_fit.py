"""The fit: what it returns, what it may not look at, and that it can be stopped and resumed."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdip.engine import run as run_module
from flashdip.engine.backends import NATIVE, ONNX, REFERENCE, resolve_device, select
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.observe import spread
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import (
    ConfigError,
    DivergedError,
    InputError,
    ShapeError,
    UnavailableError,
)
from flashdip.engine.events import Event, Finished, Noted, Progress, Retried, Started
from flashdip.engine.fit import fit
from flashdip.engine.metrics import psnr, psnr_luma
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.operators import Downsample, Mask
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.kernels import native, reference

TINY = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), skip=2, upsample="nearest"),
    iterations=30,
    read_every=5,
    precision="fp32",
)

SEARCHING = replace(TINY, stop=("es-wmv",), window=5, patience=15)


def truth(channels: int = 3, height: int = 21, width: int = 18) -> Tensor:
    """A smooth image, [C, H, W]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    planes = [0.5 + 0.4 * torch.sin(3 * x + c) * torch.cos(4 * y - c) for c in range(channels)]
    return torch.stack(planes)


def noisy(sigma: float = 0.1) -> Problem:
    """The image with noise."""
    clean = truth()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    return Problem((clean + sigma * noise)[None], tuple(clean.shape), sigma=sigma)  # type: ignore[arg-type]


ON_CPU = [backend.name for backend in (NATIVE, REFERENCE, ONNX)]


@pytest.mark.parametrize("backend", ON_CPU)
def test_denoises(backend: str) -> None:
    """A hundred iterations bring a smooth image at least 3 dB closer to the truth."""
    problem, clean = noisy(), truth()
    config = replace(TINY, iterations=100, betas=(0.8, 0.9), average=0.9)
    result = fit(problem, config, backend=backend, device="cpu", truth=clean)
    assert result.psnr is not None
    assert result.psnr > psnr(problem.observation[0], clean) + 3
    assert result.psnr == psnr(result.image, clean)
    assert result.record["backend"] == backend


def test_backends_agree() -> None:
    """Images within float32's reach of float64 after 20 iterations."""
    config = replace(TINY, iterations=20)
    exact = fit(noisy(), replace(config, precision="fp64"), backend="reference", device="cpu")
    for backend in ON_CPU:
        found = fit(noisy(), config, backend=backend, device="cpu")
        torch.testing.assert_close(found.image, exact.image, rtol=0, atol=2e-4)


def test_same_seed_same_bits() -> None:
    """And another seed, other bits."""
    one, two = (fit(noisy(), SEARCHING, device="cpu") for _ in range(2))
    assert torch.equal(one.image, two.image)
    assert one.record["history"] == two.record["history"]
    other = fit(noisy(), replace(SEARCHING, seed=1), device="cpu")
    assert not torch.equal(one.image, other.image)


def test_truth_is_never_looked_at() -> None:
    """With the truth, with a false one and without any: the same image."""
    images = [
        fit(noisy(), SEARCHING, device="cpu", truth=t).image for t in (None, truth(), truth() * 0)
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_record_holds_the_promised_keys() -> None:
    """As JSON, without NaN; the history has one entry a reading."""
    result = fit(noisy(), SEARCHING, device="cpu", truth=truth())
    promised = {
        *("psnr", "iterations", "best_iteration", "stop_reason", "seconds_setup", "seconds_fit"),
        *("iterations_per_second", "peak_memory_bytes", "backend", "device", "precision", "seed"),
    }
    record = json.loads(json.dumps(result.record, allow_nan=False))
    assert promised <= record.keys()
    assert record["history"]["iteration"] == list(range(5, result.iterations + 1, 5))
    assert record["best_iteration"] in record["history"]["iteration"]
    assert min(v for v in record["history"]["variance"] if v is not None) == next(
        v
        for i, v in zip(*(record["history"][k] for k in ("iteration", "variance")), strict=True)
        if i == record["best_iteration"]
    )
    assert FitConfig.from_record(record["config"]) == replace(SEARCHING)


def test_image_is_the_average_of_outputs() -> None:
    """Bias-corrected, by hand, from the same iterations without averaging."""
    raw = [
        fit(noisy(), replace(TINY, average=None, iterations=n, read_every=1), device="cpu").image
        for n in (1, 2, 3)
    ]
    averaged = fit(noisy(), replace(TINY, average=0.6, iterations=3, read_every=1), device="cpu")
    weights = torch.tensor([0.36, 0.6, 1.0])
    expected = torch.einsum("n,nchw->chw", weights / weights.sum(), torch.stack(raw))
    torch.testing.assert_close(averaged.image, expected)


def test_weights_draw_the_next_output() -> None:
    """The saved network is the one that the selected iteration left; the next one would use it."""
    config = replace(TINY, average=None, iterations=4, read_every=1, perturbation=0.0)
    weights = fit(noisy(), config, device="cpu").weights
    following = fit(noisy(), replace(config, iterations=5), device="cpu").image
    network = Skip(config.network)
    parameters = [weights[p.name][None] for p in network.parameters]
    assert [p.shape[1:] for p in parameters] == [torch.Size(p.shape) for p in network.parameters]
    image = network.forward(reference, parameters, weights["z"][None])
    torch.testing.assert_close(image[0, :, :21, :18], following, rtol=0, atol=1e-5)


def test_weights_are_those_of_the_selected_iteration() -> None:
    """A search that selects an early iteration keeps its network, not the last one."""
    result = fit(noisy(), replace(SEARCHING, iterations=200), device="cpu")
    assert result.best_iteration < result.iterations
    same = fit(noisy(), replace(TINY, iterations=result.best_iteration), device="cpu")
    for name, weight in same.weights.items():
        torch.testing.assert_close(result.weights[name], weight, rtol=0, atol=0)


def test_odd_sizes_are_cropped_not_invented() -> None:
    """Any size from 16 pixels; the image has exactly the problem's size."""
    for height, width in ((16, 17), (19, 33)):
        clean = truth(1, height, width)
        result = fit(Problem(clean[None], (1, height, width)), TINY, device="cpu")
        assert tuple(result.image.shape) == (1, height, width)
        assert result.weights["z"].shape[1:] == (4 * -(-height // 4), 4 * -(-width // 4))


def test_operators_and_pasted_pixels() -> None:
    """Inpainting keeps the known pixels; super-resolution fits the small image."""
    clean = truth(3, 20, 24)
    known = (torch.rand(1, 1, 20, 24, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    problem = Problem(known * clean, (3, 20, 24), Mask(known), measured=known, known=known)
    result = fit(problem, TINY, device="cpu")
    mask = known[0].bool().expand_as(result.image)
    assert torch.equal(result.image[mask], clean[mask])
    assert not torch.equal(result.image[~mask], clean[~mask])

    small = Downsample(2)(clean[None])
    config = replace(TINY, iterations=150, betas=(0.8, 0.9))
    large = fit(Problem(small, (3, 20, 24), Downsample(2)), config, device="cpu")
    assert psnr(Downsample(2)(large.image[None]), small) > 25


class StopAt:
    """Interrupts a fit after so many questions."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("config", [TINY, SEARCHING], ids=["fixed", "es-wmv"])
@pytest.mark.parametrize("at", [3, 12, 20])
def test_resumes_to_the_same_result(tmp_path: Path, config: FitConfig, at: int) -> None:
    """Interrupted anywhere and gone on with: the same bits as without."""
    whole = fit(noisy(), config, device="cpu")
    path = tmp_path / "fit.ckpt"
    part = fit(noisy(), config, device="cpu", checkpoint=path, interrupted=StopAt(at))
    assert (part.stop_reason, part.iterations) == ("interrupted", at)
    assert torch.isfinite(part.image).all()
    rest = fit(noisy(), config, device="cpu", checkpoint=path)
    assert torch.equal(rest.image, whole.image)
    assert rest.record["history"] == whole.record["history"]
    assert rest.stop_reason == whole.stop_reason
    again = fit(noisy(), config, device="cpu", checkpoint=path)
    assert torch.equal(again.image, whole.image)
    assert again.iterations == whole.iterations


def test_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    """Other settings, another picture, another file altogether."""
    path = tmp_path / "fit.ckpt"
    fit(noisy(), TINY, device="cpu", checkpoint=path)
    with pytest.raises(InputError, match="belongs to another picture, other settings"):
        fit(noisy(), replace(TINY, seed=1), device="cpu", checkpoint=path)
    with pytest.raises(InputError, match="belongs to another picture, other settings"):
        fit(noisy(0.2), TINY, device="cpu", checkpoint=path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="is not a checkpoint"):
        fit(noisy(), TINY, device="cpu", checkpoint=path)


def test_checkpoints_are_written_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that is killed leaves its last checkpoint."""
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "fit.ckpt"

    def killed(event: Event) -> None:
        if isinstance(event, Progress) and event.iteration == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(noisy(), TINY, device="cpu", checkpoint=path, callback=killed)
    assert torch.equal(
        fit(noisy(), TINY, device="cpu", checkpoint=path).image,
        fit(noisy(), TINY, device="cpu").image,
    )


def poison(monkeypatch: pytest.MonkeyPatch, at: dict[int, int]) -> None:
    """Spoil the weights after some iterations, as long as the fit has gone back less often."""
    advance = EagerStep.__call__

    def call(step: EagerStep) -> None:
        advance(step)
        if step.slots[0].retry < at.get(step.slots[0].iteration, 0):
            step.parameters.fill_(float("nan"))

    monkeypatch.setattr(EagerStep, "__call__", call)


@pytest.mark.parametrize("config", [TINY, SEARCHING], ids=["fixed", "es-wmv"])
@pytest.mark.parametrize("at", [11, 14, 16, 23])
def test_resumes_across_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: FitConfig, at: int
) -> None:
    """Interrupted before, between and after going back twice: the same bits."""
    poison(monkeypatch, {13: 2})
    config = replace(config, stop=(*config.stop, "es-emv"))
    whole = fit(noisy(), config, device="cpu")
    assert whole.record["retries"] == 2
    path = tmp_path / "fit.ckpt"
    part = fit(noisy(), config, device="cpu", checkpoint=path, interrupted=StopAt(at))
    assert torch.isfinite(part.image).all()
    rest = fit(noisy(), config, device="cpu", checkpoint=path)
    assert torch.equal(rest.image, whole.image)
    assert rest.record["history"] == whole.record["history"]


def test_interrupted_in_a_bad_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is that of the last good reading."""
    poison(monkeypatch, {12: 1})
    result = fit(noisy(), TINY, device="cpu", interrupted=StopAt(13))
    assert (result.stop_reason, result.best_iteration) == ("interrupted", 10)
    assert torch.equal(result.image, fit(noisy(), replace(TINY, iterations=10), device="cpu").image)
    result.save(tmp_path / "run")


def test_a_fit_without_any_image_is_an_error() -> None:
    """No black picture."""
    problem = replace(noisy(), operator=exploding(0, float("inf")))
    with pytest.raises(DivergedError, match="5 retries included; lower the learning rate"):
        fit(problem, TINY, device="cpu")


def test_a_lost_checkpoint_does_not_lose_the_fit(tmp_path: Path) -> None:
    """Its folder goes away: a note, and the image all the same."""
    folder = tmp_path / "gone"
    folder.mkdir()

    def vanish(event: Event) -> None:
        if isinstance(event, Progress) and folder.exists():
            folder.rmdir()

    events: list[Event] = []

    def both(event: Event) -> None:
        events.append(event)
        vanish(event)

    result = fit(noisy(), TINY, device="cpu", checkpoint=folder / "fit.ckpt", callback=both)
    assert torch.equal(result.image, fit(noisy(), TINY, device="cpu").image)
    assert "no checkpoint was written" in result.record["notes"][0]
    assert [e.message for e in events if isinstance(e, Noted)] == result.record["notes"]


def step_of(problem: Problem, config: FitConfig) -> EagerStep:
    """A prepared step of the native backend."""
    return EagerStep(native, problem, config, torch.device("cpu"), torch.float32, None)


def test_a_retry_draws_other_noise_and_a_smaller_rate_moves_less() -> None:
    """What the guard sets, a step heeds: each by itself."""
    plain, other, slow = (step_of(noisy(), TINY) for _ in range(3))
    other.slots[0].retry, slow.slots[0].rate_scale = 1, 0.5
    start = plain.parameters.clone()
    for step in (plain, other, slow):
        step()
    assert not torch.equal(plain.watch.output, other.watch.output)
    assert torch.equal(plain.watch.output, slow.watch.output)
    moved = (plain.parameters - start).abs().max()
    half = (slow.parameters - start).abs().max()
    torch.testing.assert_close(half, moved / 2, rtol=1e-3, atol=0)


def test_two_fits_side_by_side_are_two_single_fits() -> None:
    """Other pictures, other seeds: outputs, losses and parameters of three iterations."""
    first, second = noisy().observation, noisy(0.3).observation
    together = Problem(torch.cat([first, second]), (3, 21, 18))
    config = replace(TINY, stop=("es-wmv", "es-emv"), window=2)
    both = step_of(together, config)
    singles = [
        step_of(Problem(observation, (3, 21, 18)), replace(config, seed=seed))
        for seed, observation in enumerate((first, second))
    ]
    for step in (both, *singles):
        for _ in range(3):
            step()
    single = torch.cat([step.parameters for step in singles])
    torch.testing.assert_close(both.parameters, single, rtol=1e-4, atol=1e-5)
    for name in ("output", "average", "loss"):
        single = torch.cat([getattr(step.watch, name) for step in singles])
        torch.testing.assert_close(getattr(both.watch, name), single, rtol=1e-4, atol=1e-5)
    for found, step in zip(both.read(), singles, strict=True):
        assert found == pytest.approx(step.read()[0], rel=1e-4, nan_ok=True)


def test_residuals_count_measured_entries_and_clipping() -> None:
    """Half of the entries measured: the mean is over those; white pixels lose half their noise."""
    known = torch.zeros(1, 1, 20, 24)
    known[..., ::2] = 1
    clean = torch.full((1, 3, 20, 24), 0.5)
    problem = Problem(known * (clean + 0.1), (3, 20, 24), Mask(known), 0.1, measured=known)
    step = step_of(problem, replace(TINY, average=None))
    step.slots[0].iteration, step.watch.output = 1, clean
    assert step.read()[0].residual == pytest.approx(0.1, rel=1e-5)
    assert step.read()[0].noise == pytest.approx(0.1, rel=1e-5)
    white = Problem(torch.ones(1, 3, 20, 24), (3, 20, 24), sigma=0.1)
    step = step_of(white, replace(TINY, average=None))
    step.slots[0].iteration, step.watch.output = 1, torch.ones(1, 3, 20, 24)
    assert step.read()[0].noise == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    shifted = Problem(torch.full((1, 3, 20, 24), 5.0), (3, 20, 24), lambda x: x + 5, 0.1)
    step = step_of(shifted, replace(TINY, average=None))
    assert step.read()[0].noise == pytest.approx(0.1, rel=1e-5)


def test_operators_that_lose_constants_are_fitted() -> None:
    """A difference operator measures nothing of a flat image, and is no divergence."""

    def difference(image: Tensor) -> Tensor:
        return image[..., 1:] - image[..., :-1]

    problem = Problem(difference(truth()[None]), (3, 21, 18), difference)
    result = fit(problem, replace(TINY, iterations=60, betas=(0.8, 0.9)), device="cpu")
    losses = result.record["history"]["loss"]
    assert result.stop_reason == "fixed"
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("count", [3, 65_536, 65_537, 3 * 2400 * 2400, 2**25])
def test_sampled_pixels_are_inside_and_distinct(count: int) -> None:
    """Where float32 cannot count any more, too."""
    positions = spread(count)
    assert len(positions) == min(65_536, count)
    assert (int(positions[0]), len(positions.unique())) == (0, len(positions))
    assert count - 1 - count / len(positions) <= int(positions[-1]) < count


def exploding(after: int, times: float) -> Callable[[Tensor], Tensor]:
    """An operator that returns NaN for some calls: a fit that goes bad."""
    calls = itertools.count()

    def operator(image: Tensor) -> Tensor:
        bad = image.requires_grad and after < next(calls) <= after + times
        return image * float("nan") if bad else image

    return operator


def test_divergence_is_survived() -> None:
    """A few bad iterations: back, other noise, on to the end."""
    problem = replace(noisy(), operator=exploding(12, 2))
    events: list[Event] = []
    result = fit(problem, TINY, device="cpu", callback=events.append)
    retried = [e for e in events if isinstance(e, Retried)]
    assert len(retried) == result.record["retries"] == 1
    assert (result.iterations, result.stop_reason) == (30, "fixed")
    assert torch.isfinite(result.image).all()
    assert not torch.equal(result.image, fit(noisy(), TINY, device="cpu").image)


def test_divergence_ends_with_the_last_good_image() -> None:
    """Bad for good: five retries, then the last good image under its name."""
    problem = replace(noisy(), operator=exploding(12, float("inf")))
    result = fit(problem, TINY, device="cpu")
    assert (result.stop_reason, result.record["retries"]) == ("diverged", 5)
    expected = fit(noisy(), replace(TINY, iterations=10), device="cpu")
    assert torch.equal(result.image, expected.image)


def test_events_tell_the_story() -> None:
    """Started, one Progress a reading, Finished; PSNR only with a truth."""
    events: list[Event] = []
    fit(noisy(), TINY, device="cpu", callback=events.append)
    first, *middle, last = events
    assert isinstance(first, Started)
    assert (first.size, first.network_size, first.iterations) == ((21, 18), (24, 20), 30)
    assert all(isinstance(e, Progress) and e.psnr is None for e in middle)
    assert [e.iteration for e in middle if isinstance(e, Progress)] == [5, 10, 15, 20, 25, 30]
    assert isinstance(last, Finished)
    assert (last.iterations, last.best_iteration, last.stop_reason) == (30, 30, "fixed")


def test_discrepancy_and_budget_end_a_fit() -> None:
    """Rules that look at the residual and at the clock."""
    config = replace(TINY, iterations=400, stop=("discrepancy",), betas=(0.8, 0.9))
    result = fit(noisy(), config, device="cpu")
    assert result.stop_reason == "discrepancy"
    residual = (result.image - noisy().observation[0]).square().mean().sqrt()
    assert float(residual) <= 0.1
    budget = fit(noisy(), replace(TINY, stop=("budget",), budget=0.0), device="cpu")
    assert (budget.stop_reason, budget.iterations) == ("budget", 5)
    implied = fit(noisy(), replace(TINY, budget=0.0), device="cpu")
    assert (implied.stop_reason, implied.iterations) == ("budget", 5)


def test_result_round_trips(tmp_path: Path) -> None:
    """Saved and loaded: the image exactly, record and weights too; a second save needs force."""
    result = fit(noisy(), TINY, device="cpu", truth=truth())
    result.save(tmp_path / "run")
    loaded = Result.load(tmp_path / "run")
    assert torch.equal(loaded.image, result.image)
    assert loaded.psnr == result.psnr
    assert loaded.record == result.record
    assert loaded.weights.keys() == result.weights.keys()
    assert all(torch.equal(loaded.weights[k], result.weights[k]) for k in result.weights)
    stored = np.round(result.image.permute(1, 2, 0).numpy() * 65535) / 65535
    np.testing.assert_allclose(loaded.picture.pixels, stored, atol=1e-5)
    with pytest.raises(OSError, match="exists"):
        result.save(tmp_path / "run")
    result.save(tmp_path / "run", force=True)
    with pytest.raises(InputError, match=r"expected result\.json"):
        Result.load(tmp_path)


def test_a_share_of_the_residual_is_added_back() -> None:
    """To the image of a run and of the mean of runs, where it was measured; nothing else moves."""
    problem, config = noisy(), replace(SEARCHING, runs=2)
    plain, back = (
        fit(problem, replace(config, add_back=share), device="cpu", truth=truth())
        for share in (0.0, 0.25)
    )
    expected = plain.image + 0.25 * (problem.observation[0] - plain.image)
    torch.testing.assert_close(back.image, expected, rtol=0, atol=1e-6)
    assert back.psnr == psnr(back.image, truth())
    assert back.record["history"] == plain.record["history"]
    torch.testing.assert_close(back.measurement["residual"], plain.measurement["residual"])
    measured = torch.ones(21, 18)
    measured[3:6, 4:9] = 0
    known = torch.zeros(1, 1, 21, 18)
    known[..., 10, :] = 1
    observation = problem.observation * measured
    part = replace(
        problem, observation=observation, operator=Mask(measured), measured=measured, known=known
    )
    image = torch.rand(1, 3, 21, 18)
    found = part.finish(image, 0.25)
    torch.testing.assert_close(found[..., 3:6, 4:9], image[..., 3:6, 4:9], rtol=0, atol=0)
    assert torch.equal(found[..., 10, :], part.observation[..., 10, :])
    rest = 0.75 * image[..., 11:, :] + 0.25 * problem.observation[..., 11:, :]
    torch.testing.assert_close(found[..., 11:, :], rest)


def test_a_residual_that_is_not_of_pixels_is_not_added_back() -> None:
    half = Downsample(2, "lanczos2")
    problem = Problem(half(truth(height=32, width=32)[None]), (3, 32, 32), half)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(problem.finish(image, 0.25), image)
    with pytest.raises(ConfigError, match="add_back"):
        replace(TINY, add_back=1.0)


def test_bad_problems_are_refused() -> None:
    """One line each, before anything is fitted."""
    with pytest.raises(ShapeError, match="sides of at least 16 pixels, got 3 channels, 40x15"):
        Problem(torch.zeros(1, 3, 15, 40), (3, 15, 40))
    with pytest.raises(InputError, match="expected finite numbers"):
        Problem(torch.full((1, 1, 16, 16), float("nan")), (1, 16, 16))
    with pytest.raises(ShapeError, match=r"operator's output shape \(1, 1, 8, 8\)"):
        Problem(torch.zeros(1, 1, 16, 16), (1, 16, 16), Downsample(2))
    with pytest.raises(ConfigError, match="sigma: expected a finite number of at least 0, got -1"):
        Problem(torch.zeros(1, 1, 16, 16), (1, 16, 16), sigma=-1)
    seen = torch.zeros(1, 1, 16, 16)
    with pytest.raises(ShapeError, match=r"known: expected a shape that broadcasts to \(1, 1, 16"):
        Problem(seen, (1, 16, 16), known=torch.ones(7, 7))
    with pytest.raises(ShapeError, match="measured: expected a shape that broadcasts"):
        Problem(seen, (1, 16, 16), measured=torch.ones(2, 1, 16, 16))
    with pytest.raises(InputError, match="measured: expected at least one entry"):
        Problem(seen, (1, 16, 16), measured=seen)
    with pytest.raises(ShapeError, match="to paste known pixels from"):
        Problem(seen, (1, 32, 32), Downsample(2), known=torch.ones(1, 1, 32, 32))
    with pytest.raises(InputError, match="pasted: expected finite numbers"):
        Problem(seen, (1, 16, 16), pasted=seen / 0)
    with pytest.raises(ShapeError, match="truth: expected the restored image's shape"):
        fit(noisy(), TINY, device="cpu", truth=torch.zeros(3, 4, 4))
    with pytest.raises(ShapeError, match="expected a single fit"):
        fit(Problem(torch.zeros(2, 1, 16, 16), (1, 16, 16)), TINY, device="cpu")


def test_backends_are_chosen_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that can run; asked for by name, an error with its reasons."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert select("auto", cpu, TINY)[0].name == "native"
    backend, precision, notes = select("auto", cpu, replace(TINY, precision="fp64"))
    assert (backend.name, precision) == ("reference", "fp64")
    assert notes == ["backend native cannot run here: it computes in bf16 or fp32, not fp64"]
    with pytest.raises(UnavailableError, match="it computes in fp32 or fp64, not bf16"):
        select("reference", cpu, replace(TINY, precision="bf16"))
    with pytest.raises(UnavailableError, match="triton cannot run here: it runs on NVIDIA GPUs"):
        select("triton", cpu, TINY)
    with pytest.raises(ConfigError, match="backend: expected one of auto, triton, native, refer"):
        select("fast", cpu, TINY)
    with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        resolve_device("gpu")
    assert resolve_device("cpu") == cpu


def test_psnr_of_luma() -> None:
    """A grey shift of ten steps of 255 moves Y by 219/255 of it; the border does not count."""
    image = torch.full((3, 20, 20), 0.4)
    other = image + 10 / 255
    other[:, :4] = other[:, -5:] = 1.0
    other[:, :, :4] = other[:, :, -5:] = 1.0
    expected = -20 * np.log10(10 / 255 * 219 / 255)
    assert psnr_luma(image, other) == pytest.approx(expected, abs=1e-6)
    assert psnr(image, image) == 200
    with pytest.raises(ShapeError, match="truth: expected the restored image's shape"):
        psnr(image, image[:1])
