"""What a fit leaves behind: the image, the record of how it came about, and the fitted network."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flashdip.engine import images
from flashdip.engine.errors import InputError, OutputError
from flashdip.engine.files import atomic, check_writable, one_line
from flashdip.engine.images import Picture

PICTURES = ("restored.png", "restored.tif")  # one of them holds the picture of a saved result
UNCERTAINTY = "uncertainty.tif"  # beside it, if there were several runs
# Among the saved tensors: the prefix of those of `measurement`, and one name.
_MEASUREMENT, _UNCERTAINTY = "measurement.", "uncertainty"


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of a fit.

    Attributes:
        image: The restored image, [C, H, W] float32 in [0, 1], on the CPU.
        record: What `result.json` holds: plain values, lists and dictionaries.
        weights: The network as the selected iteration left it: its parameters by name in the
            published order and shape, its input "z" [C, H, W], and "image".
        picture: The restored image with the depth, range, alpha and profile that the input had.
        measurement: What was fitted, without the axis of fits, on the CPU: "observation";
            "residual", that less what would be measured of the image before known pixels were
            pasted into it, 0 where nothing was measured; "measured", bool, where not all was.
        uncertainty: Of several runs, the standard deviation of their images, like `image`; None of
            a single one.
    """

    image: Tensor
    record: dict[str, Any]
    weights: dict[str, Tensor]
    picture: Picture
    measurement: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: Tensor | None = None

    @property
    def psnr(self) -> float | None:
        """PSNR against the truth in dB; None if none was given."""
        return self.record["psnr"]  # type: ignore[no-any-return]

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return int(self.record["iterations"])

    @property
    def best_iteration(self) -> int:
        """Iteration whose averaged output the image is."""
        return int(self.record["best_iteration"])

    @property
    def stop_reason(self) -> str:
        """The rule that ended the fit; "iterations", "interrupted" or "diverged"."""
        return str(self.record["stop_reason"])

    def dressed(self, like: Picture, image: Tensor | None = None) -> "Result":
        """Return the result with the depth, range, alpha and profile of another picture.

        Args:
            like: Where these come from.
            image: Another image to hold, [C, H, W]; None: the same.
        """
        image = self.image if image is None else image
        return dataclasses.replace(self, image=image, picture=like.with_pixels(image))

    def write(self, path: str | Path, *, force: bool = False) -> None:
        """Write the picture alone; the format follows the suffix.

        Raises:
            OutputError: The file exists and `force` is not set, or it cannot be written.
        """
        images.save(Path(path), self.picture, force=force)

    def write_record(
        self, path: str | Path, *, force: bool = False, picture: str | None = None
    ) -> None:
        """Write the record as JSON.

        Args:
            path: The file.
            force: Whether it may exist.
            picture: Name of the picture that belongs to it, recorded too.

        Raises:
            OutputError: The file exists and `force` is not set, or it cannot be written.
        """
        record = self.record if picture is None else self.record | {"picture": picture}
        text = json.dumps(record, indent=1, allow_nan=False)
        with atomic(Path(path), force=force) as temporary:
            temporary.write_text(text + "\n")

    def report(
        self, path: str | Path, *, name: str = "restored picture", force: bool = False
    ) -> None:
        """Write a page about the restoration: one HTML file that needs no network.

        Args:
            path: The file.
            name: What was restored, as the page's title.
            force: Whether the file may exist.

        Raises:
            OutputError: The file exists and `force` is not set, or it cannot be written.
        """
        from flashdip.engine.report import render

        text = render(self, one_line(name))
        with atomic(Path(path), force=force) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def save(self, directory: str | Path, *, force: bool = False) -> None:
        """Write the picture, `result.json` and `fit.safetensors` into a directory, made if missing.

        The picture is a PNG, or a TIFF where it is float or has channels that PNG has not. Of
        several runs `uncertainty.tif` shows the standard deviation, float32 in the image's unit.

        Raises:
            OutputError: A file exists and `force` is not set, or one cannot be written.
        """
        from safetensors.torch import save

        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{directory}: cannot be made: {error.strerror}") from None
        plain = self.image.shape[0] in (1, 3) and self.picture.dtype != "float32"
        picture = directory / PICTURES[0 if plain else 1]
        fitted, record = directory / "fit.safetensors", directory / "result.json"
        doubt = [] if self.uncertainty is None else [directory / UNCERTAINTY]
        for path in (picture, fitted, record, *doubt):
            check_writable(path, force=force)
        self.write(picture, force=force)
        for path in doubt:
            assert self.uncertainty is not None
            images.save(path, plain_picture(self.uncertainty), force=force)
        with atomic(fitted, force=force) as temporary:
            measured = {_MEASUREMENT + name: each for name, each in self.measurement.items()}
            if self.uncertainty is not None:
                measured[_UNCERTAINTY] = self.uncertainty
            tensors = {name: each.contiguous() for name, each in (self.weights | measured).items()}
            # Not safetensors' own writer, which hides why a write failed.
            temporary.write_bytes(save(tensors, {"flashdip": json.dumps(self.record["config"])}))
        self.write_record(record, force=force, picture=picture.name)

    @classmethod
    def load(cls, directory: str | Path) -> "Result":
        """Read what `save` wrote; the image comes back exactly.

        Raises:
            InputError: The directory does not hold a saved result.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            record = json.loads((directory / "result.json").read_text())
            weights = load_file(directory / "fit.safetensors")
            picture = images.load(directory / Path(record.pop("picture")).name)
            measurement = {
                name.removeprefix(_MEASUREMENT): weights.pop(name)
                for name in [name for name in weights if name.startswith(_MEASUREMENT)]
            }
            doubt = weights.pop(_UNCERTAINTY, None)
            return cls(weights["image"], record, weights, picture, measurement, doubt)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{directory}: expected result.json, fit.safetensors and a picture: {reason}"
            ) from None


def plain_picture(image: Tensor) -> Picture:
    """Return an image [C, H, W] as a float32 picture."""
    pixels = image.permute(1, 2, 0).contiguous().numpy().astype(np.float32)
    return Picture(pixels)
