"""White noise is called white, and what is not is not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from flashdip.engine.whiteness import REACH, STRUCTURE, whiteness


def noise(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 0.1, shape)


def everywhere(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.ones(values.shape, bool)


@pytest.mark.parametrize("holes", [False, True])
def test_white_noise_stays_below_the_bound_99_times_in_100(holes: bool) -> None:
    """Of 200 fields at most 7 may not: more have a chance below 1 %; the bound is not loose."""
    above, share = 0, []
    for seed in range(200):
        values = noise(seed, 3, 40, 33)
        kept = np.random.default_rng(999 + seed).random(values.shape) > 0.5
        found = whiteness(values, kept if holes else everywhere(values))
        assert found is not None
        above += abs(found.largest) > found.bound
        share.append(abs(found.largest) / found.bound)
    assert above <= 7
    assert np.mean(share) > 0.6


def test_correlations_are_those_of_the_definition() -> None:
    """Small, with holes, pair by pair; and the centre is one."""
    values = noise(1, 2, 6, 11)
    kept = np.random.default_rng(2).random(values.shape) > 0.3
    found = whiteness(values, kept)
    assert found is not None
    centred = np.where(kept, values, 0)
    centred -= centred.sum((1, 2), keepdims=True) / kept.sum((1, 2), keepdims=True)
    centred = np.where(kept, centred, 0)
    variance = (centred**2).sum() / kept.sum()
    assert found.deviation == pytest.approx(variance**0.5)
    assert found.correlation[REACH, REACH] == pytest.approx(1)
    for down, across in ((0, 1), (2, -3), (5, 8), (-4, 2)):
        products, pairs = 0.0, 0
        for c, y, x in np.argwhere(kept):
            v, u = y + down, x + across
            if 0 <= v < 6 and 0 <= u < 11 and kept[c, v, u]:
                products, pairs = products + centred[c, y, x] * centred[c, v, u], pairs + 1
        expected = products / pairs / variance
        assert found.correlation[REACH + down, REACH + across] == pytest.approx(expected)
    assert np.isnan(found.correlation[0, REACH])  # no two pixels are eight rows apart


def test_structure_is_found_where_it_is() -> None:
    """Noise that repeats three rows down; and a wave far weaker than the noise."""
    values = noise(3, 1, 64, 64)
    found = whiteness(values + np.roll(values, 3, axis=1), everywhere(values))
    assert found is not None
    assert found.lag == (3, 0)
    assert found.largest == pytest.approx(0.5, abs=0.05)
    assert found.verdict.startswith("not white")

    wave = 0.03 * np.sin(np.arange(256) / 5)
    found = whiteness(noise(4, 3, 256, 256) + wave, everywhere(noise(4, 3, 256, 256)))
    assert found is not None
    assert found.bound < abs(found.largest) < STRUCTURE
    assert found.verdict.startswith("nearly white")


def test_no_residual_has_no_whiteness() -> None:
    values = np.full((1, 20, 20), 0.25)
    assert whiteness(values, everywhere(values)) is None
    assert whiteness(noise(0, 1, 20, 20), ~everywhere(values)) is None
