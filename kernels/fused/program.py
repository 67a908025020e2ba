"""The whole step as launches: perturb, draw, compare, differentiate, average, update.

A program is planned twice: first without memory, to learn when each tensor is needed, then in one
block of its device.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdip.kernels import noise
from flashdip.kernels.fused import head, observe, plan_network, resample, step
from flashdip.kernels.fused.judge import Rules
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.layout import Layout
from flashdip.kernels.fused.memory import Memory, Place, total
from flashdip.kernels.fused.plan import Plan
from flashdip.kernels.fused.reading import TRAINED, Reading, plan_reading
from flashdip.kernels.fused.record import Head, Input, Node
from flashdip.kernels.fused.tiles import Architecture, Tiles
from flashdip.kernels.resample import Kernel


@dataclass(frozen=True)
class Recorded:
    """A network, recorded for F fits.

    Attributes:
        nodes: What was recorded.
        names: Of the parameter tensors, in order.
        parameters: The tensors it was recorded with, [F, ...published shape], on the meta device.
    """

    nodes: Sequence[Node]
    names: Sequence[str]
    parameters: Sequence[Tensor]

    def layout(self) -> Layout:
        """Return how the parameters that have an effect lie in memory."""
        used = {
            id(tensor)
            for node in self.nodes
            for tensor in vars(node).values()
            if isinstance(tensor, Tensor)
        }
        shapes = [tuple(tensor.shape[1:]) for tensor in self.parameters]
        return Layout(shapes, [id(tensor) in used for tensor in self.parameters])


@dataclass(frozen=True)
class Settings:
    """What of a fit's config is built into the launches.

    Attributes:
        perturbation: Standard deviation of the noise added to the input.
        betas: Decay of Adam's moments.
        eps: Of Adam.
        average: Decay of the average of outputs; None: there is none.
        moving_rate: Of the moving mean and variance.
        rules: Of guard and stopping.
    """

    perturbation: float
    betas: tuple[float, float]
    eps: float
    average: float | None
    moving_rate: float
    rules: Rules


@dataclass(frozen=True)
class Images:
    """The tensors of image size, on the program's device; all float32.

    Attributes:
        output: [F, C, h, w], written by each step.
        average: [F, C, h, w], updated.
        loss: [F], written where there is a target.
        target: The observation, [F, C, h, w], or what `downsample` makes of that; None where an
            operator lies between image and observation that has no kernel.
        mask: What the output is multiplied by before it is compared, [F, C, h, w]; or None.
        downsample: How the output is made smaller before it is compared, see
            `flashdip.kernels.resample`, and how many times; or None.
        window: [length, F, n], see `observe`; None: not kept.
        sample: [n] int64.
        moving_mean: [F, C, h, w]; None: not kept.
        moving_variance: [F].
        measured: Which entries of the target were measured, like it; and with it, or None where
            readings are not taken by launches:
        truth: [F, C, h, w], NaN where unknown.
        sigma: Of the noise, [F], NaN where unknown.
        clipped: Whether the noise was, [F] int32.
    """

    output: Tensor
    average: Tensor
    loss: Tensor
    target: Tensor | None = None
    mask: Tensor | None = None
    downsample: tuple[Kernel, int] | None = None
    window: Tensor | None = None
    sample: Tensor | None = None
    moving_mean: Tensor | None = None
    moving_variance: Tensor | None = None
    measured: Tensor | None = None
    truth: Tensor | None = None
    sigma: Tensor | None = None
    clipped: Tensor | None = None


class Program:
    """The launches of one step of F fits, and their state.

    Attributes:
        launches: To be run in order.
        after: To be run after them, once the gradient of the loss with respect to the output lies
            in `doutput`; empty where the launches compare the output themselves.
        reading: To be run after a step that ends at an iteration to be read; None where the
            launches do not compare.
        doutput: [F, C, h, w] float32.
        z: The network's input, [F, H, W, C] in the storage type.
        parameters: [F, P] float32, in `layout`; `copies` in the storage type.
        moments: Of Adam, twice [F, P] float32.
        counters: Steps done, [F] int32.
        rate_scale: Factor on the learning rate, [F] float32.
        keys: `noise.key` of each fit, [F] int64.
        loss_scale: Gradients in the program are so many times larger: a power of two.
    """

    def __init__(
        self,
        recorded: Recorded,
        settings: Settings,
        images: Images,
        rates: Sequence[float],
        size: tuple[int, int],
        dtype: torch.dtype,
        architecture: Architecture,
    ) -> None:
        self.dtype = dtype
        self.layout = recorded.layout()
        arguments = (recorded, settings, rates, size, architecture)
        device = images.output.device
        self._apart = Memory(torch.device("meta"))
        self._plan(*arguments, _on(images, "meta"), self._apart)
        if device.type != "meta":
            places, names = self.places, [launch.name for launch in self.sequence]
            self._plan(*arguments, images, Memory(device, places))
            assert names == [launch.name for launch in self.sequence]

    @property
    def sequence(self) -> list[Launch]:
        """All launches, in the order in which they run."""
        reading = [] if self.reading is None else self.reading.launches
        return [*self.launches, *self.after, *reading]

    @functools.cached_property
    def places(self) -> list[Place]:
        """Where each tensor lies in the block of memory, and when it is needed."""
        return self._apart.places(self.sequence)

    @property
    def memory(self) -> int:
        """Bytes of device memory, images aside."""
        return total(self.places)

    def _plan(
        self,
        recorded: Recorded,
        settings: Settings,
        rates: Sequence[float],
        size: tuple[int, int],
        architecture: Architecture,
        images: Images,
        memory: Memory,
    ) -> None:
        fits, channels, height, width = images.output.shape
        outputs = next(n for n in recorded.nodes if isinstance(n, Head)).weight.shape[1]
        if outputs != channels:
            raise ValueError(
                f"network: expected as many outputs as the image has channels, {channels}, "
                f"got {outputs}"
            )
        device = images.output.device
        keep = memory.keep
        tiles = Tiles(architecture, self.dtype, fits)
        inputs = next(n for n in recorded.nodes if isinstance(n, Input)).channels
        self.z = perturbed = keep((fits, *size, inputs), self.dtype)
        if settings.perturbation:
            perturbed = memory.share(tuple(self.z.shape), self.dtype)
        plan = Plan(recorded.names, recorded.parameters, self.layout, perturbed, tiles, memory)
        plan_network.forward(plan, recorded.nodes)
        self.counters = keep((fits,), torch.int32)
        self.keys = keep((fits,), torch.int64)
        self.rate_scale = keep((fits,), torch.float32).fill_(1.0)
        self.parameters, self.copies = plan.masters, plan.copies
        shape = tuple(self.parameters.shape)
        self.moments = keep(shape, torch.float32), keep(shape, torch.float32)
        # The gradient of a mean of so many squares underflows 16 bits; that of their sum does not.
        self.loss_scale = float(1 << (channels * height * width).bit_length() - 1)

        first = []
        if settings.perturbation:
            first.append(
                step.perturb(
                    "perturb",
                    self.z,
                    perturbed,
                    noise.table().to(device, torch.float16),
                    self.keys,
                    self.counters,
                    std=settings.perturbation,
                )
            )
        split = self._head(plan, recorded, settings, images, tiles, memory)
        plan_network.backward(plan, recorded.nodes)
        last = []
        if images.window is not None or images.moving_mean is not None:
            last.append(
                observe.observe(
                    "observe",
                    images.output,
                    self.counters,
                    memory,
                    window=images.window,
                    sample=images.sample,
                    mean=images.moving_mean,
                    variance=images.moving_variance,
                    rate=settings.moving_rate,
                )
            )
        last.append(
            step.adam(
                "adam",
                self.parameters,
                None if self.dtype == torch.float32 else self.copies,
                *self.moments,
                memory.block.view(torch.float32),
                plan.sums(),
                step.schedule(rates, settings.betas).to(device),
                self.counters,
                self.rate_scale,
                memory,
                betas=settings.betas,
                eps=settings.eps,
                loss_scale=self.loss_scale,
                gradients=[plan.gradients, *plan.parts.values()],
            )
        )
        self.reading: Reading | None = None
        if images.measured is not None:
            trained = dict(zip(TRAINED, (self.parameters, *self.moments), strict=True))
            copies = None if self.dtype == torch.float32 else self.copies
            counted = self.counters, self.keys, self.rate_scale
            self.reading = plan_reading(
                images, trained, copies, counted, settings.rules, settings.average, memory
            )
        self.plan, self.tiles = plan, tiles
        self.launches: list[Launch] = [*first, *plan.launches[:split]]
        self.after: list[Launch] = plan.launches[split:] + last
        if images.target is not None:
            self.launches, self.after = self.launches + self.after, []

    def _head(
        self,
        plan: Plan,
        recorded: Recorded,
        settings: Settings,
        images: Images,
        tiles: Tiles,
        memory: Memory,
    ) -> int:
        """Plan the head; return how many launches come before the image's gradient is asked for."""
        node = recorded.nodes[-1]
        assert isinstance(node, Head)
        x = plan.map(node.x)
        weight = plan.weight(node.weight)
        bias = None if node.bias is None else plan.master(node.bias)
        dweight = plan.gradient(node.weight)
        dbias = None if node.bias is None else plan.gradient(node.bias)
        tile = tiles.head(x.raw.shape[1] * x.raw.shape[2], x.raw.shape[3])
        sigmoid, decay, scale = node.sigmoid, settings.average, self.loss_scale
        direct = images.target is not None and images.downsample is None
        if not direct:
            self.doutput = memory.keep(tuple(images.output.shape), torch.float32)
            plan.launches.append(
                head.draw(
                    "head forward",
                    x,
                    weight,
                    bias,
                    images.output,
                    images.average,
                    decay=decay,
                    sigmoid=sigmoid,
                    tile=tile,
                )
            )
        if images.downsample is not None:
            plan.launches += self._downsample(images, memory)
        split = len(plan.launches)
        norm, pull, du = plan.take(node.x)
        assert norm is not None and pull is not None and du is not None
        if images.target is None or images.downsample is not None:
            launch = head.backward(
                "head backward",
                x,
                weight,
                bias,
                self.doutput,
                du,
                norm,
                pull,
                dweight,
                dbias,
                loss_scale=scale,
                sigmoid=sigmoid,
                tile=tile,
                memory=memory,
            )
        else:
            launch = head.head(
                "head",
                x,
                weight,
                bias,
                images.target,
                images.mask,
                images.output,
                images.average,
                images.loss,
                du,
                norm,
                pull,
                dweight,
                dbias,
                decay=decay,
                loss_scale=scale,
                sigmoid=sigmoid,
                tile=tile,
                memory=memory,
            )
        plan.launches.append(launch)
        return split

    def _downsample(self, images: Images, memory: Memory) -> list[Launch]:
        """Return what compares the image where it is made smaller, and differentiates that."""
        assert images.target is not None and images.downsample is not None
        residual = memory.share(tuple(images.target.shape), torch.float32)
        how = (*images.downsample, memory)
        return [
            resample.residual(
                "residual", images.output, images.target, residual, images.loss, *how
            ),
            resample.adjoint("residual adjoint", residual, self.doutput, *how),
        ]


def _on(images: Images, device: str) -> Images:
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(images).items()
    }
    return Images(**moved)
