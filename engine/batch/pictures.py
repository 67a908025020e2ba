"""Jobs that read a picture, and publish the restored one with its record beside it.

`NAME.json`, the record, holds the hash of the job (input bytes, config, task) and that of the
restored file, which is published after it. So whatever is killed when: a picture counts as done if
record and file are there and both hashes are right, and is made again otherwise.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from flashdip.engine.batch import storage
from flashdip.engine.batch.jobs import Opened, Outcome
from flashdip.engine.batch.storage import Outputs, digest
from flashdip.engine.errors import OutputError
from flashdip.engine.files import one_line
from flashdip.engine.images import MAX_PIXELS, Picture, check_save, decode, encode

if TYPE_CHECKING:
    from flashdip.engine.config import FitConfig
    from flashdip.engine.result import Result

THUMBNAIL = 96  # pixels, the longer side
# What of a record the summary shows.
COLUMNS = (
    *("psnr", "iterations", "best_iteration", "stop_reason", "seconds_setup", "seconds_fit"),
    *("iterations_per_second", "peak_memory_bytes", "sigma", "backend", "device", "precision"),
    *("seed", "retries", "notes"),
)


@dataclass(frozen=True)
class Recipe:
    """How pictures are restored: the same for many jobs.

    Attributes:
        task: Name of a function of `flashdip.engine.tasks`.
        options: Its `FitOptions`, plain values only; without device and truth.
        own: What that task takes besides, without the mask.
    """

    task: str
    options: dict[str, Any]
    own: dict[str, Any]

    @cached_property
    def config(self) -> "FitConfig":
        """The config that the options stand for.

        Raises:
            ConfigError: They stand for none.
        """
        from flashdip.engine.task_options import FitOptions, config_of
        from flashdip.engine.tasks import check_own

        check_own(self.task, self.own)
        return config_of(self.task, cast(FitOptions, self.options))

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides the result, beside the pictures."""
        asked = [self.options.get(name) for name in ("sigma", "backend", "tile")]
        plain = [self.task, self.config.record(), self.own, asked]
        return digest(json.dumps(plain, sort_keys=True).encode())

    def shape(self, looks: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return channels, height and width of the restored picture of one that looks so."""
        width, height, channels = looks
        return channels, height * self.factor, width * self.factor

    def network_pixels(self, shape: tuple[int, int, int]) -> int:
        """Return how many pixels the network draws for an image [C, H, W]."""
        height, width = self.config.network.network_size(*shape[1:])
        return height * width

    @property
    def factor(self) -> int:
        """How many times larger the result is."""
        return int(self.own.get("factor", 1))

    @property
    def max_pixels(self) -> int:
        """How many pixels a file may have."""
        return int(self.options.get("max_pixels", MAX_PIXELS))


@dataclass(frozen=True)
class PictureJob:
    """One picture, from a file to a file. See `Job`.

    Attributes:
        name: Of the output, relative to the folder of outputs.
        source: Address of the input.
        outputs: Where to publish.
        recipe: How.
        mask, truth: Addresses, or None.
        looks: Width, height and channels as the file's header says them; None: not known.
        force: Replace a file that no batch made.
        memory: Bytes that a worker on a CPU takes for it, beside its own; 0: not known.
    """

    name: str
    source: str
    outputs: Outputs
    recipe: Recipe
    mask: str | None = None
    truth: str | None = None
    looks: tuple[int, int, int] | None = None
    force: bool = False
    memory: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """The recipe and what the header says."""
        return (self.recipe.identity, self.looks)

    @property
    def pixels(self) -> int:
        """Of the restored picture, as far as is known."""
        if self.looks is None:
            return 1
        _, height, width = self.recipe.shape(self.looks)
        return height * width

    def open(self) -> Opened | Outcome:
        """Read the input; or say that it was published already."""
        limit = self.recipe.max_pixels
        data = storage.read(self.source, limit)
        others = {
            name: storage.read(address, limit)
            for name, address in (("mask", self.mask), ("truth", self.truth))
            if address is not None
        }
        parts = {name: digest(each) for name, each in (others | {"image": data}).items()}
        plain = json.dumps([self.recipe.identity, parts], sort_keys=True)
        identity = hashlib.sha256(plain.encode()).hexdigest()
        published = self._published(identity, data)
        if published is not None:
            return published
        pictures = {
            name: decode(each, str(address), max_pixels=limit)
            for name, each, address in (
                ("image", data, self.source),
                ("mask", others.get("mask"), self.mask),
                ("truth", others.get("truth"), self.truth),
            )
            if each is not None
        }
        from flashdip.engine.tasks import state

        options: Any = self.recipe.options | {"accept": lambda blank: check_save(self.name, blank)}
        if "truth" in pictures:
            options["truth"] = pictures["truth"]
        own = self.recipe.own | ({"mask": pictures["mask"]} if "mask" in pictures else {})
        stated = state(self.recipe.task, pictures["image"], options, **own)
        finish = partial(self._publish, identity, pictures["image"], stated.picture)
        scratch = self.outputs.scratch(identity)
        return Opened(stated, finish, self.recipe.options.get("tile"), scratch)

    def _publish(
        self, identity: str, given: Picture, like: Picture | None, result: "Result"
    ) -> Outcome:
        """Publish the record, then the picture.

        Args:
            identity: Hash of the job.
            given: The input.
            like: What the output is dressed like.
            result: Of the fit.
        """
        dressed = result if like is None else result.dressed(like)
        file = encode(self.name, dressed.picture)
        record = dressed.record | {
            "picture": self.name,
            "task": self.recipe.task,
            "source": self.source,
            "job": identity,
            "sha256": digest(file),
        }
        text = json.dumps(record, indent=1, allow_nan=False)
        self.outputs.publish(f"{self.name}.json", (text + "\n").encode())
        self.outputs.publish(self.name, file)
        thumbnails = thumbnail(given), thumbnail(dressed.picture)
        return Outcome(self.name, "done", record=_summary(record), thumbnails=thumbnails)

    def _published(self, identity: str, data: bytes) -> Outcome | None:
        """Return the outcome if this very job was published, after seeing who owns the place."""
        record = self._record()
        if record is None:
            if not self.force and self.outputs.read(self.name) is not None:
                raise OutputError(
                    f"{one_line(self.name)}: expected no file of this name among the outputs, got "
                    "one that no batch made: choose another folder, or replace it with --force"
                )
            return None
        if record["job"] != identity:
            return None
        file = self.outputs.read(self.name)
        if file is None or digest(file) != record["sha256"]:
            return None
        limit = self.recipe.max_pixels
        pictures = (decode(each, self.name, max_pixels=limit) for each in (data, file))
        before, after = (thumbnail(picture) for picture in pictures)
        return Outcome(self.name, "kept", record=_summary(record), thumbnails=(before, after))

    def _record(self) -> dict[str, Any] | None:
        """Return the record beside the output, if it is one that a batch wrote."""
        try:
            record = json.loads(self.outputs.read(f"{self.name}.json") or b"")
        except ValueError:
            return None
        ours = isinstance(record, dict) and {"job", "sha256"} <= record.keys()
        return record if ours else None


def thumbnail(picture: Picture) -> bytes:
    """Return a picture as a small WebP file."""
    import numpy as np
    from PIL import Image

    from flashdip.engine.report import picture as shown

    pixels = np.nan_to_num(picture.pixels, posinf=1.0, neginf=0.0)
    image = Image.fromarray(shown(picture.with_pixels(pixels).tensor()[0]))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    data = io.BytesIO()
    image.save(data, "WEBP", quality=70)
    return data.getvalue()


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    chosen = {name: record.get(name) for name in COLUMNS}
    channels, height, width = record["shape"]
    return chosen | {"channels": channels, "height": height, "width": width}
