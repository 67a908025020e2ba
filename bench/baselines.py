"""What is measured against each other, each a `measure.Variant`, made in its worker.

All fit one network to the same picture: the published loop itself, with and without its host work;
what anyone can have from PyTorch with little effort, bfloat16 under autocast in channels-last
memory with the fused Adam, run eagerly, captured in a CUDA graph, or compiled; and our backends. On
a CPU the first two are also run with an allocator that keeps its pages, as our backends' does.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashdip.bench.cases import PUBLISHED, Settings, configuration, picture
from flashdip.bench.measure import Variant
from flashdip.bench.published import AVERAGE_DECAY, DENOISE, PublishedLoop, network_input, skip
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import DTYPES
from flashdip.engine.errors import UnavailableError
from flashdip.engine.fit import fit
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.kernels.memory import kept_pages, on_glibc

INPUTS = 32  # channels of the published input
_PROCESS = contextlib.ExitStack()  # what holds until the process ends


class PlainLoop:
    """The published network as PyTorch runs it well; one iteration a call of `step`.

    Args:
        target: The observation, [1, C, H, W] float32.
        compiled: Whether network and loss are compiled; on a GPU with all kernels tried out.
        upsample: How the network enlarges: "bilinear", as published, or "nearest".
        precision: "bf16", or "fp32" for a CPU without it, and to see whether what is computed is
            right.
    """

    def __init__(
        self,
        target: Tensor,
        *,
        compiled: bool = False,
        upsample: str = "bilinear",
        precision: str = "bf16",
    ) -> None:
        device, size = target.device, (target.shape[2], target.shape[3])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, z = (
                skip(INPUTS, target.shape[1], **_options(upsample)),
                network_input("noise", INPUTS, size),
            )
        torch.backends.cudnn.benchmark = device.type == "cuda"
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.z = z.to(device).contiguous(memory_format=torch.channels_last)
        self.noise, self.target = torch.zeros_like(self.z), target
        self.average = torch.zeros_like(target)
        self.dtype, on_gpu = DTYPES[precision], device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=0.01, fused=True, capturable=on_gpu
        )
        self.compiled = compiled
        self.draw: Callable[[Tensor], tuple[Tensor, Tensor]] = self._draw
        if compiled:
            self.draw = torch.compile(self._draw, mode="max-autotune" if on_gpu else "default")

    def _draw(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and output."""
        with torch.autocast(z.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.network(z)
        output = output.float()
        return (output - self.target).square().mean(), output

    def step(self) -> None:
        """Advance one iteration."""
        self.noise.normal_()
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        loss, output = self.draw(torch.add(self.z, self.noise, alpha=1 / 30))
        loss.backward()
        self.average.lerp_(output.detach(), 1 - AVERAGE_DECAY)
        self.optimizer.step()
        self.optimizer.zero_grad()


def published(
    size: int, host_work: bool, device: str, upsample: str = "bilinear", kept: bool = False
) -> Variant:
    """Set the published loop up.

    Args:
        size: Side of the picture, in pixels.
        host_work: Whether it does the notebook's work on the host.
        device: Where it runs.
        upsample: How its network enlarges: "bilinear", as published, or "nearest".
        kept: Whether the process keeps freed memory; else PyTorch's allocator is as it comes.

    Raises:
        UnavailableError: Memory cannot be kept here.
    """
    place = resolve_device(device)
    _keep_if(kept, place)
    target = picture(size).to(place)
    loop = PublishedLoop(target, host_work=host_work, options=_options(upsample))
    return variant(loop.step, place)


def plain(
    size: int,
    compiled: bool = False,
    device: str = "cuda",
    upsample: str = "bilinear",
    kept: bool = False,
    precision: str = "bf16",
) -> Variant:
    """Set `PlainLoop` up; compilation is left to its first step. See `published`."""
    place = torch.device(device)
    _keep_if(kept, place)
    observation = picture(size).to(place)
    loop = PlainLoop(observation, compiled=compiled, upsample=upsample, precision=precision)
    return variant(loop.step, place)


def captured(size: int) -> Variant:
    """Set `PlainLoop` up with the whole step in a CUDA graph."""
    place = torch.device("cuda")
    loop = PlainLoop(picture(size).to(place))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN chooses its kernels, Adam makes its state
            loop.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.step()
    return variant(graph.replay, place)


def engine(
    size: int,
    device: str,
    backend: str,
    precision: str,
    fits: int = 1,
    name: str = PUBLISHED,
    reading: bool = False,
    settings: Settings = (),
) -> Variant:
    """Set a backend up as `flashdip.fit` does: a step advances all fits.

    Args:
        size: Side of the picture, in pixels.
        device: Where it runs.
        backend: Its name.
        precision: What activations are stored in.
        fits: F.
        name: Of the preset for denoising.
        reading: Keep and read the statistics of the preset's own stopping rules as often as a fit
            does; else there are none.
        settings: Fields of the preset that are other.
    """
    place = resolve_device(device)
    config = configuration(precision, name, settings)
    if reading:
        config = replace(config, stop=preset("denoise", name).stop)
    chosen, exact, _ = select(backend, place, config)
    observation = picture(size).expand(fits, -1, -1, -1).contiguous()
    step = chosen.prepare(Problem(observation, (3, size, size)), config, place, exact, None)
    keep_pages(place)

    def read_now_and_then() -> None:
        step()
        if step.slots[0].iteration % config.read_every == 0:
            for _ in step.measure(range(fits)):
                pass

    return variant(read_now_and_then if reading else step, place)


def restoration(size: int, name: str) -> Variant:
    """Set a whole restoration up, from the picture to the result: that is one step."""
    problem = Problem(picture(size), (3, size, size), sigma=25 / 255)
    config = replace(preset("denoise", name), precision="fp16")

    def restore() -> None:
        fit(problem, config, backend="triton", device="cuda")

    return variant(restore, torch.device("cuda"))


def variant(step: Callable[[], None], place: torch.device) -> Variant:
    """Return the variant of a step that runs there."""
    if place.type == "cuda":
        return Variant(
            step,
            lambda: torch.cuda.synchronize(place),
            lambda: torch.cuda.max_memory_allocated(place),
        )
    return Variant(step, None if place.type == "cpu" else torch.accelerator.synchronize)


def _options(upsample: str) -> Mapping[str, Any]:
    """Return the options of `published.skip` for the default network that enlarges so."""
    return {**DENOISE, "upsample_mode": upsample}


def _keep_if(kept: bool, place: torch.device) -> None:
    if kept:
        if place.type != "cpu" or not on_glibc():
            raise UnavailableError("pages are kept on a CPU, in glibc's heap, and not here")
        keep_pages(place)


def keep_pages(place: torch.device) -> None:
    """On a CPU, keep freed memory as a fit does, until the process ends."""
    if place.type == "cpu":
        _PROCESS.enter_context(kept_pages())
