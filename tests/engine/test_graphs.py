"""Repetitions composed of graphs; without a GPU, of what stands for them."""

import pytest
import torch

from flashdip.engine.backends.graphs import Repeated, compose, needed


@pytest.mark.parametrize("sizes", [(10, 4, 1), (4, 1), (1,)])
def test_any_count_is_composed(sizes: tuple[int, ...]) -> None:
    """Of captured sizes only, and done exactly so often."""
    done: list[int] = []
    repeated = Repeated(lambda: done.append(1), torch.device("cpu"), sizes)
    for count in range(25):
        done.clear()
        repeated(count)
        assert sum(done) == count
        assert set(compose(count, sizes)) <= set(sizes)


def test_few_graphs_are_captured_and_few_replayed() -> None:
    assert compose(29) == [10, 10, 4, 4, 1]
    assert needed((10, 0)) == [10, 1]
    assert needed((50, 7)) == [10, 4, 1]
    assert needed((1, 0)) == [1]
