"""The speed yardstick: the published Deep Image Prior network and fitting loop, literally.

Every speed ratio of this project divides by what stands here, so nothing in it is tuned and it
depends on nothing of the project. What looks wasteful is the point: a padding module before every
convolution (of width 0 before a 1x1), biases that the next norm cancels, a concatenation that is
normalised as one tensor, fresh normal draws, and torch's own Adam.

Source: DmitryUlyanov/deep-image-prior: models/skip.py, models/common.py, models/downsampler.py,
utils/common_utils.py, denoising.ipynb.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

AVERAGE_DECAY = 0.99
SHOW_EVERY = 100
BACKTRACK_DB = -5.0
DENOISE: Mapping[str, Any] = {
    "num_channels_down": (128,) * 5,
    "num_channels_up": (128,) * 5,
    "num_channels_skip": (4,) * 5,
    "upsample_mode": "bilinear",
    "pad": "reflection",
}


def kernel(
    factor: int,
    kind: str,
    phase: float,
    *,
    width: int | None = None,
    support: int | None = None,
    sigma: float | None = None,
) -> NDArray[np.float64]:
    """Make the published downsampling kernel, [K, K], entries summing to 1.

    Args:
        factor: Downsampling factor.
        kind: "lanczos2", "lanczos3", "gauss12", "gauss1sq2", or, with the three options below,
            "lanczos", "gauss" or "box".
        phase: 0 for a kernel centred on a pixel, 0.5 for one centred between pixels, whose side
            is `width - 1` (not so for "box").
        width: Side of the kernel at phase 0.
        support: Lobes of the lanczos window.
        sigma: Of the gauss kernel, in units of two taps.
    """
    if kind in ("lanczos2", "lanczos3"):
        support = int(kind[-1])
        kind, width = "lanczos", 2 * support * factor + 1
    elif kind in ("gauss12", "gauss1sq2"):
        width, sigma = (7, 0.5) if kind == "gauss12" else (9, 1 / math.sqrt(2))
        kind = "gauss"
    if width is None or phase not in (0, 0.5):
        raise ValueError(f"kernel {kind!r}: expected a width and a phase of 0 or 0.5")
    side = width - 1 if phase == 0.5 and kind != "box" else width
    centre = (width - 1) / 2 - phase
    distance = np.abs(np.arange(side) - centre)
    if kind == "box" and phase == 0.5:
        taps = np.ones(side)
    elif kind == "gauss" and phase == 0 and sigma:
        taps = np.exp(-((distance / 2) ** 2) / (2 * sigma**2))
    elif kind == "lanczos" and support:
        taps = np.sinc(distance / factor) * np.sinc(distance / factor / support)
    else:
        raise ValueError(f"kernel {kind!r} at phase {phase}: not a published combination")
    square = np.outer(taps, taps)
    result: NDArray[np.float64] = square / square.sum()
    return result


def downsampler(
    factor: int,
    kind: str = "lanczos2",
    phase: float = 0.5,
    *,
    channels: int = 3,
    preserve_size: bool = True,
    width: int | None = None,
    support: int | None = None,
    sigma: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Build the published downsampler: a dense convolution whose off-diagonal filters are zero.

    Args:
        factor: Downsampling factor; also the stride.
        kind: See `kernel`, as are `phase`, `width`, `support` and `sigma`.
        channels: Channels of its input and output.
        preserve_size: Replicate the border first, so that [N, C, H, W] becomes
            [N, C, H / factor, W / factor].
        dtype: Of the weights; the published float32 rounds the kernel. They have `requires_grad`
            set, as published: the loop gives its optimiser the network's parameters only.
    """
    taps = kernel(factor, kind, phase, width=width, support=support, sigma=sigma)
    side = len(taps)
    convolution = nn.Conv2d(channels, channels, side, stride=factor, dtype=dtype)
    with torch.no_grad():
        convolution.weight.zero_()
        assert convolution.bias is not None
        convolution.bias.zero_()
        for channel in range(channels):
            convolution.weight[channel, channel] = torch.from_numpy(taps)
    border = (side - 1) // 2 if side % 2 else (side - factor) // 2
    return nn.Sequential(*([nn.ReplicationPad2d(border)] if preserve_size else []), convolution)


class Concat(nn.Module):
    """Feed one input to several branches and join their outputs along the channels.

    Outputs of unequal size are first cropped, centred, to the smallest height and width.
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        height, width = (min(y.shape[side] for y in maps) for side in (2, 3))
        cropped = []
        for y in maps:
            top, left = (y.shape[2] - height) // 2, (y.shape[3] - width) // 2
            cropped.append(y[:, :, top : top + height, left : left + width])
        return torch.cat(cropped, dim=1)


class Swish(nn.Module):
    """x sigmoid(x), in two operations as published."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def activation(name: str | Callable[[], nn.Module]) -> nn.Module:
    """Make an activation: "LeakyReLU" (slope 0.2, in place), "Swish", "ELU", "none", or a class."""
    if callable(name):
        return name()
    makers: dict[str, Callable[[], nn.Module]] = {
        "LeakyReLU": lambda: nn.LeakyReLU(0.2, inplace=True),
        "Swish": Swish,
        "ELU": nn.ELU,
        "none": nn.Sequential,
    }
    return makers[name]()


def convolution(
    inputs: int,
    outputs: int,
    size: int,
    bias: bool,
    pad: str,
    stride: int = 1,
    downsample_mode: str = "stride",
) -> nn.Sequential:
    """Make a padded convolution, downsampled by its stride or by a layer after it.

    Args:
        inputs: Channels in; `outputs`: channels out.
        size: Side of the filters; (size - 1) // 2 pixels are padded on each side.
        bias: See `skip`.
        pad: "reflection" (a module of its own) or "zero" (inside the convolution).
        stride: 1, or the downsampling factor.
        downsample_mode: "stride", "avg", "max", "lanczos2" or "lanczos3".
    """
    pool: list[nn.Module] = []
    if stride != 1 and downsample_mode != "stride":
        if downsample_mode in ("lanczos2", "lanczos3"):
            pool = [downsampler(stride, downsample_mode, 0.5, channels=outputs)]
        else:
            pool = [{"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[downsample_mode](stride, stride)]
        stride = 1
    border = (size - 1) // 2
    layers: list[nn.Module] = []
    if pad == "reflection":
        layers.append(nn.ReflectionPad2d(border))
        border = 0
    elif pad != "zero":
        raise ValueError(f"pad: expected 'reflection' or 'zero', got {pad!r}")
    layers.append(nn.Conv2d(inputs, outputs, size, stride, padding=border, bias=bias))
    return nn.Sequential(*layers, *pool)


def _per_level(value: Any, levels: int) -> list[Any]:
    values = [value] * levels if isinstance(value, int | str) else list(value)
    assert len(values) == levels
    return values


def skip(
    num_input_channels: int = 2,
    num_output_channels: int = 3,
    num_channels_down: Sequence[int] = (16, 32, 64, 128, 128),
    num_channels_up: Sequence[int] = (16, 32, 64, 128, 128),
    num_channels_skip: Sequence[int] = (4, 4, 4, 4, 4),
    filter_size_down: int | Sequence[int] = 3,
    filter_size_up: int | Sequence[int] = 3,
    filter_skip_size: int = 1,
    need_sigmoid: bool = True,
    need_bias: bool = True,
    pad: str = "zero",
    upsample_mode: str | Sequence[str] = "nearest",
    downsample_mode: str | Sequence[str] = "stride",
    act_fun: str | Callable[[], nn.Module] = "LeakyReLU",
    need1x1_up: bool = True,
) -> nn.Sequential:
    """Build the published hourglass network, [1, channels in, H, W] to [1, channels out, H, W].

    Options and their defaults have the published names, values and meaning; those that may be a
    list have one entry per level, the full-resolution level first.

    Args:
        num_input_channels: Channels of the input z.
        num_output_channels: Channels of the picture.
        num_channels_down: Channels of each level's two encoder convolutions.
        num_channels_up: Channels of each level's decoder convolutions.
        num_channels_skip: Channels of each level's skip branch; 0 for none.
        filter_size_down: Filter sides of the encoder; likewise `filter_size_up` of the decoder
            and `filter_skip_size` of the skip branches.
        need_sigmoid: Whether the output is squeezed into (0, 1).
        need_bias: Whether convolutions have biases.
        pad: "zero" or "reflection".
        upsample_mode: "nearest" or "bilinear".
        downsample_mode: "stride", "avg", "max", "lanczos2" or "lanczos3".
        act_fun: See `activation`.
        need1x1_up: Whether each level ends with a 1x1 convolution.
    """
    levels = len(num_channels_down)
    sizes_down, sizes_up = _per_level(filter_size_down, levels), _per_level(filter_size_up, levels)
    upsamples, downs = _per_level(upsample_mode, levels), _per_level(downsample_mode, levels)

    def block(inputs: int, outputs: int, size: int, stride: int = 1, mode: str = "stride") -> Any:
        layer = convolution(inputs, outputs, size, need_bias, pad, stride, mode)
        return [layer, nn.BatchNorm2d(outputs), activation(act_fun)]

    def level(i: int, inputs: int) -> list[nn.Module]:
        down, up, aside = num_channels_down[i], num_channels_up[i], num_channels_skip[i]
        branch = nn.Sequential(*block(inputs, aside, filter_skip_size)) if aside else None
        deeper = block(inputs, down, sizes_down[i], 2, downs[i]) + block(down, down, sizes_down[i])
        below = down
        if i + 1 < levels:
            deeper.append(nn.Sequential(*level(i + 1, down)))
            below = num_channels_up[i + 1]
        deeper.append(nn.Upsample(scale_factor=2, mode=upsamples[i]))
        trunk = nn.Sequential(*deeper)
        return [
            trunk if branch is None else Concat(branch, trunk),
            nn.BatchNorm2d(aside + below),
            *block(aside + below, up, sizes_up[i]),
            *(block(up, up, 1) if need1x1_up else []),
        ]

    head = convolution(num_channels_up[0], num_output_channels, 1, need_bias, pad)
    body = level(0, num_input_channels)
    return nn.Sequential(*body, head, *([nn.Sigmoid()] if need_sigmoid else []))


def numpy_psnr(truth: NDArray[Any], image: NDArray[Any]) -> float:
    """PSNR in dB as the notebook's scikit-image did it, data range checked on every call."""
    if truth.min() < -1 or truth.max() > 1:
        raise ValueError("psnr: expected a float image in [-1, 1]")
    error = np.mean(np.square(truth - image), dtype=np.float64)
    return float(10 * np.log10((1 if truth.min() >= 0 else 4) / error))


def network_input(kind: str, depth: int, size: tuple[int, int]) -> Tensor:
    """Make the published input z, [1, depth, H, W]: "noise", 0.1 U(0, 1), or "meshgrid"."""
    if kind == "noise":
        return torch.zeros(1, depth, *size).uniform_() * 0.1
    assert kind == "meshgrid" and depth == 2
    rows, columns = (torch.arange(side) / (side - 1) for side in size)
    return torch.stack([columns.expand(size), rows[:, None].expand(size)])[None]


class PublishedLoop:
    """The published fitting loop, one iteration a call of `step`.

    Attributes:
        network: The module being fitted, in training mode throughout.
        output: Last iterate, [1, C, H, W]; None before the first step.
        average: 0.99 average + 0.01 output over the steps, started at the first output.
        iteration: Iterations accepted so far.
    """

    def __init__(
        self,
        target: Tensor,
        *,
        options: Mapping[str, Any] = DENOISE,
        mask: Tensor | None = None,
        downsampler: nn.Module | None = None,
        size: tuple[int, int] | None = None,
        learning_rate: float = 0.01,
        perturbation: float = 1 / 30,
        input_depth: int = 32,
        input_kind: str = "noise",
        truth: Tensor | None = None,
        host_work: bool = False,
        seed: int = 0,
    ) -> None:
        """Build network, input and optimiser on the target's device and in its dtype.

        Args:
            target: The observation, [1, C, H, W] in [0, 1], float32 or float64.
            options: Options of `skip` but its channels in and out.
            mask: [1, 1 or C, H, W], 1 where a pixel is known; the loss is over output times mask.
            downsampler: Applied to the output before the loss.
            size: (H, W) of the output; the target's unless a downsampler says otherwise.
            learning_rate: Of Adam, constant.
            perturbation: Standard deviation of the noise that each iteration adds to the input.
            input_depth: Channels of the input.
            input_kind: "noise" or "meshgrid" (two channels).
            truth: What the notebook's PSNRs are taken against; the target if there is none.
            host_work: Do what the denoising notebook does on the host in every iteration: three
                PSNRs in numpy, the copies to the host that they need, a line of text (to nowhere),
                and the test for a fall of 5 dB, with a copy of all parameters to the CPU (made
                on a CPU too, where the notebook's would be an alias).
            seed: Of weights, input and noise.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = skip(input_depth, target.shape[1], **options)
            z = network_input(input_kind, input_depth, size or (target.shape[2], target.shape[3]))
        if target.is_cuda:
            torch.backends.cudnn.benchmark = True
        self.network = network.to(target)
        self.output: Tensor | None = None
        self.average: Tensor | None = None
        self.iteration = 0
        self._loss: Tensor | None = None
        self._target, self._mask = target, mask
        self._downsampler = None if downsampler is None else downsampler.to(target)
        self._saved = z.to(target)
        self._noise = self._saved.clone()
        self._perturbation = perturbation
        self._generator = torch.Generator(target.device).manual_seed(seed)
        self._mse = nn.MSELoss()
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate)
        self._host_work, self._last_psnr = host_work, 0.0
        self._target_np = target[0].cpu().numpy()
        self._truth_np = self._target_np if truth is None else truth[0].cpu().numpy()
        self._last_parameters: list[Tensor] = []

    @property
    def loss(self) -> float:
        """Mean squared error of the last step; waits for the device."""
        assert self._loss is not None, "loss: no step was made yet"
        return float(self._loss)

    def step(self) -> None:
        """Advance one iteration."""
        self._optimizer.zero_grad()
        z = self._saved
        if self._perturbation > 0:
            z = z + self._noise.normal_(generator=self._generator) * self._perturbation
        output = self.network(z)
        self.output = output.detach()
        if self.average is None:
            self.average = self.output
        else:
            self.average = self.average * AVERAGE_DECAY + self.output * (1 - AVERAGE_DECAY)
        if self._mask is not None:
            loss = self._mse(output * self._mask, self._target * self._mask)
        elif self._downsampler is not None:
            loss = self._mse(self._downsampler(output), self._target)
        else:
            loss = self._mse(output, self._target)
        loss.backward()
        self._loss = loss.detach()
        if not self._host_work or self._work_on_host():
            self.iteration += 1
        self._optimizer.step()

    def _work_on_host(self) -> bool:
        """Do the notebook's host work; return False if it went back to the last parameters."""
        assert self.output is not None and self.average is not None
        noisy = numpy_psnr(self._target_np, self.output.cpu().numpy()[0])
        clean = numpy_psnr(self._truth_np, self.output.cpu().numpy()[0])
        smooth = numpy_psnr(self._truth_np, self.average.cpu().numpy()[0])
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            print(f"{self.iteration:05d} {self.loss:f} {noisy:f} {clean:f} {smooth:f}", end="\r")
        if self.iteration % SHOW_EVERY == 0:
            return True
        parameters = list(self.network.parameters())
        if noisy - self._last_psnr < BACKTRACK_DB:
            for parameter, last in zip(parameters, self._last_parameters, strict=True):
                parameter.detach().copy_(last)
            return False
        self._last_parameters = [p.detach().to("cpu", copy=True) for p in parameters]
        self._last_psnr = noisy
        return True
