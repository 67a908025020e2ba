"""Backends that run an op set of plain torch calls, eagerly: `reference` and `native`."""

import importlib

import torch
from torch import Tensor

from flashdip.engine.backends.base import DTYPES, Statistics
from flashdip.engine.backends.observe import Observer
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip
from flashdip.engine.problems import Problem
from flashdip.kernels import noise
from flashdip.kernels.opset import OpSet


class EagerBackend:
    """One op set, run operation by operation with torch's autograd.

    Args:
        name: Of the backend, and of its op set in `flashdip.kernels`.
        precisions: What activations can be stored in.
    """

    def __init__(self, name: str, precisions: tuple[str, ...]) -> None:
        self.name = name
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

    def prepare(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        precision: str,
        truth: Tensor | None,
    ) -> "EagerStep":
        """Build the step; nothing is compiled."""
        ops = importlib.import_module(f"flashdip.kernels.{self.name}")
        return EagerStep(ops, problem, config, device, DTYPES[precision], truth)


class EagerStep:
    """One iteration: perturb, draw, compare, differentiate, update, average. See `Step`."""

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
        self.network = Skip(config.network)
        self.size = problem.shape[1:]
        self.fits = range(problem.fits)
        self.iteration, self.rate_scale, self.retry = 0, 1.0, 0

        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device, wide)

        self.watch = Observer(problem, config, device, wide, truth)
        self.z = torch.stack([initial_input(config, self.size, config.seed + f) for f in self.fits])
        self.z = place(self.z).contiguous(memory_format=torch.channels_last)
        self.table = place(noise.table())

        weights = [self.network.initialise(config.seed + f) for f in self.fits]
        self.parameters = place(torch.stack(weights))  # [F, P]
        self.gradients = torch.zeros_like(self.parameters)
        self.moments = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        # Leaves share memory with the flat parameters.
        self.leaves = [v.requires_grad_() for v in self.network.views(self.parameters.detach())]

    def __call__(self) -> None:
        """Advance by one iteration."""
        self.iteration += 1
        config = self.config
        offsets = [
            noise.offset(noise.key(config.seed + f, retry=self.retry), self.iteration)
            for f in self.fits
        ]
        x = self.ops.perturb(self.z, self.table, offsets, config.perturbation, self.dtype)
        output = self.network.forward(self.ops, self.leaves, x)
        output = output[..., : self.size[0], : self.size[1]]
        residual = self.watch.operator(output) - self.watch.observation
        loss = residual.square().reshape(len(self.fits), -1).mean(1)  # [F]
        # The sum keeps the fits apart; a bias that a norm follows may have no gradient.
        gradients = torch.autograd.grad(loss.sum(), self.leaves, allow_unused=True)
        with torch.no_grad():
            for target, gradient in zip(self.network.views(self.gradients), gradients, strict=True):
                if gradient is not None:
                    target.copy_(gradient)
            self.ops.adam(
                self.parameters,
                self.gradients,
                *self.moments,
                step=self.iteration,
                rate=config.rate(self.iteration) * self.rate_scale,
                betas=config.betas,
                eps=config.eps,
            )
            self.watch.update(output.detach(), loss.detach(), self.iteration)

    def image(self) -> Tensor:
        """Return the averaged output, [F, C, H, W]."""
        return self.watch.image(self.iteration)

    def read(self) -> Statistics:
        """Wait for the device; return the last statistics, averaged over fits."""
        return self.watch.read(self.iteration)

    def _good(self) -> dict[str, Tensor]:
        own = {
            "parameters": self.parameters,
            "moment1": self.moments[0],
            "moment2": self.moments[1],
        }
        return own | self.watch.good()

    def good_state(self) -> dict[str, Tensor]:
        """Copy what a divergent fit goes back to."""
        return {name: tensor.detach().clone() for name, tensor in self._good().items()}

    def statistics_state(self) -> dict[str, Tensor]:
        """Return a copy of the window."""
        return {"window": self.watch.window.clone()}

    def fitted(self) -> dict[str, Tensor]:
        """Return copies of the first fit's parameters by name, in order, and its input "z"."""
        names = [parameter.name for parameter in self.network.parameters]
        tensors = dict(zip(names, self.leaves, strict=True)) | {"z": self.z}
        return {
            name: tensor[0].detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, tensor in tensors.items()
        }

    def load(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from copied state."""
        self.iteration = iteration
        self.watch.output = self.watch.output.clone()  # it may still be part of a larger one
        own = self._good() | {"window": self.watch.window}
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)


def _fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 faster than float32.

    With tile units (AMX) it does. AVX512-BF16 alone does not tell: on Emerald Rapids without AMX
    convolutions ran at 95 GFLOP/s a core in bf16 and 190 in float32 (measured). AMD's cores with it
    are taken to be fast; that was not measured.
    """
    capabilities = torch.cpu.get_capabilities()
    amd = "AMD" in str(capabilities.get("cpu_name", ""))
    return bool(capabilities.get("amx_bf16") or (amd and capabilities.get("avx512_bf16")))


def initial_input(config: FitConfig, size: tuple[int, int], seed: int) -> Tensor:
    """Return the input z of one fit, [C, H, W] float32 on the CPU, at the network's size."""
    height, width = config.network.network_size(*size)
    if config.input == "meshgrid":
        y, x = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
        return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)  # another stream than the weights'
    z = torch.rand(config.network.inputs, height, width, generator=generator)
    return z * config.input_scale
