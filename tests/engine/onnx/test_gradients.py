"""Single operations of the backward pass against torch and NumPy."""

import numpy as np
import pytest
import torch

from flashdip.engine.onnx.gradients import depth_to_space, from_phases, strided, to_phases, unpad
from flashdip.engine.onnx.graph import Graph
from tests.engine.onnx.cases import run


@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("margin", [1, 2, 4])
def test_unpad_is_the_adjoint_of_padding(margin: int, mode: str) -> None:
    """From the smallest map that can be reflected on, along both axes."""
    for side in range(margin + 1, 4 * margin + 4):
        x = torch.arange(6.0 * side).view(1, 2, 3, side).requires_grad_()
        wide = torch.nn.functional.pad(x, (margin, margin, 0, 0), mode=mode)
        dy = torch.cos(torch.arange(float(wide.numel()))).view(wide.shape)
        (expected,) = torch.autograd.grad(wide, x, dy)
        graph = Graph("unpad")
        given = graph.input("dy", dy.shape)
        turned = given.transpose(0, 1, 3, 2)
        name = "edge" if mode == "replicate" else mode
        graph.output(unpad(given, 3, margin, name), "columns")
        graph.output(unpad(turned, 2, margin, name), "rows")
        columns, rows = run(graph, {"dy": dy})
        torch.testing.assert_close(columns, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows.transpose(2, 3), expected, rtol=1e-6, atol=1e-6)


def test_depth_to_space_is_onnxs() -> None:
    x = torch.arange(1.0 * 4 * 3 * 5 * 7).view(1, 12, 5, 7)
    graph = Graph("phases")
    value = graph.input("x", x.shape)
    graph.output(depth_to_space(value), "own")
    graph.output(graph.node("DepthToSpace", value, blocksize=2), "onnx")
    assert torch.equal(*run(graph, {"x": x}))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_stride_of_two_is_a_stride_of_one_over_phases(size: int) -> None:
    """Each tap of a kernel is one pixel of one phase; the adjoint brings it back."""
    seen, half = strided(size), (size + 1) // 2
    weight = 1 + torch.arange(6.0 * size * size).view(2, 3, size, size)
    graph = Graph("phases")
    value = graph.input("weight", weight.shape)
    pixels = to_phases(value, seen)
    graph.output(pixels, "pixels")
    graph.output(from_phases(pixels, seen), "taps")
    found, again = run(graph, {"weight": weight})
    even = np.pad(weight.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)))
    phases = [even[:, :, a::2, b::2].reshape(2, 3, half**2) for a in (0, 1) for b in (0, 1)]
    assert torch.equal(found, torch.from_numpy(np.stack(phases, 2)))
    assert torch.equal(again, weight)
