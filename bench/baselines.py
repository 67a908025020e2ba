"""What is measured against each other, each a `measure.Variant`, made in its worker.

All fit one network to the same picture: the published loop itself, with and without its host work;
what anyone can have from PyTorch with little effort, bfloat16 under autocast in channels-last
memory with the fused Adam, run eagerly, captured in a CUDA graph, or compiled; and our backends.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashdip.bench.cases import PUBLISHED, configuration, picture
from flashdip.bench.measure import Variant
from flashdip.bench.published import AVERAGE_DECAY, DENOISE, PublishedLoop, network_input, skip
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.fit import fit
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.kernels.memory import kept_pages

INPUTS = 32  # channels of the published input


class PlainLoop:
    """The published network in bfloat16, as PyTorch runs it well; one iteration a call of `step`.

    Args:
        target: The observation, [1, C, H, W] float32.
        compiled: Whether network and loss are compiled, with all kernels tried out.
    """

    def __init__(self, target: Tensor, *, compiled: bool = False) -> None:
        device, size = target.device, (target.shape[2], target.shape[3])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, z = (
                skip(INPUTS, target.shape[1], **DENOISE),
                network_input("noise", INPUTS, size),
            )
        torch.backends.cudnn.benchmark = device.type == "cuda"
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.z = z.to(device).contiguous(memory_format=torch.channels_last)
        self.noise, self.target = torch.zeros_like(self.z), target
        self.average = torch.zeros_like(target)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=0.01, fused=True, capturable=on_gpu
        )
        self.compiled = compiled
        self.draw: Callable[[Tensor], tuple[Tensor, Tensor]] = self._draw
        if compiled:
            self.draw = torch.compile(self._draw, mode="max-autotune")

    def _draw(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and output."""
        with torch.autocast(z.device.type, torch.bfloat16):
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


def published(size: int, host_work: bool, device: str) -> Variant:
    """Set the published loop up."""
    place = resolve_device(device)
    return variant(PublishedLoop(picture(size).to(place), host_work=host_work).step, place)


def plain(size: int, compiled: bool = False) -> Variant:
    """Set `PlainLoop` up; compilation is left to its first step."""
    place = torch.device("cuda")
    return variant(PlainLoop(picture(size).to(place), compiled=compiled).step, place)


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
    """
    place = resolve_device(device)
    config = configuration(precision, name)
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


def keep_pages(place: torch.device) -> None:
    """On a CPU, keep freed memory as a fit does, until the process ends."""
    if place.type == "cpu":
        contextlib.ExitStack().enter_context(kept_pages())
