"""Atomic writing and the private cache."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from flashdip.engine.errors import OutputError
from flashdip.engine.files import atomic, check_writable, one_line, user_cache

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a device or folder of Linux")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_appears_under_its_name_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    with atomic(target, force=False) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert not target.exists()
    assert names(tmp_path) == ["a.png"]
    assert target.read_bytes() == b"new"


def test_mode_is_that_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic(tmp_path / "a", force=False) as temporary:
            temporary.write_bytes(b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_whatever_is_raised_the_old_content_stays_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic(target, force=True) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert names(tmp_path) == ["a.png"]
    assert target.read_bytes() == b"old"


def test_two_writers_do_not_share_a_file(tmp_path: Path) -> None:
    with (
        atomic(tmp_path / "a", force=True) as first,
        atomic(tmp_path / "a", force=True) as second,
    ):
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"  # the outer block ends last


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="--force"):
        check_writable(target, force=False)
    with pytest.raises(OutputError, match="--force"), atomic(target, force=False):
        pytest.fail("the block must not run")
    assert target.read_bytes() == b"old"
    with atomic(target, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    with pytest.raises(OutputError, match="--force"), atomic(target, force=False) as temporary:
        temporary.write_bytes(b"mine")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert names(tmp_path) == ["a.png"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic(link, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("missing/a.png", "existing folder"),
        ("file/a.png", "existing folder|cannot be written"),
        (".", "got a directory"),
        ("x" * 300, "cannot be written"),
        ("null\0byte", "cannot be written"),
        pytest.param("/dev/null", "device", marks=linux_only),
        pytest.param("/proc/a.png", "cannot be written", marks=linux_only),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    for attempt in (check_writable, lambda path, force: atomic(path, force=force).__enter__()):
        with pytest.raises(OutputError, match=words) as caught:
            attempt(tmp_path / place, force=True)
        assert str(caught.value).isprintable()
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permissions"):
        check_writable(tmp_path / "a.png", force=False)


def test_refused_permission_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="permissions"):
        check_writable(tmp_path / "a.png", force=False)


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.png", force=False)
    assert names(tmp_path) == []


@linux_only
def test_a_full_disk_in_the_block(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="disk is full"),
        atomic(tmp_path / "a.png", force=False),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert names(tmp_path) == []


def test_a_full_disk_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="disk is full"), atomic(tmp_path / "a", force=False):
        pass
    assert names(tmp_path) == []


def test_one_line_keeps_text_and_nothing_else() -> None:
    assert one_line("a\nb\r\n\tc") == "a b c"
    assert one_line("\x1b[31mred\udcff") == "?[31mred?"
    assert one_line("größe") == "größe"
    assert len(one_line("x" * 1000)) == 300


def test_user_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = user_cache()
    assert folder == tmp_path / "cache" / "flashdip"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(user_cache().stat().st_mode) == 0o700


@pytest.mark.parametrize("value", ["", "relative"])
def test_user_cache_without_the_variable_is_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "flashdip"


def test_user_cache_refuses_what_others_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "flashdip").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="link or belongs to another user"):
        user_cache()
    (tmp_path / "flashdip").unlink()
    (tmp_path / "flashdip").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        user_cache()


def test_user_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        user_cache()
