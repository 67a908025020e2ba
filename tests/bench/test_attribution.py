"""Events go to the layer and pass they belong to, kernels to their launches, gaps to nobody."""

import pytest
import torch

from flashdip.bench import attribution, marks
from flashdip.bench.advice import advice
from flashdip.bench.attribution import NODE, OTHER, Event
from flashdip.bench.marks import PREFIX, READ, STEP
from flashdip.engine.errors import UnavailableError

EVENTS = [
    Event(STEP, 0, 100, own=7),  # 0
    Event(PREFIX + "perturb", 0, 10, 0, own=1),
    Event("aten::add", 1, 9, 1, own=8),
    Event(PREFIX + "level0.up", 10, 40, 0, own=2),  # 3
    Event("aten::relu", 11, 12, 3, sequence=5, own=1),  # makes no node: it shows the next number
    Event("aten::conv2d", 12, 38, 3, sequence=5, own=3),
    Event("aten::convolution", 13, 37, 5, sequence=5, own=20),
    Event(PREFIX + "head", 40, 50, 0, own=1),
    Event("aten::mm", 41, 49, 7, sequence=6, own=8),
    Event("aten::copy_", 50, 55, 0, sequence=7, own=5),
    Event(f"{NODE}: MmBackward0", 60, 70, 0, sequence=6, own=1),  # 10
    Event("aten::mm", 61, 69, 10, own=9),
    Event(f"{NODE}: ConvolutionBackward0", 70, 90, 0, sequence=5, own=2),
    Event("ConvolutionBackward0", 71, 89, 12, sequence=5, own=18),
    Event(f"{NODE}: CopyBackwards", 90, 92, None, sequence=7, own=2),  # on autograd's own thread
    Event(READ, 100, 120, own=20),  # 15
    Event("aten::_local_scalar_dense", 101, 102, 15, own=1),
]


def test_time_goes_to_layers_and_passes() -> None:
    assert attribution.by_layer(EVENTS) == {
        ("perturb", ""): 8,
        ("level0.up", "forward"): 24,
        ("level0.up", "backward"): 20,
        ("head", "forward"): 8,
        ("head", "backward"): 10,
        (OTHER, ""): 7,
    }


def test_a_number_that_two_layers_show_is_the_last_ones() -> None:
    """An operation without a node at the end of a layer shows the number of the next layer's."""
    events = [
        Event(PREFIX + "a", 0, 10),
        Event("aten::detach", 5, 6, 0, sequence=3, own=1),
        Event(PREFIX + "b", 10, 20),
        Event("aten::mul", 11, 12, 2, sequence=3, own=1),
        Event(f"{NODE}: MulBackward0", 20, 25, None, sequence=3, own=5),
    ]
    assert attribution.by_layer(events)["b", "backward"] == 5


def test_waits_are_counted_where_they_happen() -> None:
    steps, reads = (attribution.spans(EVENTS, name) for name in (STEP, READ))
    assert (steps, reads) == ([(0, 100)], [(100, 120)])
    assert attribution.waits(EVENTS, steps) == {}
    assert attribution.waits(EVENTS, reads) == {"aten::_local_scalar_dense": 1}
    wait = Event("cudaStreamSynchronize", 50, 51)
    assert attribution.waits([*EVENTS, wait], steps) == {"cudaStreamSynchronize": 1}


def kernel(name: str, start: float, end: float) -> Event:
    return Event(name, start, end, kernel=True)


KERNELS = [
    kernel("conv", 10, 20), kernel("adam", 22, 23), kernel("conv", 0, 8), kernel("adam", 8, 9),
    kernel("Memset", 9, 10),
]  # fmt: skip


def test_kernels_of_a_graph_go_to_launches_by_their_order() -> None:
    """Whatever order they were told in, and whatever else ran between them."""
    found = attribution.by_order(KERNELS, ["conv", "adam"], ["level0.up forward", "adam"])
    assert found == {"level0.up forward": 18, "adam": 2}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["conv", "adam", "conv"], "expected whole iterations of 3 kernels, got 4"),
        (["adam", "conv"], "expected kernel adam for a, got conv"),
        (["other"], "got 0"),
    ],
)
def test_kernels_in_another_order_are_not_guessed(names: list[str], said: str) -> None:
    with pytest.raises(UnavailableError, match=said):
        attribution.by_order(KERNELS, names, ["a", "b", "c"][: len(names)])


def test_gaps_between_kernels() -> None:
    """Those that overlap leave none; a range on the device is no kernel."""
    busy = [*KERNELS, kernel("side", 12, 21), kernel(STEP, 0, 23)]
    assert attribution.idle(busy) == (1, 6)
    assert attribution.idle([]) == (0.0, 0)


def test_names_are_nvtx_ranges_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed too where an operation fails."""
    told: list[str] = []
    monkeypatch.setattr("torch.cuda.nvtx.range_push", told.append)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: told.append("end"))
    with pytest.raises(KeyError), marks.span("a", torch.device("cuda")):
        raise KeyError
    with marks.span("b", torch.device("cpu")):
        pass
    assert told == ["a", "end"]


def record() -> dict[str, object]:
    def part(name: str, ms: float, roof: float | None) -> dict[str, object]:
        share = None if roof is None else roof / ms
        return {"name": name, "pass": "", "ms": ms, "roof_ms": roof, "roof_share": share}

    return {
        "step": {"profiled_ms": 100.0},
        "parts": [
            part("large but good", 50.0, 45.0),
            part("bad", 20.0, 1.0),
            part("unknown", 9.0, None),
            part("beyond", 2.0, 3.0),
        ],
        "gaps": {"ms": 10.0, "launches": 74.0},
        "waits": {"in_iterations": {}, "in_readings": {}},
    }


def test_what_can_gain_most_is_to_be_fixed_first() -> None:
    lines = advice(record())
    assert [line.split(":")[0] for line in lines] == [
        "1. bad", "2. gaps", "3. unknown", "4. large but good", "5. beyond"
    ]  # fmt: skip
    assert lines[0] == "1. bad: 20 ms, at 5.0% of its roof: at most 19 ms (19% of the step) to gain"
    assert "74 launches an iteration" in lines[1]
    assert "at most 0 ms" in lines[4]


def test_a_wait_comes_before_all_else() -> None:
    waiting = record() | {"waits": {"in_iterations": {"aten::_local_scalar_dense": 3}}}
    lines = advice(waiting)
    assert len(lines) == 5
    assert "must not: aten::_local_scalar_dense 3 times" in lines[0]
