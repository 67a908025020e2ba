"""Where a batch reads and publishes: local folders, or what fsspec reaches (S3, GCS, SFTP, ...).

An address is a path or a URL such as s3://bucket/folder. Credentials come from the environment or
from fsspec's own configuration; an address that holds any is refused, because addresses go into
the journal and into records.
"""

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flashdip.engine.errors import ImageError, InputError, OutputError
from flashdip.engine.files import atomic, one_line, reason_of
from flashdip.engine.images import most_bytes

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

OWN = ".flashdip"  # folder of a batch's own files within its outputs


def remote(address: str) -> bool:
    """Tell whether an address is a URL, and not a path of this machine."""
    return "://" in address and not address.startswith("file://")


def checked(address: str) -> str:
    """Return an address, made absolute if it is a path; refuse one that holds credentials.

    Raises:
        InputError: It does, or no installed package serves its protocol.
    """
    if not remote(address):
        return os.path.abspath(os.path.expanduser(address.removeprefix("file://")))
    parts = urlsplit(address)
    web = parts.scheme in ("http", "https")  # elsewhere "?" and "@" may belong to a name
    if parts.password or (web and (parts.query or parts.username)):
        raise InputError(
            f"{parts.scheme}://...: expected an address without password or query, because "
            "addresses are written into records, got one with them: set credentials in the "
            "environment or in fsspec's configuration"
        )
    file_system(address)
    return address.rstrip("/")


def file_system(address: str) -> "AbstractFileSystem":
    """Return the file system of a URL.

    Raises:
        InputError: No installed package serves it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)[0]
    except (ImportError, ValueError) as error:
        raise InputError(f"{one_line(address)}: cannot be reached: {one_line(error)}") from error


def read(address: str, max_pixels: int) -> bytes:
    """Return a whole file.

    Args:
        address: Path or URL.
        max_pixels: No file is read that is longer than a picture of so many pixels can be.

    Raises:
        ImageError: It is not there, is no file, is too long, or cannot be read.
    """
    name, most = one_line(address), most_bytes(max_pixels)
    try:
        if remote(address):
            files = file_system(address)
            size = files.info(address)["size"]
            data: bytes = b"" if size is not None and size > most else files.cat_file(address)
        else:
            size = os.stat(address).st_size
            # A device or a pipe would be read without end.
            if not os.path.isfile(address):
                raise ImageError(f"{name}: expected a file, got something else: check the path")
            data = b"" if size > most else Path(address).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: expected a file, got no such file: check the path") from None
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise ImageError(f"{name}: expected a readable file, got '{reason}'") from error
    if size is not None and size > most:
        raise ImageError(
            f"{name}: expected a picture of at most {max_pixels:,} pixels, got {size:,} bytes: if "
            "you trust the file, raise the limit with --max-pixels"
        )
    return data


def signature(address: str) -> tuple[Any, ...] | None:
    """Return what changes when a file does, without reading it; None: it is not there."""
    try:
        if remote(address):
            info = file_system(address).info(address)
            stamps = ("size", "mtime", "LastModified", "last_modified", "updated", "ETag", "etag")
            return tuple(str(info.get(name)) for name in stamps)
        status = os.stat(address)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def digest(data: bytes) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def safe_name(name: str) -> str:
    """Return the name of an output, relative to the folder of outputs, in its plain form.

    Raises:
        InputError: It would lie outside, or among the batch's own files.
    """
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts
    if not inside or "\\" in name or "\0" in name or "://" in name or path.parts[0] == OWN:
        raise InputError(
            f"output {one_line(name)!r}: expected the name of a file within the output folder, got "
            "another place: leave out '..', '\\' and a leading '/'"
        )
    return str(path)


@dataclass(frozen=True)
class Outputs:
    """The folder that a batch publishes in.

    Attributes:
        address: Of the folder, as `checked` returns it.
    """

    address: str

    def place(self, name: str) -> str:
        """Return the address of an output."""
        return f"{self.address}/{name}"

    @contextmanager
    def sole(self) -> Iterator[None]:
        """Be the only batch that publishes here while the block runs; make the folder if missing.

        On remote storage nothing is locked: there the journal's own lock has to do.

        Raises:
            OutputError: There is another one.
        """
        if remote(self.address):
            yield
            return
        lock = Path(self.address, OWN, "lock")
        with ExitStack() as stack:
            with _named(self.address):
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(lock.open("a"))
                try:
                    # Given back by the system when this process ends, in whatever way.
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputError(
                        f"{one_line(self.address)}: expected a folder of no other batch, got one "
                        "that is in use: wait for that batch, or choose another folder"
                    ) from None
            yield

    def prepare(self) -> None:
        """Make the folder, and remove what killed workers left half-written in it.

        No other batch may be publishing in it.

        Raises:
            OutputError: It cannot be made.
        """
        with _named(self.address):
            if remote(self.address):
                file_system(self.address).makedirs(self.address, exist_ok=True)
                return
            self._staging.mkdir(parents=True, exist_ok=True)
            self.sweep()

    def sweep(self) -> None:
        """Remove what killed workers left half-written."""
        if not remote(self.address):
            for path in self._staging.iterdir():
                path.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """Return what is published under a name; None: nothing.

        Raises:
            OutputError: It cannot be read.
        """
        place = self.place(name)
        with _named(place):
            try:
                if remote(place):
                    found: bytes = file_system(place).cat_file(place)
                    return found
                return Path(place).read_bytes()
            except FileNotFoundError:
                return None

    def publish(self, name: str, data: bytes) -> None:
        """Make data a file under a name, in one step for whoever looks; replace what is there.

        Raises:
            OutputError: It would lie outside, through a link, or the disk refuses it.
        """
        place = self.place(name)
        with _named(place):
            if remote(place):
                files, part = file_system(place), f"{place}.{secrets.token_hex(8)}.part"
                files.makedirs(place.rpartition("/")[0], exist_ok=True)
                files.pipe_file(part, data)
                files.mv(part, place)
                return
            target = Path(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            root = os.path.realpath(self.address)
            if os.path.commonpath([root, os.path.realpath(target.parent)]) != root:
                raise OutputError(
                    f"{one_line(place)}: expected a place within {one_line(root)}, got a link out "
                    "of it: remove the link"
                )
            staged = self._staging / secrets.token_hex(8)
            try:
                with atomic(staged, force=False) as temporary:
                    temporary.write_bytes(data)
                os.replace(staged, target)  # a link of this name is replaced, not followed
            finally:
                staged.unlink(missing_ok=True)

    def scratch(self, identity: str) -> str | None:
        """Return how the name of a folder begins that a job may use; None: not on this storage."""
        if remote(self.address):
            return None
        return str(Path(self.address, OWN, f"tiles-{identity[:16]}"))

    @property
    def _staging(self) -> Path:
        return Path(self.address, OWN, "staging")


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Turn errors of the system into ones that name the place."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{one_line(place)}: cannot be used: {reason_of(error)}") from error


def hopeless(error: BaseException) -> bool:
    """Tell whether an error means that nothing else can be written either: the disk is full."""
    if not isinstance(error, OutputError):
        return False
    numbers: set[Any] = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in numbers:
            return True
        cause = cause.__cause__
    return False
