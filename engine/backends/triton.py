"""The backend of the Triton kernels: a fixed list of launches, captured once and replayed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdip.engine.backends.base import DTYPES, Statistics
from flashdip.engine.backends.graphs import SIZES, Mail, Repeated, needed
from flashdip.engine.backends.observe import Observer
from flashdip.engine.backends.plans import architecture, interpreted, program
from flashdip.engine.backends.slots import TensorSlot, kept
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip
from flashdip.engine.operators import Downsample, Each, Identity, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import noise
from flashdip.kernels.resample import Kernel

if TYPE_CHECKING:
    from flashdip.kernels.fused.launch import Launch

PRECISIONS = ("fp16", "bf16", "fp32")
OLDEST = (8, 0)  # compute capability


class TritonBackend:
    """Our kernels on NVIDIA GPUs; in Triton's interpreter also on a CPU, for tests."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda", "xpu", "mps")  # where it says why it cannot run

    def unavailable(self, device: torch.device, config: FitConfig) -> list[str]:
        """Return the reasons why this backend cannot run there; empty if it can."""
        if util.find_spec("triton") is None:
            return ["Triton is not installed (pip install 'flashdip[gpu]')"]
        reasons = []
        if config.precision not in ("auto", *PRECISIONS):
            reasons.append(f"it computes in {', '.join(PRECISIONS)}, not {config.precision}")
        if device.type == "cuda" and torch.version.hip is None:
            found = torch.cuda.get_device_capability(device)
            if found < OLDEST:
                needed, own = (".".join(map(str, version)) for version in (OLDEST, found))
                reasons.append(f"it needs compute capability {needed}, this GPU has {own}")
        elif not (device.type == "cpu" and interpreted()):
            reasons.append("it runs on NVIDIA GPUs only")
        return reasons

    def precision(self, device: torch.device) -> str:
        """Return fp16: it has three more bits than bf16, and nothing here needs a wider range."""
        return "fp16"

    def prepare(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        precision: str,
        truth: Tensor | None,
    ) -> "TritonStep":
        """Plan the launches, take memory, compile, and capture."""
        return TritonStep(problem, config, device, DTYPES[precision], truth)


class TritonStep:
    """One iteration of F fits as launches; see `Step`.

    Guard and stopping rules are launches too, where the loss is: then the host learns of each
    reading when it asks for the next one.

    Args:
        problem: F fits.
        config: How they are fitted.
        device: A GPU; with Triton's interpreter the CPU.
        dtype: What activations are stored in.
        truth: The undamaged images, or None.

    Attributes:
        mask: What outputs are multiplied by before they are compared, [F, C, H, W]; None: nothing.
        sigma: Of the noise, [F]; NaN where unknown.
        clipped: Whether it was clipped, [F] int32.
        notes: Lines that a person should see.
        initial: Weights that the fits began with, [F, P] on the CPU, in the published order.
    """

    def __init__(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        dtype: torch.dtype,
        truth: Tensor | None,
    ) -> None:
        from flashdip.kernels.fused.program import Images

        self.notes: tuple[str, ...] = ()
        self.config = config
        self.network = Skip(config.network)
        self.fits = range(problem.fits)
        self.size = problem.shape[1:]
        self.watch = watch = Observer(problem, config, device, torch.float32, truth)
        operator = problem.operator
        kinds = operator.operators if isinstance(operator, Each) else [operator]
        inside, downsample = compared(kinds)
        self.mask: Tensor | None = None
        if inside and any(isinstance(kind, Mask) for kind in kinds):
            self.mask = operator(torch.ones_like(watch.output)).contiguous()
        windowed, moving = "es-wmv" in config.stop, "es-emv" in config.stop
        self.sigma = torch.full((problem.fits,), math.nan, device=device)
        self.clipped = torch.zeros(problem.fits, dtype=torch.int32, device=device)
        images = Images(
            output=watch.output,
            average=watch.average,
            loss=watch.loss,
            target=watch.observation if inside else None,
            mask=self.mask,
            downsample=downsample,
            window=watch.window if windowed else None,
            sample=watch.sample if windowed else None,
            moving_mean=watch.moving_mean if moving else None,
            moving_variance=watch.moving_variance if moving else None,
            measured=watch.measured if inside else None,
            truth=watch.truth,
            sigma=self.sigma,
            clipped=self.clipped,
        )
        self.program = program(config, images, self.size, dtype, architecture(device))
        moment1, moment2 = self.program.moments
        parameters = self.program.parameters
        self.trained = {"parameters": parameters, "moment1": moment1, "moment2": moment2}
        after, reading = self.program.after, self.program.reading
        # With torch between two lists of launches each iteration is by itself.
        self.stride = 1 if after else SIZES[0]
        gaps = min(config.read_every, config.iterations), config.iterations % config.read_every
        sizes = (1,) if after else needed(gaps)
        self._launches = Repeated(_all(self.program.launches), device, sizes)
        self._after = Repeated(_all(after), device) if after else None
        self._reading: Repeated | None = None
        self.issued = 0  # iterations that the device was told to do
        kind: type[TritonSlot] = GuidedSlot
        if reading is None:
            self.good, self.best = kept(self.trained, watch, config)
            self.notes = (f"{_named(kinds)} has no kernel: torch computes the loss between graphs",)
        else:
            self.good, self.best = reading.good, reading.best
            self._reading = Repeated(_all(reading.launches), device)
            self._mail = Mail(reading.state.board)
            kind = JudgedSlot
        count = sum(torch.Size(p.shape).numel() for p in self.network.parameters)
        self.initial = torch.zeros(problem.fits, count)
        self.slots = [kind(self, fit) for fit in self.fits]
        for slot in self.slots:  # what running the launches once has left behind is overwritten
            slot.start(config.seed + slot.index)

    def advance(self, count: int) -> None:
        """Advance every fit by so many iterations, without waiting for the device."""
        self.issued += count
        for slot in self.slots:
            slot.iteration += count
        if self._after is None:
            self._launches(count)
            return
        for _ in range(count):
            self._launches()
            self._compare()
            self._after()

    def __call__(self) -> None:
        """Advance every fit by one iteration."""
        self.advance(1)

    def _compare(self) -> None:
        """Compute the losses and their gradients by torch, through operators of any kind."""
        watch = self.watch
        with torch.enable_grad():
            image = watch.output.detach().requires_grad_()
            residual = watch.operator(image) - watch.observation
            loss = residual.square().reshape(len(self.slots), -1).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), image)
        self.program.doutput.copy_(gradient)
        watch.loss.copy_(loss.detach())

    def read(self) -> list[Statistics]:
        """Wait for the device; return the last statistics of each fit."""
        return self.watch.read([slot.iteration for slot in self.slots], self.trained["parameters"])

    def measure(self, due: Sequence[int]) -> Iterator[tuple[int, Statistics]]:
        """Take a reading, and return the one before: the device may be at work on the newest."""
        if self._reading is None:
            statistics = self.read()
            return ((index, statistics[index]) for index in due)
        self._reading()
        self._mail.send(self.issued)
        return self._received(left=1)

    def drain(self) -> Iterator[tuple[int, Statistics]]:
        """Wait for the device; return what was not yet returned."""
        return iter(()) if self._reading is None else self._received(left=0)

    def _received(self, left: int) -> Iterator[tuple[int, Statistics]]:
        for issued, board in self._mail.receive(left):
            for slot, (iteration, *values, readings) in zip(self.slots, board, strict=True):
                assert isinstance(slot, JudgedSlot)
                if readings > slot.readings:
                    slot.readings, slot.read_at = readings, issued
                    yield slot.index, Statistics(int(iteration), *values)


class TritonSlot(TensorSlot):
    """One fit of a `TritonStep`; what the launches have to know of it lies on the device."""

    step: TritonStep

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place: same launches, same memory."""
        super().replace(problem, seed, truth)
        own = slice(self.index, self.index + 1)
        if self.step.mask is not None:
            image = torch.ones_like(self.step.watch.output[own])
            self.step.mask[own].copy_(problem.operator(image))

    def _place(self, parameters: Tensor, z: Tensor) -> None:
        step, program = self.step, self.step.program
        own = slice(self.index, self.index + 1)
        step.initial[self.index].copy_(parameters)
        program.layout.pack(step.network.views(step.initial[own]), program.parameters[own])
        program.z[self.index].copy_(z.permute(1, 2, 0))
        self._settle()

    def _settle(self) -> None:
        """Let the launches find what follows from parameters, iteration, rate and retries."""
        program = self.step.program
        program.copies[self.index].copy_(program.parameters[self.index])
        program.counters[self.index].fill_(self.iteration)
        program.rate_scale[self.index].fill_(self.rate_scale)
        program.keys[self.index].fill_(noise.key(self.seed, retry=self.retry))

    def _network(self, parameters: Tensor) -> dict[str, Tensor]:
        step, own = self.step, slice(self.index, self.index + 1)
        published = step.initial[own].clone()  # a bias that a norm follows stays as it was
        views = step.network.views(published)
        step.program.layout.unpack(parameters.cpu(), views)
        names = [parameter.name for parameter in step.network.parameters]
        tensors = {name: view[0].clone() for name, view in zip(names, views, strict=True)}
        z = step.program.z[self.index].permute(2, 0, 1)
        return tensors | {"z": z.to("cpu", torch.float32, copy=True).contiguous()}

    def resume(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        iteration: int,
        guard: Mapping[str, float],
        rules: Mapping[str, Sequence[float]],
    ) -> None:
        """Go on where another slot was."""
        super().resume(state, iteration, guard, rules)
        self._settle()


class GuidedSlot(TritonSlot):
    """A slot whose readings are judged by the host."""

    def go_back(self, iteration: int) -> None:
        """Copy the good state back."""
        super().go_back(iteration)
        self._settle()

    @property
    def rate_scale(self) -> float:
        """Factor on the learning rate."""
        return self._rate_scale

    @rate_scale.setter
    def rate_scale(self, value: float) -> None:
        self._rate_scale = value
        self.step.program.rate_scale[self.index].fill_(value)

    @property
    def retry(self) -> int:
        """How often the fit went back; enters the perturbation."""
        return self._retry

    @retry.setter
    def retry(self, value: int) -> None:
        self._retry = value
        self.step.program.keys[self.index].fill_(noise.key(self.seed, retry=value))


class JudgedSlot(TritonSlot):
    """A slot whose readings are judged on the device: what the host says has been done there.

    Attributes:
        readings: How many of its readings have come.
        read_at: Iterations that the device had been told to do before the last of them.
    """

    readings = 0.0
    read_at = 0

    def keep(self) -> None:
        """Do nothing."""

    def select(self) -> None:
        """Do nothing."""

    def go_back(self, iteration: int) -> None:
        """Only count: the device has gone on from there."""
        self.iteration = iteration + self.step.issued - self.read_at

    def start(self, seed: int) -> None:
        """Bring everything to where a fit with this seed begins."""
        super().start(seed)
        self._open({"loss": math.inf}, {})

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place."""
        super().replace(problem, seed, truth)
        self._measured()

    def resume(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        iteration: int,
        guard: Mapping[str, float],
        rules: Mapping[str, Sequence[float]],
    ) -> None:
        """Go on where another slot was."""
        super().resume(state, iteration, guard, rules)
        self._open(guard, rules)

    def _open(self, guard: Mapping[str, float], rules: Mapping[str, Sequence[float]]) -> None:
        """Write the device's books."""
        from flashdip.kernels.fused.judge import BOOKS

        reading = self.step.program.reading
        assert reading is not None
        self.readings = 0.0
        self._measured()
        entries = dict.fromkeys(BOOKS, 0.0) | {k: v for k, v in guard.items() if k in BOOKS}
        for rule, name in (("es-wmv", "windowed"), ("es-emv", "moving")):
            entries[name], entries[f"{name}_at"] = rules.get(rule, (math.inf, 0))
        reading.state.books[self.index].copy_(torch.tensor(list(entries.values())))
        reading.state.board[self.index].fill_(math.nan)
        reading.state.actions[self.index].zero_()
        reading.state.prefixes[self.index].fill_(noise.prefix(self.seed))

    def _measured(self) -> None:
        watch = self.step.watch
        sigma = watch.sigma[self.index]
        self.step.sigma[self.index] = math.nan if sigma is None else sigma
        self.step.clipped[self.index] = int(bool(watch.clipped[self.index]))


def _named(operators: Sequence[object]) -> str:
    names = {type(each).__name__ for each in operators if not isinstance(each, Identity | Mask)}
    return f"the operator {' and '.join(sorted(names))}"


def compared(operators: Sequence[object]) -> tuple[bool, tuple[Kernel, int] | None]:
    """Return whether launches can compare what the operators of the fits make of their images.

    Returns:
        That, and how the images are made smaller for it.
    """
    if all(isinstance(each, Identity | Mask) for each in operators):
        return True, None
    smaller = {(e.kernel, e.factor) if isinstance(e, Downsample) else None for e in operators}
    only = smaller.pop()
    return (only is not None, only) if not smaller else (False, None)


def _all(launches: Sequence["Launch"]) -> Callable[[], None]:
    def run() -> None:
        for launch in launches:
            launch()

    return run
