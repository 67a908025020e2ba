"""Exported models draw what the engine draws, after distilling what the fit returned."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError, UnavailableError
from flashdip.engine.events import Event, Finished, Progress, Started
from flashdip.engine.metrics import psnr
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.onnx import distil as distilling
from flashdip.engine.onnx.distil import TARGET, distil
from flashdip.engine.onnx.export import Generator, WrongModelError, check, export
from flashdip.engine.onnx.providers import open_session
from flashdip.engine.onnx.render import OPERATORS
from flashdip.engine.result import Result
from tests.engine.onnx.cases import TOPOLOGIES, live, shrunk
from tests.engine.onnx.documented import TENSORRT_OPERATORS, TENSORRT_OPSETS
from tests.engine.onnx.fitted import SIZE, fitted


def drawn(model: bytes, **feeds: np.ndarray[Any, Any]) -> Tensor:
    (image,) = open_session(model, ["cpu"]).run(["image"], feeds)
    return torch.from_numpy(image)[0]


def generator(config: SkipConfig, size: tuple[int, int]) -> Generator:
    """A network as in a fit that is on its way."""
    network = Skip(shrunk(config))
    flat, z = live(network, network.config.network_size(*size))
    names = [parameter.name for parameter in network.parameters]
    views = (view[0].contiguous() for view in network.views(flat))
    weights = dict(zip(names, views, strict=True)) | {"z": z[0]}
    return Generator(FitConfig(network=network.config), weights, size)


@pytest.mark.parametrize("config", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("fp16", [False, True])
def test_every_topology_is_drawn_and_cropped(config: SkipConfig, fp16: bool) -> None:
    """In operators that TensorRT's parser takes, and that `render` lets pass."""
    made = generator(config, (21, 27))
    model = made.model(fp16=fp16)
    image = check(model.SerializeToString(), made, fp16=fp16)
    assert image.shape == (3, 21, 27)
    used = {node.op_type for node in model.graph.node}
    assert used <= TENSORRT_OPERATORS
    assert used <= OPERATORS
    assert {t.name for t in model.graph.initializer} <= {
        i for n in model.graph.node for i in n.input
    }
    (opset,) = model.opset_import
    assert (opset.domain, TENSORRT_OPSETS["first"] <= opset.version <= TENSORRT_OPSETS["last"]) == (
        "",
        True,
    )
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16 if fp16 else onnx.TensorProto.FLOAT}


def test_all_that_render_lets_pass_is_used() -> None:
    used: set[str] = set()
    for config in TOPOLOGIES.values():
        used |= {n.op_type for n in generator(config, (21, 27)).model(fp16=True).graph.node}
    assert used == OPERATORS


def test_z_is_a_default_that_can_be_replaced() -> None:
    made = generator(SkipConfig(down=(8, 8)), (16, 16))
    model = made.model().SerializeToString()
    z = made.weights["z"].numpy()[None]
    assert torch.equal(drawn(model), drawn(model, z=z))
    other = replace(made, weights=made.weights | {"z": made.weights["z"].flip(2)})
    mirrored = np.ascontiguousarray(z[..., ::-1])
    assert psnr(drawn(model, z=mirrored), other.draw()) > 90
    assert psnr(drawn(model, z=mirrored), made.draw()) < 40


def test_distilling_draws_the_picture_that_was_returned() -> None:
    result = fitted()
    raw = export(result, steps=None)
    assert raw.quality == psnr(drawn(raw.model), result.image)
    assert raw.quality < 35
    events: list[Event] = []
    made = export(result, callback=events.append)
    assert made.quality >= TARGET
    assert made.quality == psnr(drawn(made.model), result.image)
    assert not made.interrupted
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    shown = [event.psnr for event in events if isinstance(event, Progress)]
    assert shown[0] == pytest.approx(raw.quality, abs=1e-3)
    assert shown[-1] == pytest.approx(made.quality, abs=1e-3)


def test_the_best_network_is_kept_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is ended at once, when steps run out, and when it only gets worse."""
    result = fitted()
    ended = distil(result, interrupted=lambda: True)
    assert ended.interrupted
    assert ended.steps == 0
    assert torch.equal(ended.weights["head.weight"], result.weights["head.weight"])
    few = distil(result, 7)
    assert few.steps in (5, 7)
    assert ended.psnr < few.psnr < TARGET
    monkeypatch.setattr(distilling, "_RATE", 10.0)
    assert distil(result, 10).psnr == ended.psnr


def test_the_notes_tell_where_it_comes_from() -> None:
    result = fitted()
    made = export(result, fp16=True)
    notes = {entry.key: entry.value for entry in onnx.load_from_string(made.model).metadata_props}
    assert notes == made.notes
    assert notes["problem"] == "denoise, 31x24x3, sigma 2.6/255"
    assert (notes["preset"], notes["seed"], notes["precision"]) == ("quick", "5", "fp16")
    assert notes["distilled"].endswith(" steps")
    assert notes["psnr_to_result"] == f"{made.quality:.2f}"
    assert notes["size"] == "31x24"
    assert FitConfig.from_record(json.loads(notes["config"])).seed == 5
    assert export(result, steps=None).notes["distilled"] == "no"
    assert len(made.model) < 0.7 * len(export(result, steps=None).model)


def test_a_meshgrid_draws_other_sizes() -> None:
    """As the engine does; only the fit's own size has a picture to compare with."""
    result = fitted("meshgrid")
    own = export(result, steps=None)
    made = export(result, steps=None, size=(40, 18))
    assert drawn(made.model).shape == (3, 40, 18)
    assert made.notes["size"] == "18x40"
    assert made.quality == pytest.approx(own.quality, abs=1e-3)


def test_noise_has_one_size() -> None:
    with pytest.raises(ConfigError, match=r"size: expected 31x24.*noise, got 18x40.*meshgrid"):
        export(fitted(), size=(40, 18))
    assert export(fitted(), steps=None, size=SIZE).notes["size"] == "31x24"


@pytest.mark.parametrize(("fp16", "word"), [(False, "a difference of"), (True, "needed 40 dB")])
def test_a_model_that_draws_something_else_is_refused(fp16: bool, word: str) -> None:
    made = generator(SkipConfig(down=(8, 8)), (16, 16))
    model = made.model(fp16=fp16).SerializeToString()
    wrong = made.weights | {"head.bias": made.weights["head.bias"] + 0.1}
    with pytest.raises(WrongModelError, match=word):
        check(model, replace(made, weights=wrong), fp16=fp16)
    nothing = made.weights | {"head.bias": made.weights["head.bias"] * torch.nan}
    with pytest.raises(WrongModelError, match="nan"):
        check(model, replace(made, weights=nothing), fp16=fp16)


def test_a_result_without_a_network_is_refused() -> None:
    result = fitted()
    empty = Result(result.image, result.record, {}, result.picture)
    with pytest.raises(InputError, match="expected the finite weights"):
        export(empty)


def test_what_is_not_installed_is_said_before_the_distilling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(UnavailableError, match=f"pip install {module}$"):
                export(fitted(), callback=lambda event: pytest.fail("it began"))
