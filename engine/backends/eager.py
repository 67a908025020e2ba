"""Backends that run an op set of plain torch calls, eagerly: `reference` and `native`."""

import contextlib
import functools
import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.backends.base import DTYPES
from flashdip.engine.backends.hosted import HostedSlot, HostedStep
from flashdip.engine.backends.observe import Observer
from flashdip.engine.backends.probe import Kept, kept, state
from flashdip.engine.backends.recorded import Recorder, unrecorded
from flashdip.engine.backends.repeated import Recording
from flashdip.engine.backends.slots import kept as kept_states
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.problems import Problem
from flashdip.kernels import noise
from flashdip.kernels.memory import give_back, on_glibc
from flashdip.kernels.opset import OpSet
from flashdip.kernels.recall import recalling


class EagerBackend:
    """One op set, run operation by operation with torch's autograd.

    Args:
        name: Of the backend, and of its op set in `flashdip.kernels`.
        precisions: What activations can be stored in.
        records: Whether on a CPU the operations of a longer fit are recorded, and repeated without
            autograd (`flashdip.engine.backends.recorded`); where they work on large maps, some of
            these are made anew instead of kept (`flashdip.kernels.recall`).
    """

    def __init__(self, name: str, precisions: tuple[str, ...], records: bool = False) -> None:
        self.name, self.records = name, records
        self.devices: tuple[str, ...] = ("cpu", "cuda", "xpu", "mps")
        self.precisions = precisions

    def unavailable(self, device: torch.device, config: FitConfig) -> list[str]:
        """Return the reasons why this backend cannot run such a fit there; empty if it can."""
        reasons, precision = [], config.precision
        if precision not in ("auto", *self.precisions):
            reasons.append(f"it computes in {' or '.join(self.precisions)}, not {precision}")
        if precision == "fp64" and device.type == "mps":
            reasons.append("this device has no float64")
        return reasons

    def precision(self, device: torch.device) -> str:
        """Return bf16 where the device is fast in it, else fp32."""
        if "bf16" not in self.precisions:
            return "fp32"
        if device.type == "cpu":
            return "bf16" if _fast_bf16() else "fp32"
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return "fp32"

    def memory(
        self,
        config: FitConfig,
        shape: tuple[int, int, int],
        device: torch.device,
        precision: str,
    ) -> int:
        """Return the bytes that one fit takes at most; see `flashdip.engine.backends.probe`."""
        config = replace(config, network=replace(config.network, outputs=shape[0]))
        size = config.network.network_size(*shape[1:])
        recalls = self._recalls(device, _widest(config.network, *size, DTYPES[precision]))
        maps = self._kept(config.network, precision, device, recalls)
        heap = device.type == "cpu" and on_glibc()
        beside = state(config, shape, _wide(DTYPES[precision]).itemsize)
        return beside + (maps.taken(*size) if heap else maps.used(*size))

    @functools.cache  # noqa: B019 - there are two backends, and they stay
    def _kept(
        self, network: SkipConfig, precision: str, device: torch.device, recalls: bool
    ) -> Kept:
        def step(config: FitConfig, problem: Problem) -> EagerStep:
            return EagerStep(self.ops(), problem, config, device, DTYPES[precision], None)

        return kept(FitConfig(network=network), step, recalls)

    def prepare(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        precision: str,
        truth: Tensor | None,
    ) -> "EagerStep":
        """Build the step; nothing is compiled."""
        step = EagerStep(self.ops(), problem, config, device, DTYPES[precision], truth)
        height, width = step.z.shape[2:]
        widest = len(step.slots) * _widest(config.network, height, width, step.dtype)
        step.recalls = self._recalls(device, widest)
        step.records = (
            self.records
            and device.type == "cpu"
            and not step.recalls
            and config.iterations >= _LONG
        )
        return step

    def _recalls(self, device: torch.device, widest: int) -> bool:
        return self.records and device.type == "cpu" and widest >= _WIDE

    def ops(self) -> OpSet[Tensor]:
        """Return the op set."""
        ops: OpSet[Tensor] = importlib.import_module(f"flashdip.kernels.{self.name}")
        return ops


class EagerStep(HostedStep):
    """One iteration: perturb, draw, compare, differentiate, update, average. See `Step`.

    Attributes:
        records: Whether the second iteration is recorded, and repeated from then on.
        recalls: Whether maps are made anew instead of kept; see `flashdip.kernels.recall`.
        recording: Of that one.
    """

    def __init__(
        self,
        ops: OpSet[Tensor],
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        dtype: torch.dtype,
        truth: Tensor | None,
    ) -> None:
        self.ops, self.config, self.dtype = ops, config, dtype
        self.records, self.recalls = False, False
        self._eager = 0  # iterations that were made eagerly
        self.recording: Recording | None = None
        self.network = Skip(config.network)
        self.size = problem.shape[1:]

        wide = _wide(dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(problem.fits, *shape, device=device, dtype=wide)

        self.watch = Observer(problem, config, device, wide, truth)
        self.z = zeros(config.network.inputs, *config.network.network_size(*self.size))
        self.z = self.z.contiguous(memory_format=torch.channels_last)
        self.table = noise.table().to(device, wide)

        count = sum(torch.Size(p.shape).numel() for p in self.network.parameters)
        self.parameters, self.gradients = zeros(count), zeros(count)  # [F, P]
        self.moments = zeros(count), zeros(count)
        # Leaves, and what their gradients are written to, share memory with the flat vectors.
        self.leaves = [v.requires_grad_() for v in self.network.views(self.parameters.detach())]
        self.slopes = self.network.views(self.gradients)
        self.trained = {
            "parameters": self.parameters,
            "moment1": self.moments[0],
            "moment2": self.moments[1],
        }
        self.good, self.best = kept_states(self.trained, self.watch, config)
        self.slots = [EagerSlot(self, fit) for fit in range(problem.fits)]
        for slot in self.slots:
            slot.start(config.seed + slot.index)

    def __call__(self) -> None:
        """Advance every fit by one iteration."""
        config = self.config
        for slot in self.slots:
            slot.iteration += 1
        offsets = [
            noise.offset(noise.key(slot.seed, retry=slot.retry), slot.iteration)
            for slot in self.slots
        ]
        x = self.ops.perturb(self.z, self.table, offsets, config.perturbation, self.dtype)
        output, loss = self.differentiate(x)
        with torch.no_grad():
            for slot in self.slots:
                own = slice(slot.index, slot.index + 1)
                self.ops.adam(
                    self.parameters[own],
                    self.gradients[own],
                    self.moments[0][own],
                    self.moments[1][own],
                    step=slot.iteration,
                    rate=config.rate(slot.iteration) * slot.rate_scale,
                    betas=config.betas,
                    eps=config.eps,
                )
            iterations = [slot.iteration for slot in self.slots]
            self.watch.update(output, loss, iterations)

    def differentiate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradients; return output, [F, C, H, W], and loss, [F], of a perturbed input."""
        if self.recording is not None and self.records:
            (whole,) = self.recording.repeat(0, x)
            output, loss, slope = self._compare(whole)
            self.recording.repeat(1, slope)
            return output, loss
        self._eager += 1
        # The first iteration lets libraries choose their kernels.
        recorder = Recorder() if self.records and self._eager > 1 else None
        part = recorder.part if recorder else unrecorded
        with part(x) as kept, recalling() if self.recalls else contextlib.nullcontext():
            whole = self.network.forward(self.ops, self.leaves, x)
            kept.append(whole)
        output, loss, slope = self._compare(whole)
        with part(slope):
            # A bias that a norm follows may have no gradient.
            pulled = _Pulled.apply(whole, slope)  # type: ignore[no-untyped-call]
            gradients = torch.autograd.grad(pulled, self.leaves, allow_unused=True)
            with torch.no_grad():
                for target, gradient in zip(self.slopes, gradients, strict=True):
                    if gradient is not None:
                        target.copy_(gradient)
        if recorder:
            del whole, pulled, gradients, kept
            give_back()  # where the maps lay that are to lie in the recording's own memory
            self.recording = Recording(recorder)
        elif self.recalls and self._eager == 1:
            give_back()  # where the maps lay before libraries took what they keep
        return output, loss

    def _compare(self, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, cut to the image's size, loss, and the gradient of what was drawn."""
        whole = whole.detach().requires_grad_()
        output = whole[..., : self.size[0], : self.size[1]]
        residual = self.watch.operator(output) - self.watch.observation
        loss = residual.square().reshape(len(self.slots), -1).mean(1)
        (slope,) = torch.autograd.grad(loss.sum(), whole)  # the sum keeps the fits apart
        return output.detach(), loss.detach(), slope


class EagerSlot(HostedSlot):
    """One fit of an `EagerStep`."""

    step: EagerStep


class _Pulled(torch.autograd.Function):
    """A number whose gradient with respect to x is `slope`.

    To give that to `torch.autograd.grad` is the same, and loads SymPy: a second, and 30 MB.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


_LONG = 100  # iterations, from which on recording, which takes as long as a few, pays
_WIDE = 1 << 24  # bytes of a map, from which on operations take far longer than to call them


def _widest(network: SkipConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes of the largest map of one fit."""
    return max(network.down[0], (network.up or (0,))[0]) * height * width * dtype.itemsize


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of parameters and images beside activations of this type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 faster than float32.

    With tile units (AMX) it does. AVX512-BF16 alone does not tell: on Emerald Rapids without AMX
    convolutions ran at 95 GFLOP/s a core in bf16 and 190 in float32. On Zen 5 they ran at 480 and
    240 (all measured); AMD's other cores with it are taken to be like that.
    """
    capabilities = torch.cpu.get_capabilities()
    amd = "AMD" in str(capabilities.get("cpu_name", ""))
    return bool(capabilities.get("amx_bf16") or (amd and capabilities.get("avx512_bf16")))
