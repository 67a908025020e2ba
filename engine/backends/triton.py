"""The backend of the Triton kernels: a fixed list of launches, captured once and replayed."""

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from importlib import util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdip.engine.backends import tuned
from flashdip.engine.backends.base import DTYPES, Statistics
from flashdip.engine.backends.eager import initial_input
from flashdip.engine.backends.observe import MOVING_RATE, Observer, spread
from flashdip.engine.backends.slots import TensorSlot
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.operators import Each, Identity, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import noise

if TYPE_CHECKING:
    from flashdip.kernels.fused.launch import Launch
    from flashdip.kernels.fused.program import Images, Program, Recorded
    from flashdip.kernels.fused.tiles import Architecture

PRECISIONS = ("fp16", "bf16", "fp32")
OLDEST = (8, 0)  # compute capability

# Images on the device, of each fit: observation, what of it was measured, output, average, mask,
# truth and the best; two more while it is read; temporaries of the one that is judged.
_KEPT, _READ, _JUDGED = 7, 2, 10


class TritonBackend:
    """Our kernels on NVIDIA GPUs; in Triton's interpreter also on a CPU, for tests."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda",)

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
        reasons += [f"it has no kernel for {what}" for what in unsupported(config.network)]
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

    Args:
        problem: F fits.
        config: How they are fitted.
        device: A GPU; with Triton's interpreter the CPU.
        dtype: What activations are stored in.
        truth: The undamaged images, or None.

    Attributes:
        mask: What outputs are multiplied by before they are compared, [F, C, H, W]; None: nothing.
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

        self.config = config
        self.network = Skip(config.network)
        self.fits = range(problem.fits)
        self.size = problem.shape[1:]
        self.watch = watch = Observer(problem, config, device, torch.float32, truth)
        operator = problem.operator
        kinds = operator.operators if isinstance(operator, Each) else [operator]
        direct = all(isinstance(kind, Identity | Mask) for kind in kinds)
        self.mask: Tensor | None = None
        if direct and any(isinstance(kind, Mask) for kind in kinds):
            self.mask = operator(torch.ones_like(watch.output)).contiguous()
        windowed, moving = "es-wmv" in config.stop, "es-emv" in config.stop
        images = Images(
            watch.output,
            watch.average,
            watch.loss,
            watch.observation if direct else None,
            self.mask,
            watch.window if windowed else None,
            watch.sample if windowed else None,
            watch.moving_mean if moving else None,
            watch.moving_variance if moving else None,
        )
        self.program = _program(config, images, self.size, dtype, architecture(device))
        moment1, moment2 = self.program.moments
        parameters = self.program.parameters
        self.trained = {"parameters": parameters, "moment1": moment1, "moment2": moment2}
        self._parts: list[Callable[[], None]] = [captured(self.program.launches, device)]
        if self.program.after:
            self._parts += [self._compare, captured(self.program.after, device)]
        count = sum(torch.Size(p.shape).numel() for p in self.network.parameters)
        self.initial = torch.zeros(problem.fits, count)
        self.slots = [TritonSlot(self, fit) for fit in self.fits]
        for slot in self.slots:  # what running the launches once has left behind is overwritten
            slot.start(config.seed + slot.index)

    def __call__(self) -> None:
        """Advance every fit by one iteration, without waiting for the device."""
        for slot in self.slots:
            slot.iteration += 1
        for part in self._parts:
            part()

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
        return self.watch.read([slot.iteration for slot in self.slots])


class TritonSlot(TensorSlot):
    """One fit of a `TritonStep`; what the launches have to know of it lies on the device."""

    step: TritonStep

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

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place: same launches, same memory."""
        super().replace(problem, seed, truth)
        own = slice(self.index, self.index + 1)
        if self.step.mask is not None:
            image = torch.ones_like(self.step.watch.output[own])
            self.step.mask[own].copy_(problem.operator(image))

    def _draw(self) -> None:
        step, program = self.step, self.step.program
        own = slice(self.index, self.index + 1)
        step.initial[self.index].copy_(step.network.initialise(self.seed))
        program.layout.pack(step.network.views(step.initial[own]), program.parameters[own])
        z = initial_input(step.config, step.size, self.seed)
        program.z[self.index].copy_(z.permute(1, 2, 0))
        self._settle()

    def _settle(self) -> None:
        """Let the launches find what follows from parameters and iteration."""
        program = self.step.program
        program.copies[self.index].copy_(program.parameters[self.index])
        program.counters[self.index].fill_(self.iteration)

    def fitted(self) -> dict[str, Tensor]:
        """Return copies of the parameters by name, in order, and of the input "z"."""
        step, own = self.step, slice(self.index, self.index + 1)
        published = step.initial[own].clone()  # a bias that a norm follows stays as it was
        views = step.network.views(published)
        step.program.layout.unpack(step.program.parameters[own].cpu(), views)
        names = [parameter.name for parameter in step.network.parameters]
        tensors = {name: view[0].clone() for name, view in zip(names, views, strict=True)}
        z = step.program.z[self.index].permute(2, 0, 1)
        return tensors | {"z": z.to("cpu", torch.float32, copy=True).contiguous()}

    def load(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from copied state."""
        super().load(state, iteration)
        with torch.no_grad():
            self._settle()


def interpreted() -> bool:
    """Return whether Triton interprets its kernels: then they run on a CPU, very slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def record(network: Skip, fits: int) -> "Recorded":
    """Record a network for F fits."""
    from flashdip.kernels.fused.program import Recorded
    from flashdip.kernels.fused.record import Recorder

    parameters = [torch.empty((fits, *p.shape), device="meta") for p in network.parameters]
    recorder = Recorder()
    network.forward(recorder, parameters, recorder.input(network.config.inputs))
    return Recorded(recorder.nodes, [p.name for p in network.parameters], parameters)


def _program(
    config: FitConfig,
    images: "Images",
    size: tuple[int, ...],
    dtype: torch.dtype,
    architecture: "Architecture",
) -> "Program":
    """Plan the fits whose images these are, [F, C, H, W] of `size` (H, W)."""
    from flashdip.kernels.fused.program import Program, Settings

    return Program(
        record(Skip(config.network), len(images.output)),
        Settings(config.perturbation, config.betas, config.eps, config.average, MOVING_RATE),
        images,
        [config.rate(i) for i in range(1, config.iterations + 1)],
        config.network.network_size(*size),
        dtype,
        architecture,
    )


def planned(
    config: FitConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    architecture: "Architecture",
    fits: int = 1,
    device: torch.device | str = "meta",
) -> "Program":
    """Plan the denoising of F images of `size` (H, W): of zeros, or without memory."""
    from flashdip.kernels.fused.program import Images

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    shape = fits, config.network.outputs, *size
    samples = len(spread(config.network.outputs * size[0] * size[1]))
    windowed, moving = "es-wmv" in config.stop, "es-emv" in config.stop
    images = Images(
        output=empty(*shape),
        average=empty(*shape),
        loss=empty(fits),
        target=empty(*shape),
        window=empty(config.window, fits, samples) if windowed else None,
        sample=empty(samples, dtype=torch.int64) if windowed else None,
        moving_mean=empty(*shape) if moving else None,
        moving_variance=empty(fits) if moving else None,
    )
    return _program(config, images, size, dtype, architecture)


def memory(
    config: FitConfig,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    architecture: "Architecture",
    fits: int,
) -> int:
    """Return the bytes of device memory that F fits take, identities or masks as operators.

    Args:
        config: How they are fitted.
        shape: Of an image: channels, height, width.
        dtype: Storage type.
        architecture: Of the GPU.
        fits: F.
    """
    from flashdip.kernels.fused.layout import BLOCK

    network = dataclasses.replace(config.network, outputs=shape[0])
    config = dataclasses.replace(config, network=network)
    program = planned(config, (shape[1], shape[2]), dtype, architecture, fits)
    draws = 2 * noise.TABLE_SIZE if config.perturbation else 0
    values = torch.Size(shape).numel()
    samples, rates = len(spread(values)), 8 * config.iterations
    shared = program.memory + 4 * BLOCK + draws + rates + 8 * samples
    trained, image = 3 * 4 * program.layout.size, 4 * values
    window = 4 * config.window * samples if "es-wmv" in config.stop else 0
    moving = "es-emv" in config.stop
    good = trained + (2 + moving) * image  # what the guard keeps of each fit
    own = good + window + (_KEPT + moving + _READ) * image
    # One fit after another is judged, and then its good state copied before the last is let go.
    return shared + fits * own + max(good, _JUDGED * image)


def launches(
    config: SkipConfig, height: int, width: int, arch: str, dtype: torch.dtype, fits: int = 1
) -> "list[Launch]":
    """Return the launches of one step of denoising on a named architecture, without memory.

    Args:
        config: Of the network.
        height: Of the image.
        width: Of the image.
        arch: Such as "sm_90"; see `flashdip.kernels.fused.tiles.ARCHITECTURES`.
        dtype: Storage type.
        fits: Fits in one launch.
    """
    from flashdip.kernels.fused.tiles import ARCHITECTURES

    fit = FitConfig(network=config, stop=("es-wmv",))
    return planned(fit, (height, width), dtype, ARCHITECTURES[arch], fits).launches


def unsupported(config: SkipConfig) -> list[str]:
    """Return what of a network has no kernel; empty if all has."""
    from flashdip.kernels.fused.record import Recorder, unsupported

    network, recorder = Skip(config), Recorder()
    parameters = [torch.empty((1, *p.shape), device="meta") for p in network.parameters]
    network.forward(recorder, parameters, recorder.input(config.inputs))
    return unsupported(recorder.nodes)


def architecture(device: torch.device) -> "Architecture":
    """Return the architecture whose tiles suit a device best: its own, or the nearest older one."""
    from flashdip.kernels.fused.tiles import ARCHITECTURES

    if device.type != "cuda":
        return ARCHITECTURES["interpreter"]
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    known = {int(name[3:]): name for name in ARCHITECTURES if name.startswith("sm_")}
    nearest = max(version for version in known if version <= own)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    found = ARCHITECTURES[known[nearest]]
    return found._replace(
        processors=properties.multi_processor_count,
        shared=min(shared or found.shared, found.shared),
        table={**found.table, **tuned.load(tuned.identity(device))},
    )


def captured(launches: Sequence["Launch"], device: torch.device) -> Callable[[], None]:
    """Return what runs the launches: on a GPU, after a first run of each, a captured graph."""

    def run() -> None:
        for launch in launches:
            launch()

    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()  # compiles and loads
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _without_collection(), torch.cuda.graph(graph, stream=stream):
            run()
    return graph.replay


@contextlib.contextmanager
def _without_collection():  # type: ignore[no-untyped-def]
    """Keep the garbage collector away: unloading a module would break a capture."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
