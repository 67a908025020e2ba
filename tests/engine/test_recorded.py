"""Steps that are recorded and repeated: the same bits as operation by operation."""

import gc
import itertools
import random
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flashdip.engine.backends import NATIVE, REFERENCE
from flashdip.engine.backends.arena import Storage, arrange
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.recorded import Recorder
from flashdip.engine.backends.repeated import Recording
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Downsample, Each
from flashdip.engine.presets import PRESETS
from flashdip.engine.problems import Problem

CPU = torch.device("cpu")
NARROW = FitConfig(
    network=SkipConfig(inputs=8, down=(16, 16, 32), skip=(0, 4), upsample=("bilinear", "nearest"))
)
WIDE = replace(NARROW, network=SkipConfig(inputs=4, down=(64, 64), skip=4))  # nine products
ZERO = replace(NARROW, network=SkipConfig(inputs=8, down=(16, 32), pad="zero"))
CORNERS = replace(
    NARROW,
    network=SkipConfig(inputs=4, down=(8, 8), up=(4, 6), kernel_down=5, act="ELU", pad="zero"),
    average=None,
    perturbation=0.0,
)


def prepared(config: FitConfig, records: bool, precision: str = "fp32", fits: int = 1) -> EagerStep:
    """A step whose picture is of an odd size, on an observation of half the size."""
    generator = torch.Generator().manual_seed(4)
    problem = Problem(
        torch.rand(fits, 3, 17, 22, generator=generator), (3, 34, 44), operator=Downsample(2)
    )
    step = NATIVE.prepare(problem, config, CPU, precision, None)
    assert isinstance(step, EagerStep) and step.records
    step.records = records
    return step


def state(step: EagerStep) -> dict[str, Tensor]:
    """Everything that an iteration leaves behind."""
    return {
        **step.trained,
        "gradients": step.gradients,
        "output": step.watch.output,
        "average": step.watch.average,
        "loss": step.watch.loss,
    }


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config", [NARROW, WIDE, ZERO, CORNERS], ids=["narrow", "wide", "zero", "corners"]
)
def test_the_bits_are_the_same(config: FitConfig, precision: str, fits: int) -> None:
    """Also where all the recording's own memory holds NaN before each iteration."""
    eager, recorded = (prepared(config, how, precision, fits) for how in (False, True))
    for _ in range(5):
        if recorded.recording is not None:
            recorded.recording.arena.fill_(255)
        eager.advance(1)
        recorded.advance(1)
        for name, expected in state(eager).items():
            assert torch.equal(state(recorded)[name], expected), name
    assert eager.recording is None and recorded.recording is not None


def test_another_fit_takes_a_slot_and_one_goes_back() -> None:
    """What changes from outside, in place, is seen."""
    eager, recorded = (prepared(NARROW, how) for how in (False, True))
    for step in (eager, recorded):
        step.advance(3)
        step.slots[0].start(seed=9)
        step.advance(2)
    assert torch.equal(eager.parameters, recorded.parameters)


def test_an_operator_whose_gradient_lies_otherwise_takes_a_slot() -> None:
    """With channels last, where the one that was recorded had planes."""

    def planes(x: Tensor) -> Tensor:
        return x * 1.0

    def last(x: Tensor) -> Tensor:
        return (x.movedim(1, 3) @ torch.eye(3)).movedim(3, 1)

    truth = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    steps = []
    for records in (False, True):
        operators = Each([planes]), last
        first, second = (Problem(truth, (3, 24, 24), operator=how) for how in operators)
        step = NATIVE.prepare(first, NARROW, CPU, "fp32", None)
        assert isinstance(step, EagerStep)
        step.records = records
        step.advance(3)
        step.slots[0].replace(second, seed=9, truth=None)
        step.advance(3)
        steps.append(step)
    eager, recorded = steps
    assert recorded.recording is not None
    torch.testing.assert_close(recorded.gradients, eager.gradients, rtol=1e-4, atol=1e-6)


def test_it_goes_with_its_step() -> None:
    """No cycle keeps its memory until garbage is collected."""
    step = prepared(NARROW, True)
    step.advance(3)
    recording = weakref.ref(step.recording)
    gc.disable()
    try:
        del step
        assert recording() is None
    finally:
        gc.enable()


def test_it_is_recorded_where_that_pays() -> None:
    """In a longer fit of smaller maps, by the native backend; of large ones some are recalled."""

    def records(config: FitConfig, side: int = 64, backend: object = NATIVE) -> bool:
        problem = Problem(torch.zeros(1, 3, side, side), (3, side, side))
        step = backend.prepare(problem, config, CPU, "fp32", None)  # type: ignore[attr-defined]
        assert isinstance(step, EagerStep)
        assert step.recalls == (backend is NATIVE and side == 256)
        return step.records

    quick = PRESETS["denoise", "quick"].config
    assert records(quick)
    assert not records(quick, backend=REFERENCE)
    assert not records(replace(quick, iterations=99))
    published = PRESETS["denoise", "published-denoise"].config
    assert records(published) and not records(published, side=256)


def test_a_fit_that_recalls_is_the_same() -> None:
    """The first image has the same bits, and the next ones differ by rounding."""
    config = replace(PRESETS["denoise", "published-denoise"].config)
    config = replace(config, network=replace(config.network, down=(16, 24), scale="one"))
    steps = [prepared(replace(config, iterations=100), False) for _ in range(2)]
    steps[1].recalls = True
    for at in range(3):
        for step in steps:
            step.advance(1)
        one, other = (step.slots[0].image() for step in steps)
        if at == 0:
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_parts_are_repeated_with_what_they_are_given() -> None:
    """Views, changes in place and tensors from elsewhere; results are not written to again."""
    scale = torch.tensor(2.0)

    def first(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[1:].copy_(x[:-1] * scale)
        y.view(-1)[0] += 1
        return y

    def second(y: Tensor, z: Tensor) -> Tensor:
        return torch.cat([y.T, z.expand(2, 3)], 1).contiguous()

    x, z = torch.rand(3, 2), torch.rand(1, 3)
    recorder = Recorder()
    with recorder.part(x) as kept:
        y = first(x)
        kept.append(y)
    with recorder.part(z) as kept:
        kept.append(second(y, z))
    del y, kept
    recording = Recording(recorder)
    results = []
    for factor in (2.0, 5.0):
        scale.fill_(factor)
        x, z = torch.rand(3, 2), torch.rand(1, 3)
        expected = first(x), second(first(x), z)
        results.append((*recording.repeat(0, x), *recording.repeat(1, z), *expected))
    for own_first, own_second, first_expected, second_expected in results:
        assert torch.equal(own_first, first_expected)
        assert torch.equal(own_second, second_expected)


class Living(TorchDispatchMode):
    """Counts results that live while operations are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: list[StorageWeakRef] = []
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.most = max(self.most, sum(not each.expired() for each in self.results))
        result = function(*args, **(kwargs or {}))
        self.results.append(StorageWeakRef(result.untyped_storage()))
        return result


def test_large_results_are_let_go_of() -> None:
    """After their last use, in the part that made them or in a later one."""
    x = torch.rand(1 << 19)

    def chain(y: Tensor) -> Tensor:
        for _ in range(6):
            y = y * 2
        return y

    recorder = Recorder()
    with recorder.part(x):
        y = chain(x)
    with recorder.part() as kept:
        kept.append(chain(y))
    del y, kept
    recording = Recording(recorder)
    with Living() as living:
        recording.repeat(0, x)
        (y,) = recording.repeat(1)
    assert torch.equal(y, chain(chain(x)))
    assert len(living.results) >= 12 and living.most == 1
    del y
    assert all(each.expired() for each in living.results)


def test_a_later_part_gives_back_what_an_earlier_one_made() -> None:
    """In memory of its own, large as it is; and what indexing puts into a tensor is repeated."""
    x, index = torch.rand(1, 1 << 19), torch.tensor([3, 5])
    recorder = Recorder()
    with recorder.part(x):
        y = x * 2
        y[:, index] = 5.0
    with recorder.part() as kept:
        kept.append(y)
    expected = y.clone()
    del y, kept
    recording = Recording(recorder)
    for _ in range(2):
        recording.repeat(0, x)
        (y,) = recording.repeat(1)
        assert torch.equal(y, expected)


def test_what_writes_something_else_is_not_used() -> None:
    """torch's norm does, of a map whose channels lie between its lines."""
    x = torch.rand(1, 6, 8, 5).transpose(1, 2)

    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, None, None, training=True)

    recorder = Recorder()
    with recorder.part(x) as kept:
        kept.append(norm(x))
    recording = Recording(recorder)
    for _ in range(2):
        x = torch.rand(1, 6, 8, 5).transpose(1, 2)
        assert torch.equal(recording.repeat(0, x)[0], norm(x))


def test_memory_is_shared_by_what_is_not_used_at_once() -> None:
    generator = random.Random(3)
    storages = []
    for _ in range(60):
        first = generator.randrange(100)
        storages.append(
            Storage(generator.randrange(1, 5000), first, first + generator.randrange(9))
        )
    total = arrange(storages)
    for one, other in itertools.combinations(storages, 2):
        if one.first <= other.last and other.first <= one.last:
            assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset
    assert all(storage.offset % 64 == 0 for storage in storages)
    assert max(s.offset + s.size for s in storages) <= total < sum(s.size for s in storages) / 3


def test_recording_loads_no_compiler() -> None:
    """Which would take seconds and some 40 MB."""
    code = """
import sys, torch
from flashdip.engine.backends import NATIVE
from flashdip.engine.presets import PRESETS
from flashdip.engine.problems import Problem
problem = Problem(torch.zeros(1, 3, 16, 16), (3, 16, 16))
config = PRESETS["denoise", "quick"].config
step = NATIVE.prepare(problem, config, torch.device("cpu"), "fp32", None)
step.advance(3)
assert step.recording is not None
assert not {"sympy", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
