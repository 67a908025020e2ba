"""A fitted network as an ONNX model that draws its picture: no input is needed.

The input z lies in the model as the default of its input. Operators are those of the standard
domain, shapes are fixed, so that the file runs as it is under TensorRT and in browsers.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flashdip.engine.backends.slots import initial_input
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, FlashDIPError
from flashdip.engine.events import Callback
from flashdip.engine.metrics import psnr
from flashdip.engine.networks.skip import Skip
from flashdip.engine.onnx.distil import STEPS, distil
from flashdip.engine.onnx.forward import Forward
from flashdip.engine.onnx.graph import Array, Graph
from flashdip.engine.onnx.providers import load, open_session
from flashdip.engine.result import Result
from flashdip.engine.warm import warm
from flashdip.kernels import native

if TYPE_CHECKING:
    from onnx import ModelProto

CLOSE = 1e-4  # in [0, 1]: how near the model in float32 must come to the engine, at every pixel
CLOSE_FP16 = 40.0  # dB: how near the one in float16 must


class WrongModelError(FlashDIPError):
    """An exported model does not draw what the engine draws."""


@dataclass(frozen=True, eq=False)
class Generator:
    """A network, what it is given, and what it draws.

    Attributes:
        config: Of the fit; its network's outputs are the picture's channels.
        weights: Parameters by name in their published shapes, and the input "z", [C, h, w].
        size: Height and width of the picture; the network may draw more, which is cut off.
    """

    config: FitConfig
    weights: dict[str, Tensor]
    size: tuple[int, int]

    def resized(self, size: tuple[int, int]) -> "Generator":
        """Return the same network for another size of picture.

        Raises:
            ConfigError: Its input is noise, which exists at one size alone.
        """
        if size == self.size:
            return self
        if self.config.input != "meshgrid":
            height, width = self.size
            raise ConfigError(
                f"size: expected {width}x{height}, the fit's own, since its input is noise, got "
                f"{size[1]}x{size[0]}: only fits with input=meshgrid have other sizes"
            )
        z = initial_input(self.config, size, self.config.seed)
        return dataclasses.replace(self, weights=self.weights | {"z": z}, size=size)

    def draw(self) -> Tensor:
        """Return what the engine draws, [C, H, W] float32 on the CPU."""
        network = Skip(self.config.network)
        parameters = [self.weights[p.name][None] for p in network.parameters]
        with torch.no_grad():
            image = network.forward(native, parameters, self.weights["z"][None])
        return image[0, :, : self.size[0], : self.size[1]].contiguous()

    def model(self, *, fp16: bool = False) -> "ModelProto":
        """Return the model: input "z" with a default, output "image", [1, C, H, W] float32.

        Args:
            fp16: Whether it computes, and keeps its weights and z, in float16.
        """
        kind = np.float16 if fp16 else np.float32
        graph, network = Graph("generator"), Skip(self.config.network)

        def array(name: str) -> Array:
            return self.weights[name].numpy().astype(kind)

        z = graph.default("z", array("z")[None])
        parameters = [graph.constant(array(p.name), p.name) for p in network.parameters]
        image = network.forward(Forward(), parameters, z)
        height, width = self.size
        image = image.crop({2: (0, height), 3: (0, width)})
        if fp16:
            image = graph.node("Cast", image, to=1)  # 1: float32
        graph.output(image, "image")
        return graph.model()


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported model.

    Attributes:
        model: The file's content.
        notes: What it tells of where it comes from.
        quality: PSNR of what the network draws at its own size against the fit's picture, in dB.
        interrupted: Whether the distilling was ended before its time.
    """

    model: bytes
    notes: dict[str, str]
    quality: float
    interrupted: bool


def export(
    result: Result,
    *,
    fp16: bool = False,
    steps: int | None = STEPS,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    callback: Callback = lambda event: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Exported:
    """Distil the network of a fit, and make a model of it that was compared with the engine.

    Args:
        result: Of a single fit.
        fp16: Whether the model computes, and keeps its weights and z, in float16.
        steps: The most iterations of distilling; None leaves the network as the fit left it.
        size: Height and width of the model's picture, for fits with input "meshgrid"; None: those
            of the fit's picture.
        device: Where to distil; see `fit`.
        callback: Receives the events of the distilling.
        interrupted: Asked while distilling; when it returns True the best network so far is taken.

    Raises:
        InputError: The result has no network, or `size` is not possible.
        UnavailableError: onnx or onnxruntime is not installed.
        WrongModelError: The model does not draw what the engine draws.
    """
    onnx, _ = load("onnx"), load()  # before it takes time
    config = FitConfig.from_record(result.record["config"])
    height, width = result.image.shape[1:]
    generator = Generator(config, warm(result, config, (height, width)).weights, (height, width))
    size = size or generator.size
    generator.resized(size)  # refused before the distilling, not after it
    distilled = None
    if steps is not None:
        distilled = distil(result, steps, device=device, callback=callback, interrupted=interrupted)
        generator = dataclasses.replace(generator, weights=distilled.weights)
    resized = generator.resized(size)
    model = resized.model(fp16=fp16)
    drawn = check(bytes(model.SerializeToString()), resized, fp16=fp16)
    quality = psnr(drawn if size == generator.size else generator.draw(), result.image)
    notes = _notes(result) | {
        "distilled": "no" if distilled is None else f"{distilled.steps} steps",
        "psnr_to_result": f"{quality:.2f}",
        "precision": "fp16" if fp16 else "fp32",
        "size": "x".join(map(str, reversed(size))),
    }
    onnx.helper.set_model_props(model, notes)
    stopped = distilled is not None and distilled.interrupted
    return Exported(bytes(model.SerializeToString()), notes, quality, stopped)


def _notes(result: Result) -> dict[str, str]:
    """Return what a model tells of the fit that it comes from."""
    record, picture = result.record, result.picture
    sigma = record["sigma"]
    noise = "" if sigma is None else f", sigma {255 * sigma:.1f}/255"
    channels, height, width = result.image.shape
    dress = {"dtype": picture.dtype, "low": picture.low, "high": picture.high}
    return {
        "flashdip": metadata.version("flashdip"),
        "preset": str(record.get("preset", "none")),
        "problem": f"{record.get('task', 'own operator')}, {width}x{height}x{channels}{noise}",
        "seed": str(record["seed"]),
        "iteration": str(record["best_iteration"]),
        "picture": json.dumps(dress),
        "config": json.dumps(record["config"]),
    }


def check(model: bytes, generator: Generator, *, fp16: bool) -> Tensor:
    """Return what the model draws on the CPU, after comparing it with what the engine draws.

    Raises:
        WrongModelError: They differ.
    """
    load("onnx").checker.check_model(model, full_check=True)
    (output,) = open_session(model, ["cpu"]).run(["image"], {})
    drawn, expected = torch.from_numpy(output)[0], generator.draw()
    if fp16:
        quality = psnr(drawn, expected)
        wrong = not quality >= CLOSE_FP16  # NaN is wrong too
        found = f"{quality:.1f} dB, needed {CLOSE_FP16:.0f} dB: export it without --fp16"
    else:
        difference = float((drawn - expected).abs().max())
        wrong = not difference <= CLOSE
        found = f"a difference of {difference:.2g}, allowed {CLOSE:.0e}: please report it"
    if wrong:
        raise WrongModelError(f"model: expected it to draw what the engine draws, got {found}")
    return drawn
