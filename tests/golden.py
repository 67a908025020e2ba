"""Known answers of the published network in float64: `golden.json`, and the formulas behind it.

The numbers are outputs and gradients of the published network code itself, with parameters, input
and target made by formula, so that any implementation can be held against them without the
published code or its weights. Outputs are kept as 97 pixels of each channel and one weighted sum
over all of them; each parameter's gradient as its 2-norm and one weighted sum.

The weights by formula condition the network badly: an 80-bit evaluation of the published network
shows that the known outputs are themselves right to between 5e-12 and 2e-7 only, by the case. So
each case holds the largest deviation (`*_error`) that six ways to evaluate the same network in
float64 showed (threads, memory layout, the order of the sums in convolutions and norms), and the
checks allow four times that, or 1e-10 of outputs and 1e-8 of gradients where it is less. With
weights as a fit starts from, such evaluations differ by 1e-13: `live` makes that comparison, in
which 1e-10 and 1e-8 hold for every topology, odd sizes included.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OUTPUT_TOLERANCE = 1e-10
GRADIENT_TOLERANCE = 1e-8
# Another correct order of rounding may lie on the other side, and somewhat further out.
MARGIN = 4
SAMPLES = 97
# A prime that divides no size of a known answer: samples visit odd and even rows and columns alike.
STRIDE = 1009


@dataclass(frozen=True)
class Golden:
    """One published topology and what it computes at one size.

    Attributes:
        options: Keyword arguments of the published `skip`; what is absent has its default.
        shapes: Shape of each parameter, in the published module's order.
        size: (H, W) of the input and the output.
        loss: mean((y - target)^2).
        grad_norm: 2-norm of the gradient of the loss, for each parameter.
        grad_probe: Sum of that gradient times cos(0.3 k), k counting its flattened entries.
        output_sample: [C, 97], the output at `sample_positions` of each channel.
        output_probe: Sum of the flattened output times cos(0.3 k).
        output_error: Rounding error seen in outputs; `probe_error` in their weighted sum, and
            `gradient_error` in the numbers of a gradient, relative to its layer's largest.
    """

    options: dict[str, Any]
    shapes: list[tuple[int, ...]]
    size: tuple[int, int]
    loss: float
    grad_norm: list[float]
    grad_probe: list[float]
    output_sample: Tensor
    output_probe: float
    output_error: float
    probe_error: float
    gradient_error: float

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels of the network."""
        return self.options["num_input_channels"], self.options["num_output_channels"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the output."""
        return self.channels[1], *self.size


@dataclass(frozen=True)
class GoldenDownsample:
    """What the published downsampler, size-preserving, makes of `downsample_input()`.

    Attributes:
        kernel: "lanczos2", "lanczos3", "gauss12" or "gauss1sq2".
        factor: How many input pixels a side go into one output pixel.
        phase: 0.5 for the lanczos kernels, 0 for the others.
        shape: (C, H, W) of the output.
        output_sample: [C, up to 97], the output at `sample_positions` of each channel.
        output_probe: Sum of the flattened output times cos(0.3 k).
    """

    kernel: str
    factor: int
    phase: float
    shape: tuple[int, int, int]
    output_sample: Tensor
    output_probe: float
    output_error: float = 0.0
    probe_error: float = 0.0


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())
    return content


def cases() -> list[str]:
    """Names of the network cases, `topology/HxW`."""
    return list(_content()["networks"])


def case(name: str) -> Golden:
    """The network case called `name`."""
    entry = _content()["networks"][name]
    height, width = map(int, name.rpartition("/")[2].split("x"))
    return Golden(
        options=dict(entry["options"]),
        shapes=[tuple(shape) for shape in entry["shapes"]],
        size=(height, width),
        loss=entry["loss"],
        grad_norm=entry["grad_norm"],
        grad_probe=entry["grad_probe"],
        output_sample=torch.tensor(entry["output_sample"], dtype=torch.float64),
        output_probe=entry["output_probe"],
        output_error=entry["output_error"],
        probe_error=entry["probe_error"],
        gradient_error=entry["gradient_error"],
    )


def downsample_cases() -> list[str]:
    """Names of the downsampler cases, `kernel/xFACTOR`."""
    return list(_content()["downsamplers"])


def downsample_case(name: str) -> GoldenDownsample:
    """The downsampler case called `name`."""
    entry = _content()["downsamplers"][name]
    kernel, _, factor = name.partition("/x")
    channels, height, width = entry["shape"]
    return GoldenDownsample(
        kernel=kernel,
        factor=int(factor),
        phase=0.5 if kernel.startswith("lanczos") else 0.0,
        shape=(channels, height, width),
        output_sample=torch.tensor(entry["output_sample"], dtype=torch.float64),
        output_probe=entry["output_probe"],
    )


def _count(shape: Sequence[int]) -> Tensor:
    """0, 1, 2, ... over the entries of `shape`, flattened."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64)


def layers(shapes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Indices (weight, bias) of each layer: a convolution, or a norm (two vectors).

    Every known answer has convolution biases, so parameters come in pairs.
    """
    assert len(shapes) % 2 == 0
    return [(i, i + 1) for i in range(0, len(shapes), 2)]


def parameters(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Parameters by formula, float64, of the given shapes in the published order.

    With s = sin(0.6180339887 k + i) over the flattened entries k of parameter i: convolution
    weights are s / sqrt(entries of one output filter), norm weights 1 + 0.1 s, biases 0.1 s.
    """
    made = []
    for weight, bias in layers(shapes):
        for i in (weight, bias):
            s = torch.sin(0.6180339887 * _count(shapes[i]) + i)
            if i == bias:
                s = 0.1 * s
            elif len(shapes[i]) == 4:
                s = s / torch.Size(shapes[i][1:]).numel() ** 0.5
            else:
                s = 1 + 0.1 * s
            made.append(s.reshape(torch.Size(shapes[i])))
    return made


def network_input(channels: int, height: int, width: int) -> Tensor:
    """Input by formula, float64, [C, H, W], in [0, 0.1]."""
    return 0.1 * downsample_input(channels, height, width)


def target(channels: int, height: int, width: int) -> Tensor:
    """Target by formula, float64, [C, H, W], in [0.1, 0.9]."""
    shape = (channels, height, width)
    return (0.5 + 0.4 * torch.cos(0.01 * _count(shape))).reshape(shape)


def downsample_input(channels: int = 3, height: int = 64, width: int = 96) -> Tensor:
    """Input of the downsampler cases, float64, [C, H, W], in [0, 1]."""
    shape = (channels, height, width)
    k = _count(shape)
    return (0.5 + 0.5 * torch.sin(0.7548776662 * k + 0.1 * torch.sqrt(k))).reshape(shape)


def sample_positions(pixels: int) -> Tensor:
    """Flattened positions, in a channel of `pixels` pixels, of the output samples."""
    return torch.arange(min(SAMPLES, pixels)) * STRIDE % pixels


def sample(y: Tensor) -> Tensor:
    """The output samples, [C, up to 97], of an output [C, H, W]."""
    return y.flatten(1)[:, sample_positions(y[0].numel())]


def probe(y: Tensor) -> float:
    """Sum of the flattened entries of `y`, as float64, times cos(0.3 k)."""
    return float((y.detach().double().flatten() * torch.cos(0.3 * _count(y.shape))).sum())


def check_output(
    golden: Golden | GoldenDownsample, y: Tensor, *, tolerance: float | None = None
) -> None:
    """Assert that an output, [C, H, W] or [1, C, H, W] in float64, agrees with the known one.

    Args:
        golden: The known answer.
        y: What came out.
        tolerance: Largest deviation of a pixel; None for 1e-10 or the case's rounding error. The
            published downsampler keeps its kernel in float32: one that keeps it in float64, or
            applies it separably, needs 1e-8 here, and agrees with
            `flashdip.bench.published.downsampler(..., dtype=torch.float64)` much more closely.
    """
    if y.ndim == 4:
        assert len(y) == 1
        y = y[0]
    assert y.dtype == torch.float64
    assert y.shape == golden.shape, f"output is {tuple(y.shape)}, published {golden.shape}"
    limit = max(OUTPUT_TOLERANCE, MARGIN * golden.output_error)
    limit_probe = max(OUTPUT_TOLERANCE, MARGIN * golden.probe_error)
    if tolerance is not None:
        limit, limit_probe = tolerance, 10 * tolerance
    error = float((sample(y.detach()) - golden.output_sample).abs().max())
    assert error <= limit, f"output is off by {error:.3e}, allowed {limit:.3e}"
    error = abs(probe(y) - golden.output_probe)
    assert error <= limit_probe, f"weighted sum is off by {error:.3e}, allowed {limit_probe:.3e}"


def check_gradients(golden: Golden, grads: Sequence[Tensor | None]) -> None:
    """Assert that gradients, in the published order, agree to 1e-8 of their layer's largest.

    Or to the case's rounding error. A layer is a convolution or a norm, its weight and its bias
    together: the gradient of a bias that a norm follows is rounding noise around zero, so that
    only the scale of the weight beside it says how small is small. For such a bias None counts
    as zero.
    """
    limit = max(GRADIENT_TOLERANCE, MARGIN * golden.gradient_error)
    assert len(grads) == len(golden.shapes)
    for pair in layers(golden.shapes):
        scale = max(golden.grad_norm[i] for i in pair)
        for i in pair:
            grad = grads[i]
            if grad is None:
                assert golden.grad_norm[i] <= 1e-12 * scale, f"parameter {i} has no gradient"
                continue
            shape = golden.shapes[i]
            assert grad.numel() == torch.Size(shape).numel(), f"parameter {i}: not {shape}"
            found = {"norm": float(grad.double().norm()), "probe": probe(grad)}
            known = {"norm": golden.grad_norm[i], "probe": golden.grad_probe[i]}
            for kind, value in found.items():
                error = abs(value - known[kind]) / scale
                assert error <= limit, (
                    f"gradient {kind} of parameter {i} {shape} is off by {error:.3e} of its "
                    f"layer's, allowed {limit:.3e}"
                )


@dataclass(frozen=True)
class Live:
    """What `flashdip.bench.published` computes in float64 from weights as a fit starts from.

    Attributes:
        parameters: Detached, in the published order.
        z: Network input, [C, H, W].
        target: Target of the loss mean((y - target)^2), [C, H, W].
        output: [C, H, W].
        grads: Gradient of the loss for each parameter.
    """

    parameters: list[Tensor]
    z: Tensor
    target: Tensor
    output: Tensor
    grads: list[Tensor]

    def check(self, y: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Assert agreement: 1e-10 of the output, 1e-8 of each layer's largest gradient."""
        error = float((y.detach().reshape(self.output.shape) - self.output).abs().max())
        assert error <= OUTPUT_TOLERANCE, f"output is off by {error:.3e}"
        assert len(grads) == len(self.grads)
        for pair in layers([g.shape for g in self.grads]):
            scale = max(float(self.grads[i].abs().max()) for i in pair)
            for i in pair:
                known, grad = self.grads[i], grads[i]
                found = torch.zeros_like(known) if grad is None else grad.reshape(known.shape)
                error = float((found - known).abs().max()) / scale
                assert error <= GRADIENT_TOLERANCE, f"gradient {i} is off by {error:.3e}"


def live(options: Mapping[str, Any], size: tuple[int, int], *, seed: int = 0) -> Live:
    """Run the published network, with `options` of its `skip`, in float64 at `size` (H, W)."""
    from flashdip.bench.published import skip

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = skip(**options).double()
        # Away from the start, where all norm weights are 1 and all their biases 0.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        z = 0.1 * torch.rand(options["num_input_channels"], *size, dtype=torch.float64)
    y = network(z[None])[0]
    goal = target(*y.shape)
    parameters = list(network.parameters())
    grads = torch.autograd.grad((y - goal).square().mean(), parameters)
    return Live([p.detach() for p in parameters], z, goal, y.detach(), list(grads))
