"""The operations of the op sets by themselves: shapes of the published network, and odd ones.

Each is measured forward alone and with its gradients, in turns with `reference` in float32. Before
that its result and gradients are compared with `reference` in float64, and may be off by four times
what `reference` is off by, with everything in the precision that is judged, and a unit of it; and
by what a sum over the picture, made one by one in float32, rounds. Where a result is as close to
zero as that, it may come to lie on the other side of the kink of its LeakyReLU: no gradient comes
from there.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdip.bench import suite
from flashdip.bench.baselines import variant
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import WrongResultError
from flashdip.bench.measure import clock, measure
from flashdip.bench.work import Counter, Shape, Work, perturbation, update
from flashdip.engine.backends.base import DTYPES
from flashdip.engine.files import one_line
from flashdip.kernels import noise

BACK = "backward"
TIMES = 4.0  # what an error may be, over that of `reference`: sums are taken in other orders
SEED = 0


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        name: Of the case.
        op: Of the op set: "conv_norm_act", "join_conv", "head", "perturb" or "adam".
        channels: Of input and output; of a join, those that come from below and those of the
            result.
        size: Height and width of the input, of a join those of the result.
        options: Of the operation.
        kernel: Side of the kernel.
    """

    name: str
    op: str
    channels: tuple[int, int] = (128, 128)
    size: tuple[int, int] = (256, 256)
    options: tuple[tuple[str, Any], ...] = ()
    kernel: int = 3


def cases(size: int) -> list[Case]:
    """Return the operations of the published network at a picture of `size` pixels a side."""
    full, half = (size, size), (size // 2, size // 2)
    return [
        Case("skip 1x1, 32 to 4", "conv_norm_act", (32, 4), full, kernel=1),
        Case("down 3x3 /2, 32 to 128", "conv_norm_act", (32, 128), full, (("stride", 2),)),
        Case("conv 3x3, 128", "conv_norm_act", size=half),
        Case("conv 3x3, 128, odd sides", "conv_norm_act", size=(size // 2 + 1, size // 2 - 3)),
        Case("conv 1x1, 128", "conv_norm_act", size=full, kernel=1),
        Case("join bilinear, 4 + 128", "join_conv", size=full, options=(("up", "bilinear"),)),
        Case("join nearest, 4 + 128", "join_conv", size=full, options=(("up", "nearest"),)),
        Case("head, 128 to 3", "head", (128, 3), full, kernel=1),
        Case("perturb, 32", "perturb", (32, 32), full),
        Case("adam, 2.2 million", "adam"),
    ]


# Parameters that a norm takes away again: the bias before it, and a join's shift.
_WITHOUT_EFFECT = {"conv_norm_act": (1,), "join_conv": (1, 3)}
SKIP = 4  # channels of a join's skip
PARAMETERS = 2_217_831  # of the published network


class Operands:
    """A case's tensors, and how it is called.

    Args:
        case: The operation.
        device: Where.
        dtype: What activations are stored in.
        wide: Of parameters.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, wide: torch.dtype
    ) -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(SEED)

        def draw(*shape: int, to: torch.dtype = wide, around: float = 0.0) -> Tensor:
            # Rounded to 8 bits, so that every precision starts from equals.
            values = around + (0.1 if around else 1.0) * torch.randn(shape, generator=generator)
            return values.bfloat16().to(device, to)

        inputs, outputs = case.channels
        height, width = case.size
        self.options = dict(case.options)
        self.maps: list[Tensor] = []
        self.parameters: list[Tensor] = []
        match case.op:
            case "adam":
                state = [draw(1, PARAMETERS) for _ in range(4)]
                self.state = [*state[:3], state[3].square()]
            case "perturb":
                self.table = noise.table().to(device, wide)
                self.maps = [draw(1, inputs, height, width)]
            case "join_conv":
                below = draw(1, inputs, -(-height // 2), -(-width // 2), to=dtype)
                self.maps = [draw(1, SKIP, height, width, to=dtype), below]
                total = SKIP + inputs
                self.parameters = [
                    draw(1, total, around=1.0),
                    draw(1, total),
                    draw(1, outputs, total, case.kernel, case.kernel) / 32,
                    draw(1, outputs),
                    draw(1, outputs, around=1.0),
                    draw(1, outputs),
                ]
            case _:
                self.maps = [draw(1, inputs, height, width, to=dtype)]
                weight = draw(1, outputs, inputs, case.kernel, case.kernel)
                self.parameters = [weight / 16, draw(1, outputs)]
                if case.op == "conv_norm_act":
                    self.parameters += [draw(1, outputs, around=1.0), draw(1, outputs)]
        self.maps = [each.contiguous(memory_format=torch.channels_last) for each in self.maps]
        self.leaves = [each.requires_grad_() for each in (*self.maps, *self.parameters)]
        without = _WITHOUT_EFFECT.get(case.op, ())
        self.idle = {id(self.parameters[index]) for index in without}
        self.dy: Tensor | None = None  # of a result, [F, O, H, W]

    def forward(self, ops: Any) -> list[Tensor]:
        """Call the operation; return what it gives."""
        match self.case.op:
            case "adam":
                ops.adam(*self.state, step=3, rate=0.01, betas=(0.9, 0.999), eps=1e-8)
                return [self.state[0]]
            case "perturb":
                z = self.maps[0].detach()
                return [ops.perturb(z, self.table, [8], 1 / 30, self.dtype)]
        result = getattr(ops, self.case.op)(*self.maps, *self.parameters, **self.options)
        return [result]

    @property
    def differentiable(self) -> bool:
        """Whether there are gradients to measure."""
        return bool(self.parameters)

    def both(self, ops: Any) -> list[Tensor]:
        """Call the operation and differentiate it; return the result and the gradients.

        A gradient that is no more than rounding, because a norm takes away what it would change, is
        left out, as is one that an op set does not compute.
        """
        (y,) = self.forward(ops)
        if self.dy is None:
            self.dy = self.draw_dy(y.detach())
        effective = [leaf for leaf in self.leaves if id(leaf) not in self.idle]
        return [y.detach(), *torch.autograd.grad(y, effective, self.dy.to(y))]

    def draw_dy(self, y: Tensor, close: float = 0.0) -> Tensor:
        """Draw the gradient of a result; 0 where that is close to zero, in its own rms.

        Args:
            y: The result, [F, O, H, W].
            close: How close.
        """
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED + 1)).bfloat16()
        return torch.where(y.abs() < close * y.square().mean().sqrt(), 0.0, dy.to(y))

    def work(self, gradients: bool) -> dict[tuple[str, str], Work]:
        """Count what has to be done."""
        width = self.dtype.itemsize
        if self.case.op == "adam":
            return {("adam", ""): update(PARAMETERS)}
        shapes = [Shape(*each.shape[1:]) for each in self.maps]
        if self.case.op == "perturb":
            return {("perturb", ""): perturbation(shapes[0], width)}
        names = {id(each): "op" for each in self.parameters}
        counter = Counter(names, width)
        getattr(counter, self.case.op)(*shapes, *self.parameters, **self.options)
        return {key: each for key, each in counter.counts.items() if gradients or key[1] != BACK}


def check(case: Case, device: torch.device, opset: str, precision: str) -> dict[str, Any]:
    """Compare an op set's result and gradients with `reference` in float64, in the 2-norm.

    Raises:
        WrongResultError: One is off by more than is allowed.
    """

    cpu, dtype = torch.device("cpu"), DTYPES[precision]
    unit = torch.finfo(dtype).eps
    summed = torch.finfo(torch.float32).eps * math.sqrt(math.prod(case.size))
    dy: Tensor | None = None

    def run(name: str, place: torch.device, *dtypes: torch.dtype) -> list[Tensor]:
        nonlocal dy
        operands = Operands(case, place, *dtypes)
        if not operands.differentiable:
            return [value.cpu().double() for value in operands.forward(op_set(name))]
        if dy is None:
            dy = operands.draw_dy(operands.forward(op_set(name))[0].detach(), unit + summed)
        operands.dy = dy
        return [value.cpu().double() for value in operands.both(op_set(name))]

    truth = run("reference", cpu, torch.float64, torch.float64)  # some devices have no float64
    own = run(opset, device, dtype, torch.float32)
    usual = run("reference", device, dtype, dtype)
    found = {}
    for index, (known, ours, theirs) in enumerate(zip(truth, own, usual, strict=True)):
        error, of_reference = (float((v - known).norm() / known.norm()) for v in (ours, theirs))
        allowed = TIMES * (of_reference + unit) + summed
        name = f"gradient {index}" if index else "result"
        if not error <= allowed:
            raise WrongResultError(
                f"{opset} ({precision}), {case.name}: the {name} is off by {error:.1e} of its "
                f"norm, {allowed:.1e} is allowed; no figure is shown"
            )
        found[name] = {"error": error, "allowed": allowed}
    return found


def op_set(name: str) -> Any:
    """Return an op set by its name."""
    return importlib.import_module(f"flashdip.kernels.{name}")


def rows(
    case: Case,
    device: torch.device,
    providers: Sequence[tuple[str, str]],
    ceilings: Ceilings,
    *,
    rounds: int = 7,
    block: float = 0.1,
    judge: Callable[..., dict[str, Any]] = check,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Judge and measure one case: forward alone, and with gradients; see `suite.row`.

    Args:
        case: What is measured.
        device: Where.
        providers: Op sets and precisions; ratios are taken to the first.
        ceilings: Of the device.
        rounds: Samples of each.
        block: Seconds of a sample, about.
        judge: Proves an op set right.

    Returns:
        The rows, and what was left out, by name, with the reason.
    """
    measured: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    gates: dict[tuple[str, str], dict[str, Any]] = {}
    for opset, precision in providers:
        try:
            gates[opset, precision] = judge(case, device, opset, precision)
        except WrongResultError as error:
            left_out[f"{case.name}, {opset} ({precision})"] = one_line(error)
    operands = {key: Operands(case, device, DTYPES[key[1]], torch.float32) for key in gates}
    for gradients in (False, True) if case.op not in ("adam", "perturb") else (False,):
        passes = "forward and backward" if gradients else "forward"
        names = {key: f"{case.name}, {passes}, {key[0]} ({key[1]})" for key in gates}
        steps = {names[key]: _step(operands[key], op_set(key[0]), gradients) for key in gates}
        if not steps:
            continue
        baseline = names.get(providers[0])
        sync = variant(next(iter(steps.values())), device).sync
        slowest = max(clock(step, steps=1, warmup=1, sync=sync) for step in steps.values())
        count = max(1, math.ceil(block / slowest))
        timings = measure(steps, rounds=rounds, steps=count, warmup=1, sync=sync, baseline=baseline)
        for key, name in names.items():
            measured.append(
                suite.row(
                    name,
                    {
                        "op": case.op,
                        "case": case.name,
                        "passes": passes,
                        "size": list(case.size),
                        "opset": key[0],
                        "precision": key[1],
                    },
                    timings[name],
                    baseline or "",
                    operands[key].work(gradients),
                    ceilings,
                    gate=gates[key],
                )
            )
    return measured, left_out


def providers(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return the op sets in the precisions that they have; `reference` in float32 comes first."""
    return [("reference", "fp32"), *(("native", each) for each in precisions)]


def _step(operands: Operands, ops: Any, gradients: bool) -> Callable[[], None]:
    @torch.set_grad_enabled(gradients)
    def step() -> None:
        (operands.both if gradients else operands.forward)(ops)

    return step
