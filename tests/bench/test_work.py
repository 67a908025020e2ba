"""Counted work is what torch counts, what the algebra saves, and what the shares are taken of."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashdip.bench import ceilings, work
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import published_options
from flashdip.bench.published import skip
from flashdip.bench.work import Work
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.presets import PRESETS

SIZE = (64, 96)


@pytest.mark.parametrize("key", PRESETS, ids="-".join)
def test_unfolded_operations_are_those_that_torch_counts(key: tuple[str, str]) -> None:
    """Forward and backward of the published network, without the gradient of its input."""
    config = PRESETS[key].config
    network = skip(config.network.inputs, 3, **published_options(config.network)).to("meta")
    size = config.network.network_size(*SIZE)
    with FlopCounterMode(display=False) as counter:
        y = network(torch.empty(1, config.network.inputs, *size, device="meta"))
        y.sum().backward()
    counts = work.count(config, SIZE, "fp32", folded=False)
    layers = [each for key, each in counts.items() if key[1]]
    assert sum(each.flops for each in layers) == counter.get_total_flops()


def test_folding_saves_five_ninths_of_what_comes_from_below() -> None:
    config = FitConfig(network=SkipConfig(inputs=8, down=(16, 32), skip=4, up=(16, 32)))
    folded, plain = (work.count(config, (64, 64), "fp32", folded=f) for f in (True, False))
    for level, side, shallow, deep, outputs in ((0, 64, 4, 32, 16), (1, 32, 4, 32, 32)):
        key = (f"level{level}.up", "forward")
        products = side * side * 9 * outputs
        assert plain[key].flops == 2 * products * (shallow + deep)
        assert folded[key].flops == 2 * (products * shallow + products * deep * 4 // 9)
    rest = {name: each for name, each in plain.items() if ".up" not in name[0]}
    assert rest == {name: folded[name] for name in rest}


def test_an_odd_join_is_not_folded() -> None:
    config = FitConfig(network=SkipConfig(down=(8, 8)))
    network = replace(config.network, kernel_up=5)
    config = replace(config, network=network)
    assert work.count(config, (32, 32), "fp32") == work.count(
        config, (32, 32), "fp32", folded=False
    )


def test_bytes_of_a_convolution() -> None:
    """1x1, 8 to 16 channels at 32x32, in 16 bits; its input is differentiated by."""
    config = FitConfig(network=SkipConfig(inputs=8, down=(16,), skip=0))
    counts = work.count(config, (32, 32), "bf16")
    pixels, weights = 32 * 32, 16 * 16
    assert counts["level0.one", "forward"].bytes == 2 * (2 * 16 * pixels + weights)
    backward = 2 * (2 * 16 * pixels + 2 * 16 * pixels + weights) + 4 * weights
    assert counts["level0.one", "backward"].bytes == backward
    first = counts["level0.down", "backward"]  # of the network's input: no gradient of that
    assert first.flops == 2 * 16 * 16 * 9 * 8 * 16
    assert first.bytes == 2 * (2 * 16 * 256 + 8 * pixels + 9 * 8 * 16) + 4 * 9 * 8 * 16


def test_fits_side_by_side_are_so_many_times_the_work() -> None:
    one, four = (work.total(work.count(FitConfig(), (64, 64), "fp32", fits=f)) for f in (1, 4))
    assert four == Work(4 * one.flops, 4 * one.bytes)


def test_the_roof_is_the_higher_of_two() -> None:
    limits = Ceilings(copy=10.0, product={"fp32": 100.0, "bf16": 1000.0})
    assert Work(500, 20).roof(limits, "fp32") == 5.0
    assert Work(500, 20).roof(limits, "bf16") == 2.0
    counts = {("a", ""): Work(500, 20), ("b", ""): Work(0, 30)}
    assert work.roof(counts, limits, "fp32") == 8.0


def test_ceilings_are_the_best_of_several_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.1, 9.0, 2.0, 4.0, 4.0, 4.0] * 2)
    monkeypatch.setattr(ceilings, "clock", lambda work, **options: next(taken))
    found = ceilings.ceilings(torch.device("cpu"), ["fp32"], copied=1 << 20, side=64)
    assert found.copy == 2 * (1 << 20) / 2.0
    assert found.product == {"fp32": 2 * 64**3 / 2.0}


def test_ceilings_are_measured() -> None:
    found = ceilings.ceilings(torch.device("cpu"), ["bf16"], copied=1 << 20, side=32, sample=1e-4)
    assert 1e6 < found.copy < 1e13
    assert 1e4 < found.product["bf16"] < 1e15
    assert math.isfinite(found.record()["copy"])
