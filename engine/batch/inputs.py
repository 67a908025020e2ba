"""From what the command line names to jobs: files, folders, globs, or one manifest."""

import glob
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from flashdip.engine.batch import storage
from flashdip.engine.batch.machine import Needs
from flashdip.engine.batch.pictures import PictureJob, Recipe
from flashdip.engine.batch.storage import OWN, Outputs, checked, remote, safe_name
from flashdip.engine.errors import InputError
from flashdip.engine.files import one_line
from flashdip.engine.images import SUFFIXES

MANIFESTS = (".csv", ".jsonl")


@dataclass(frozen=True)
class Found:
    """A picture that was named.

    Attributes:
        source: Its address.
        name: Of its output, relative to the folder of outputs.
        options: What is said about this picture alone: names and values of `FitOptions`, and
            addresses as "mask" and "truth".
    """

    source: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Maker:
    """Makes jobs of pictures.

    Attributes:
        task: Name of the task.
        options: `FitOptions` for all pictures, plain values.
        own: What the task takes besides.
        outputs: Where to publish.
        mask, truth: A file for all pictures, or a folder that holds one under each picture's name.
        suffix: Of all outputs, such as ".png"; None: that of each input.
        force: Replace files that no batch made.
        needs: Tells how much memory a picture needs.
    """

    task: str
    options: Mapping[str, Any]
    own: Mapping[str, Any]
    outputs: Outputs
    mask: str | None = None
    truth: str | None = None
    suffix: str | None = None
    force: bool = False
    needs: Needs = field(default_factory=Needs)

    @property
    def recipe(self) -> Recipe:
        """That of a picture about which nothing more is said."""
        return Recipe(self.task, dict(self.options), dict(self.own))

    def jobs(self, found: Sequence[Found]) -> list[tuple[PictureJob, str]]:
        """Return a job for each picture, and its source.

        Raises:
            InputError: Two would write one file, or one its own input.
            ConfigError: The options of one do not go together.
        """
        recipes: dict[str, Recipe] = {}
        jobs: dict[str, PictureJob] = {}
        sources = {one.source for one in found}
        for one in found:
            name = self._name(one.name)
            options = {**self.options, **one.options}
            mask = options.pop("mask", None) or self._beside(self.mask, one.name)
            truth = options.pop("truth", None) or self._beside(self.truth, one.name)
            if not _in_unicode(name + one.source):
                raise InputError(
                    f"{one_line(one.source)}: expected a path in UTF-8, which records and summary "
                    "are written in, got other bytes: rename it"
                )
            recipe = Recipe(self.task, options, dict(self.own))
            recipe = recipes.setdefault(repr(recipe), recipe)
            _ = recipe.identity  # refuses what does not go together, before anything runs
            seen = looks(one.source)
            taken = self.needs.bytes(recipe, seen)
            job = PictureJob(
                name, one.source, self.outputs, recipe, mask, truth, seen, self.force, taken
            )
            other = jobs.setdefault(name, job)
            if other.source != job.source:
                raise InputError(
                    f"output {one_line(name)}: expected a name for each picture, got one for both "
                    f"{one_line(other.source)} and {one_line(one.source)}: restore them into two "
                    "folders, or name the outputs in a manifest"
                )
            place = self.outputs.place(name)
            if place in sources or _same(place, one.source):
                raise InputError(
                    f"{one_line(one.source)}: expected a folder of outputs that holds no inputs, "
                    "got one where this picture would be replaced: choose another folder"
                )
        return [(job, job.source) for job in jobs.values()]

    def _name(self, name: str) -> str:
        path = PurePosixPath(safe_name(name))
        if self.suffix is not None:
            path = path.with_suffix(self.suffix)
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"output {one_line(name)}: expected a name that ends in {', '.join(SUFFIXES)}, got "
                f"{one_line(path.suffix) or 'no suffix'}: choose one for all (--format)"
            )
        return str(path)

    @staticmethod
    def _beside(given: str | None, name: str) -> str | None:
        """Return the mask or truth of a picture: the one given, or that of its name in a folder."""
        if given is None:
            return None
        folder = storage.file_system(given).isdir(given) if remote(given) else os.path.isdir(given)
        return f"{given}/{name}" if folder else given


def _in_unicode(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def expand(inputs: Sequence[str], outputs: Outputs) -> list[Found]:
    """Return the pictures that arguments name, each once, in order.

    A folder stands for all pictures in it and below, a pattern for the files that match it; their
    names keep the folders below. Hidden files and the outputs themselves are left out.

    Raises:
        InputError: One names nothing.
    """
    if len(inputs) == 1 and PurePosixPath(inputs[0]).suffix.lower() in MANIFESTS:
        from flashdip.engine.batch.manifest import read

        return read(checked(inputs[0]))
    found: dict[tuple[str, str], Found] = {}
    for each in inputs:
        address = checked(each)
        pictures = list(_remote(address) if remote(address) else _local(address, outputs))
        if not pictures:
            raise InputError(
                f"{one_line(each)}: expected a picture, a folder of pictures, a pattern or a "
                "manifest (.csv, .jsonl), got nothing of the kind: check the path"
            )
        found |= {(one.source, one.name): one for one in pictures}
    return list(found.values())


def _local(address: str, outputs: Outputs) -> Iterator[Found]:
    path = Path(address)
    if path.is_dir():
        yield from _folder(path, outputs)
    elif path.exists():
        yield Found(address, path.name)
    elif glob.has_magic(address):
        base = path
        while glob.has_magic(str(base)):
            base = base.parent
        for match in sorted(glob.iglob(address, recursive=True)):
            if _picture(match) and os.path.isfile(match) and not _within(match, outputs):
                yield Found(match, str(Path(match).relative_to(base)))


def _folder(folder: Path, outputs: Outputs) -> Iterator[Found]:
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(
            each
            for each in folders
            if not each.startswith(".") and not _within(f"{base}/{each}", outputs)
        )
        for file in sorted(files):
            if _picture(file):
                path = Path(base, file)
                yield Found(str(path), str(path.relative_to(folder)))


def _within(path: str, outputs: Outputs) -> bool:
    if remote(outputs.address):
        return False
    found, place = os.path.realpath(path), os.path.realpath(outputs.address)
    return found == place or found.startswith(f"{place}/")


def _remote(address: str) -> Iterator[Found]:
    files = storage.file_system(address)
    protocol = address.partition("://")[0]

    def found(path: str, base: str) -> Found:
        name = path.removeprefix(base).strip("/") or PurePosixPath(path).name
        return Found(path if "://" in path else f"{protocol}://{path.lstrip('/')}", name)

    root = files._strip_protocol(address)
    if glob.has_magic(address):
        base = root
        while glob.has_magic(base):
            base = base.rpartition("/")[0]
        yield from (found(path, base) for path in sorted(files.glob(address)) if _picture(path))
    elif files.isdir(address):
        hidden = f"/{OWN}/"
        paths = (path for path in sorted(files.find(address)) if hidden not in path)
        yield from (found(path, root) for path in paths if _picture(path))
    elif files.exists(address):
        yield found(root, root)


def _picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def looks(address: str) -> tuple[int, int, int] | None:
    """Return width, height and channels that a file's header claims; None: not known, or remote.

    Channels are those that are fitted, without alpha.

    They only say which pictures to give out together: a worker looks for itself.
    """
    if remote(address):
        return None
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(address) as image:
                bands = [band for band in image.getbands() if band not in ("A", "a")]
                return image.width, image.height, 3 if bands == ["P"] else len(bands)
    except Exception:  # headers are hostile; the worker will say what is wrong
        return None
