"""Exported models on GPU providers: whether they draw what the engine draws, then how fast."""

from functools import partial
from typing import Any

import torch

from flashdip.bench.baselines import variant
from flashdip.bench.cases import configuration
from flashdip.bench.correct import WrongResultError
from flashdip.bench.measure import Variant, worker
from flashdip.engine.backends.slots import initial_input
from flashdip.engine.errors import UnavailableError
from flashdip.engine.metrics import psnr
from flashdip.engine.networks.skip import Skip
from flashdip.engine.onnx.export import Generator
from flashdip.engine.onnx.providers import open_session

PROVIDERS = ("tensorrt", "cuda")
CLOSE = 50.0  # dB; TensorRT rounds float32 to TF32
_STEPS, _WARMUP = 100, 10


def drawing(size: int, provider: str) -> Variant:
    """Set up the exported network of `quick` on a provider; each step draws its picture.

    Raises:
        UnavailableError: The provider cannot be used here, or leaves nodes to the CPU.
        WrongResultError: It does not draw what the engine draws.
    """
    config = configuration("fp32", "quick")
    network = Skip(config.network)
    names = [parameter.name for parameter in network.parameters]
    views = network.views(network.initialise(config.seed)[None])
    weights = dict(zip(names, (view[0].contiguous() for view in views), strict=True))
    weights["z"] = initial_input(config, (size, size), config.seed)
    made = Generator(config, weights, (size, size))
    session = open_session(bytes(made.model().SerializeToString()), [provider])
    run = partial(session.run, ["image"], {})
    quality = psnr(torch.from_numpy(run()[0])[0], made.draw())
    if not quality >= CLOSE:
        raise WrongResultError(
            f"{provider}: expected the engine's picture within {CLOSE:.0f} dB, got {quality:.1f} dB"
        )
    return variant(run, torch.device("cpu"))  # the picture is on the host when a run is over


def drawings(size: int, limit: float) -> dict[str, Any]:
    """Return seconds a picture by provider, or the reason why it is left out."""
    seconds, left_out = {}, {}
    for name in PROVIDERS:
        try:
            with worker(drawing, size, name, limit=limit / len(PROVIDERS)) as running:
                seconds[name] = running.seconds(steps=_STEPS, warmup=_WARMUP)
        except UnavailableError as error:
            left_out[name] = str(error)
    return {"pictures": seconds, "left_out": left_out}
