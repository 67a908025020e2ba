"""Writing files so that nothing half-written is ever left behind, and the user's private cache.

Whatever goes wrong here is an `OutputError` of one line. Names come from outside, so all of them
go through `one_line` before they enter a message.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashdip.engine.errors import OutputError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def one_line(text: object, limit: int = 300) -> str:
    """Return text as one printable line of at most `limit` characters.

    File names and the messages of decoders can hold line breaks and terminal escapes.
    """
    line = " ".join(str(text).split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def check_writable(path: str | os.PathLike[str], *, force: bool) -> None:
    """Check that `atomic` could write `path` now, so that a long fit does not end in vain.

    A file is really created beside `path`, and removed again: permission bits alone say little on
    read-only or remote file systems.

    Raises:
        OutputError: It exists and `force` is False, it is a directory or a device, or its folder
            is missing or cannot be written to.
    """
    target = _target(Path(path), force=force)
    with _as_output_errors(target):
        probe = _create_beside(target)
        probe.unlink()


@contextmanager
def atomic(path: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """Give a new, empty file to write to, which becomes `path` once the block ends well.

    The file lies in the folder of `path`, has its suffix and the mode of any new file. At the end
    it is flushed to the disk and renamed, so that others see the old content or the new, never a
    part. If the block raises anything, `KeyboardInterrupt` included, it is removed. Symbolic links
    are followed: the file that they point to is replaced.

    Args:
        path: File to write.
        force: Replace `path` if it exists.

    Yields:
        The path to write to.

    Raises:
        OutputError: As `check_writable`, or the block or the disk failed with an `OSError`; a full
            disk is named as such.
    """
    target = _target(Path(path), force=force)
    with _as_output_errors(target):
        temporary = _create_beside(target)
        try:
            yield temporary
            _flush(temporary)
            _target(target, force=force)  # the block may have taken hours
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _flush_directory(target.parent)


def user_cache() -> Path:
    """Return this user's cache folder for FlashDIP, created if missing, closed to other users.

    It is `$XDG_CACHE_HOME/flashdip`, or `~/.cache/flashdip` where the variable is not set to an
    absolute path.

    Raises:
        OutputError: It cannot be created, or it is a link or belongs to another user, who could
            then choose what is read from it.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "flashdip"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.lstat()
        if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.geteuid():
            raise OutputError(
                f"cache: expected a folder of this user, got {one_line(folder)}, which is a link "
                "or belongs to another user: set XDG_CACHE_HOME to a folder of your own"
            )
        if owner.st_mode & 0o077:
            folder.chmod(0o700)
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        raise OutputError(
            f"cache: expected a folder that can be written, got {one_line(error)}: "
            "set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return folder


def _target(path: Path, *, force: bool) -> Path:
    """Return the file that `path` stands for, links followed, after asking what is there now."""
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return target
        raise OutputError(
            f"{one_line(path)}: expected an existing folder to write to, got "
            f"{one_line(target.parent)}, which is not one: create it first"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise OutputError(f"{one_line(path)}: cannot be written: {reason_of(error)}") from error
    if stat.S_ISDIR(mode):
        raise OutputError(
            f"{one_line(path)}: expected the name of a file to write, got a directory: "
            "add a file name"
        )
    if not stat.S_ISREG(mode):
        raise OutputError(
            f"{one_line(path)}: expected a regular file to write, got a device, pipe or socket: "
            "choose another name"
        )
    if not force:
        raise OutputError(
            f"{one_line(path)}: expected a new file, got one that exists: choose another name, or "
            "replace it with --force (force=True in Python)"
        )
    return target


def _create_beside(target: Path) -> Path:
    """Create an empty file in the folder of `target`, under a name that nobody else has."""
    name = f".flashdip-{secrets.token_hex(8)}{target.suffix[:16]}"
    temporary = target.with_name(name)
    # 0o666 less the umask is what any program's new file gets; tempfile would make it 0o600.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_directory(folder: Path) -> None:
    """Make the rename itself durable, where the file system lets one."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _as_output_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{one_line(target)}: cannot be written: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Say why something could not be written, and what to do about it."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return "the disk is full (or the quota is used up): free some space or write elsewhere"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return "the folder does not allow it: choose another folder, or change its permissions"
    return f"{one_line(getattr(error, 'strerror', None) or error)}: choose another place or name"
