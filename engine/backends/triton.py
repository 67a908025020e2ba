"""The backend of the Triton kernels: a fixed list of launches, captured once and replayed."""

import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from importlib import util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdip.engine.backends.base import DTYPES, Statistics
from flashdip.engine.backends.eager import initial_input
from flashdip.engine.backends.observe import MOVING_RATE, Observer, spread
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.operators import Identity, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import noise

if TYPE_CHECKING:
    from flashdip.kernels.fused.launch import Launch
    from flashdip.kernels.fused.program import Recorded
    from flashdip.kernels.fused.tiles import Architecture

PRECISIONS = ("fp16", "bf16", "fp32")
OLDEST = (8, 0)  # compute capability


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
    """One iteration as launches; see `Step`.

    Args:
        problem: F fits.
        config: How they are fitted.
        device: A GPU; with Triton's interpreter the CPU.
        dtype: What activations are stored in.
        truth: The undamaged images, or None.

    Attributes:
        iteration: Iterations done.
    """

    def __init__(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        dtype: torch.dtype,
        truth: Tensor | None,
    ) -> None:
        from flashdip.kernels.fused.program import Images, Program, Settings

        self.config, self.iteration = config, 0
        self.network = Skip(config.network)
        self.fits = range(problem.fits)
        self.watch = Observer(problem, config, device, torch.float32, truth)
        watch = self.watch
        direct = isinstance(problem.operator, Identity | Mask)
        mask = None
        if isinstance(problem.operator, Mask):
            mask = problem.operator(torch.ones_like(watch.output)).contiguous()
        windowed, moving = "es-wmv" in config.stop, "es-emv" in config.stop
        images = Images(
            watch.output,
            watch.average,
            watch.loss,
            watch.observation if direct else None,
            mask,
            watch.window if windowed else None,
            watch.sample if windowed else None,
            watch.moving_mean if moving else None,
            watch.moving_variance if moving else None,
        )
        self.program = Program(
            record(self.network, problem.fits),
            Settings(config.perturbation, config.betas, config.eps, config.average, MOVING_RATE),
            images,
            [config.rate(i) for i in range(1, config.iterations + 1)],
            config.network.network_size(*problem.shape[1:]),
            dtype,
            architecture(device),
        )
        self._parts: list[Callable[[], None]] = [_runner(self.program.launches, device)]
        if self.program.after:
            self._parts += [self._compare, _runner(self.program.after, device)]
        self._reset(problem)

    def _reset(self, problem: Problem) -> None:
        """Start the fits; whatever running the launches once has left behind is overwritten."""
        program, config, watch = self.program, self.config, self.watch
        self.initial = torch.stack([self.network.initialise(config.seed + f) for f in self.fits])
        with torch.no_grad():
            for tensor in (
                *program.moments,
                program.counters,
                watch.window,
                *watch.good().values(),
            ):
                tensor.zero_()
            program.parameters.zero_()
            program.layout.pack(self.network.views(self.initial), program.parameters)
            program.copies.copy_(program.parameters)
            size = problem.shape[1:]
            z = [initial_input(config, size, config.seed + f).permute(1, 2, 0) for f in self.fits]
            program.z.copy_(torch.stack(z))
        self.iteration = 0
        self.rate_scale, self.retry = 1.0, 0

    @property
    def rate_scale(self) -> float:
        """Factor on the learning rate."""
        return self._rate_scale

    @rate_scale.setter
    def rate_scale(self, value: float) -> None:
        self._rate_scale = value
        self.program.rate_scale.fill_(value)

    @property
    def retry(self) -> int:
        """How often the fits went back; enters the perturbation."""
        return self._retry

    @retry.setter
    def retry(self, value: int) -> None:
        self._retry = value
        keys = [noise.key(self.config.seed + f, retry=value) for f in self.fits]
        self.program.keys.copy_(torch.tensor(keys))

    def __call__(self) -> None:
        """Advance by one iteration, without waiting for the device."""
        self.iteration += 1
        for part in self._parts:
            part()

    def _compare(self) -> None:
        """Compute the loss and its gradient by torch, through an operator of any kind."""
        watch = self.watch
        with torch.enable_grad():
            image = watch.output.detach().requires_grad_()
            residual = watch.operator(image) - watch.observation
            loss = residual.square().reshape(len(self.fits), -1).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), image)
        self.program.doutput.copy_(gradient)
        watch.loss.copy_(loss.detach())

    def image(self) -> Tensor:
        """Return the averaged output, [F, C, H, W]."""
        return self.watch.image(self.iteration)

    def read(self) -> Statistics:
        """Wait for the device; return the last statistics, averaged over fits."""
        return self.watch.read(self.iteration)

    def _good(self) -> dict[str, Tensor]:
        moment1, moment2 = self.program.moments
        own = {"parameters": self.program.parameters, "moment1": moment1, "moment2": moment2}
        return own | self.watch.good()

    def good_state(self) -> dict[str, Tensor]:
        """Copy what a divergent fit goes back to; parameters lie as the kernels have them."""
        return {name: tensor.clone() for name, tensor in self._good().items()}

    def statistics_state(self) -> dict[str, Tensor]:
        """Return a copy of the window."""
        return {"window": self.watch.window.clone()}

    def fitted(self) -> dict[str, Tensor]:
        """Return copies of the first fit's parameters by name, in order, and its input "z"."""
        published = self.initial.clone()  # a bias that a norm follows stays as it was
        views = self.network.views(published)
        self.program.layout.unpack(self.program.parameters.cpu(), views)
        names = [parameter.name for parameter in self.network.parameters]
        tensors = {name: view[0].clone() for name, view in zip(names, views, strict=True)}
        z = self.program.z[0].permute(2, 0, 1)
        return tensors | {"z": z.to("cpu", torch.float32, copy=True).contiguous()}

    def load(self, state: dict[str, Tensor], iteration: int) -> None:
        """Go on from copied state."""
        self.iteration = iteration
        own = self._good() | {"window": self.watch.window}
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
            self.program.copies.copy_(self.program.parameters)
            self.program.counters.fill_(iteration)


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
    from flashdip.kernels.fused.program import Images, Program, Settings
    from flashdip.kernels.fused.tiles import ARCHITECTURES

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape, defaults = (fits, config.outputs, height, width), FitConfig()
    samples = len(spread(config.outputs * height * width))
    images = Images(
        output=empty(*shape),
        average=empty(*shape),
        loss=empty(fits),
        target=empty(*shape),
        window=empty(defaults.window, fits, samples),
        sample=empty(samples, dtype=torch.int64),
    )
    return Program(
        record(Skip(config), fits),
        Settings(
            defaults.perturbation, defaults.betas, defaults.eps, defaults.average, MOVING_RATE
        ),
        images,
        [defaults.learning_rate] * defaults.iterations,
        config.network_size(height, width),
        dtype,
        ARCHITECTURES[arch],
    ).launches


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
    found = ARCHITECTURES[known[nearest]]._replace(processors=properties.multi_processor_count)
    return found if shared is None else found._replace(shared=min(shared, found.shared))


def _runner(launches: Sequence["Launch"], device: torch.device) -> Callable[[], None]:
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
