"""What the Triton kernels are compared with on a GPU, and they: each a `measure.Variant`.

All fit the published denoising network to the same picture: the published loop itself, with and
without its host work; and what anyone can have from PyTorch with little effort: bfloat16 under
autocast in channels-last memory with the fused Adam, run eagerly, captured in a CUDA graph, or
compiled.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashdip.bench.measure import Variant
from flashdip.bench.published import AVERAGE_DECAY, DENOISE, PublishedLoop, network_input, skip
from flashdip.bench.table import configuration, picture
from flashdip.engine.backends import TRITON
from flashdip.engine.fit import fit
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem

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


def published(size: int, host_work: bool) -> Variant:
    """Set the published loop up."""
    return _variant(PublishedLoop(picture(size).cuda(), host_work=host_work).step)


def plain(size: int, compiled: bool = False) -> Variant:
    """Set `PlainLoop` up; compilation is left to its first step."""
    return _variant(PlainLoop(picture(size).cuda(), compiled=compiled).step)


def captured(size: int) -> Variant:
    """Set `PlainLoop` up with the whole step in a CUDA graph."""
    loop = PlainLoop(picture(size).cuda())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN chooses its kernels, Adam makes its state
            loop.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.step()
    return _variant(graph.replay)


def triton(size: int, fits: int, precision: str) -> Variant:
    """Set our kernels up: a step advances all fits."""
    observation = picture(size).expand(fits, -1, -1, -1).contiguous()
    problem, config = Problem(observation, (3, size, size)), configuration(precision)
    place = torch.device("cuda")
    return _variant(TRITON.prepare(problem, config, place, precision, None))


def restoration(size: int, name: str) -> Variant:
    """Set a whole restoration up, from the picture to the result: that is one step."""
    problem = Problem(picture(size), (3, size, size), sigma=25 / 255)
    config = replace(preset("denoise", name), precision="fp16")

    def restore() -> None:
        fit(problem, config, backend="triton", device="cuda")

    return _variant(restore)


def _variant(step: Callable[[], None]) -> Variant:
    return Variant(step, torch.cuda.synchronize, torch.cuda.max_memory_allocated)
