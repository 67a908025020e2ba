"""Memory that tensors share: where they lie, and that no launch reads what is gone."""

import pytest
import torch
from torch import Tensor

from flashdip.engine.backends import plans
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Downsample
from flashdip.engine.problems import Problem
from flashdip.kernels.fused import memory
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.memory import Memory, Place, total
from flashdip.kernels.fused.program import Program
from flashdip.kernels.fused.tiles import ARCHITECTURES
from tests.kernels.fused.test_program import problem, step_of

HALF, SINGLE = torch.float16, torch.float32
# A filter, a thin skip and one without; what does not fold; wide skips and pooling.
NETWORKS = (
    SkipConfig(inputs=3, down=(5, 6), skip=(4, 0), upsample=("bilinear", "nearest")),
    SkipConfig(inputs=3, down=(5, 6), skip=(0, 9), pad="zero", kernel_up=(1, 5), act="ELU"),
    SkipConfig(
        inputs=3,
        down=(5, 6),
        skip=(9, 8),
        kernel_skip=(1, 3),
        upsample=("bilinear", "nearest"),
        downsample=("max", "avg"),
    ),
)


def using(*tensors: Tensor) -> Launch:
    """A launch that is never run."""
    arguments: dict[str, Tensor | int | float | None] = dict(
        zip(map(str, range(len(tensors))), tensors, strict=True)
    )
    return Launch("", None, (1, 1, 1), arguments, {})


def overlap(one: Place, other: Place) -> bool:
    """Whether two tensors have a byte in common."""
    return one.offset < other.end and other.offset < one.end


def test_what_is_never_needed_together_shares_memory() -> None:
    """By hand: a chain of maps, a tensor that stays, a view of one, and one that nobody reads."""
    asked = Memory(torch.device("meta"))
    stays = asked.keep((10,), SINGLE)
    a, b, c = (asked.share((100,), HALF) for _ in range(3))
    asked.share((1000,), SINGLE)
    launches = [using(a, stays), using(a.view(10, 10)[2:], b), using(b, c), using(c)]
    places = asked.places(launches)
    assert [place.size for place in places] == [256, 256, 256, 256, 4096]
    assert [place.needed for place in places] == [None, *map(range, (0, 1, 2, 0), (2, 3, 4, 0))]
    assert not any(overlap(places[0], other) for other in places[1:])
    assert overlap(places[1], places[3])
    assert not overlap(places[1], places[2]) and not overlap(places[2], places[3])
    assert total(places) == 256 + 4096

    handed = Memory(torch.device("cpu"), places)
    kept = handed.keep((10,), SINGLE)
    shared = [handed.share((100,), HALF) for _ in range(3)]
    assert not kept.any() and handed.block.numel() == total(places)
    shared[0].fill_(1.0)
    assert torch.equal(shared[0], shared[2]) and not kept.any() and not shared[1].any()


def test_a_plan_takes_as_much_as_its_busiest_launch_needs() -> None:
    """At most 1 % more than what is there at once; what is there at once lies apart."""
    config = FitConfig(stop=("es-wmv", "es-emv"))
    program = plans.planned(config, (512, 512), HALF, ARCHITECTURES["sm_90"])
    places, kept = program.places, 0
    needed = [0] * len(program.sequence)
    for place in places:
        if place.needed is None:
            kept += place.size
        for time in place.needed or ():
            needed[time] += place.size
    assert kept + max(needed) <= program.memory <= 1.01 * (kept + max(needed))
    assert all(place.needed is None or len(place.needed) for place in places)
    for i, one in enumerate(places):
        for other in places[:i]:
            together = one.needed is None or other.needed is None or other.meets(one.needed)
            assert not (together and overlap(one, other))


def poison(program: Program, now: int) -> None:
    """Overwrite all memory but what an earlier launch left for this one or a later one."""
    block = program.plan.memory.block
    gone = torch.ones(len(block), dtype=torch.bool)
    for place in program.places:
        if place.needed is None or place.needed.start < now < place.needed.stop:
            gone[place.offset : place.end] = False
    block[gone] = 255  # NaN in every storage type


def run(step: TritonStep, *, poisoned: bool) -> dict[str, Tensor]:
    """Run a step and a reading; return all that is left of them."""
    program = step.program
    assert program.reading is not None and not program.after
    for now, launch in enumerate(program.sequence):
        if poisoned:
            poison(program, now)
        launch()
    left = {"output": step.watch.output, "average": step.watch.average, "loss": step.watch.loss}
    left |= step.trained | {"counters": program.counters, "board": program.reading.state.board}
    return left | {f"good {name}": tensor for name, tensor in program.reading.good.items()}


def apart(placed: list[Place], start: int, size: int, needed: range) -> Place:
    """Put each tensor behind all others."""
    return Place(max((place.end for place in placed), default=start), size, needed)


@pytest.mark.parametrize(
    ("network", "fits"),
    list(zip(NETWORKS, (2, 1, 1), strict=True)),
    ids=["folded", "unfolded", "wide"],
)
def test_sharing_memory_changes_no_bit(
    network: SkipConfig, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each tensor had memory of its own, though all is overwritten when it may."""
    config = FitConfig(network=network, stop=("es-wmv", "es-emv"), window=2, iterations=20)
    shared = step_of(config, problem(fits, (16, 18)), HALF)
    monkeypatch.setattr(memory, "_fit", apart)
    own = step_of(config, problem(fits, (16, 18)), HALF)
    assert shared.program.memory < own.program.memory
    found, exact = run(shared, poisoned=True), run(own, poisoned=False)
    assert found["output"].isfinite().all()
    for name, tensor in exact.items():
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name


def test_sharing_memory_where_images_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between image and gradient and in the reading; without perturbation, the input stays."""
    network = SkipConfig(inputs=2, outputs=1, down=(4,), skip=2, upsample="nearest")
    config = FitConfig(network=network, perturbation=0.0, stop=("es-emv",), iterations=20)
    operator = Downsample(2)
    image = torch.rand(1, 1, 16, 18, generator=torch.Generator().manual_seed(0))
    of = Problem(operator(image), (1, 16, 18), operator=operator)
    shared = step_of(config, of, SINGLE)
    monkeypatch.setattr(memory, "_fit", apart)
    own = step_of(config, of, SINGLE)
    found, exact = run(shared, poisoned=True), run(own, poisoned=False)
    for name, tensor in exact.items():
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name
