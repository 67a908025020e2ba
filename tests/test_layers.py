"""The dependency direction is kernels <- engine <- bench <- cli, and the yardstick stands alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "kernels": ("flashdip.engine", "flashdip.bench", "flashdip.cli"),
    "engine": ("flashdip.bench", "flashdip.cli"),
    "bench": ("flashdip.cli",),
}


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_layer_imports_one_above(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        upward = [name for name in imported(path) if name.startswith(FORBIDDEN[layer])]
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_the_yardstick_depends_on_nothing_of_the_project() -> None:
    names = imported(ROOT / "bench" / "published.py")
    assert not [name for name in names if name.startswith("flashdip")]
    assert any(name.startswith("torch") for name in names)


def test_upward_imports_are_seen(tmp_path: Path) -> None:
    """Also from inside functions, and where the module is the imported name."""
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from flashdip import cli\n    import flashdip.bench.measure\n")
    assert imported(path) == {"flashdip.cli", "flashdip.bench.measure"}
