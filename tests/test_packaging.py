"""The wheel ships every package of the tree, and the pinned versions cover every dependency."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAYERS = ("bench", "engine", "kernels")


def test_every_package_is_listed() -> None:
    found = {
        ".".join(("flashdip", *path.parent.relative_to(ROOT).parts))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {"flashdip"} | found


def test_every_folder_with_code_is_a_package() -> None:
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_nothing_else_at_the_root_goes_into_the_wheel() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, without a network, and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=leave)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("flashdip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_holds_the_package_and_nothing_else(unpacked: Path) -> None:
    shipped = {
        path.relative_to(unpacked / "flashdip") for path in unpacked.rglob("flashdip/**/*.py")
    }
    tree = {path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    assert shipped == tree | {Path("__init__.py"), Path("cli.py")}
    assert (unpacked / "flashdip" / "py.typed").is_file()
    for kind in ("js", "css"):
        data = {
            path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob(f"*.{kind}")
        }
        assert data == {
            path.relative_to(unpacked / "flashdip") for path in unpacked.rglob(f"*.{kind}")
        }
        assert data
    (info,) = unpacked.glob("*.dist-info")
    assert {path.name for path in unpacked.iterdir()} == {"flashdip", info.name}
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_every_module_of_the_wheel_can_be_imported(unpacked: Path, tmp_path: Path) -> None:
    """From the unpacked wheel alone: neither from the tree nor by the editable install."""
    code = """
import importlib, pkgutil, sys
import flashdip
names = [m.name for m in pkgutil.walk_packages(flashdip.__path__, "flashdip.")]
files = [importlib.import_module(name).__file__ for name in names]
print(*[flashdip.__file__, *files], sep="\\n")
"""
    paths = {"PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | paths,
    )
    assert result.returncode == 0, result.stderr
    imported = {Path(line) for line in result.stdout.splitlines()}
    assert imported == set(unpacked.rglob("flashdip/**/*.py"))


def pins(name: str) -> dict[str, str]:
    """Requirements of a constraints file: canonical name to what follows it."""
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def dependencies() -> set[str]:
    """Canonical names of all that `pip install flashdip[dev]` needs here, directly or not."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    queue = [(Requirement(each), "") for each in wanted]
    names: set[str] = set()
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        new, names = name not in names, names | {name}
        if not new and not requirement.extras:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            raise AssertionError(f"{name} is not installed: run make dev") from None
        queue += [(Requirement(e), x) for e in needs for x in ("", *requirement.extras)]
    return names


def test_every_dependency_is_pinned() -> None:
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    own = {name for name in dependencies() if not name.startswith(("nvidia-", "cuda-"))}
    assert own - {"triton", *cpu} == set()
    assert own - {"triton", *gpu} == set()
    assert all(re.fullmatch(r"==[\w.]+", cpu[name]) for name in cpu)
    # With a GPU the driver decides which torch, and torch decides which Triton.
    assert gpu.pop("torch") == ">=2.11"
    del gpu["nvidia-ml-py"], cpu["torch"], cpu["triton"]
    assert gpu == cpu
