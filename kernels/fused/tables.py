"""Tables of tiles that come with the package, for each architecture: better than the rules."""

import json
from collections.abc import Mapping
from pathlib import Path

from flashdip.kernels.fused.launch import Tile

PATH = Path(__file__).with_name("tiles.json")  # {architecture: {key: a tile's fields, in order}}


def read(arch: str) -> dict[str, Tile]:
    """Return the tiles of an architecture by `Tiles.key`; none for one that has no table."""
    kept = json.loads(PATH.read_text(encoding="utf-8"))
    return {key: Tile(*tile) for key, tile in kept.get(arch, {}).items()}


def write(arch: str, tiles: Mapping[str, Tile]) -> None:
    """Replace the table of an architecture, in the package's own folder."""
    kept = json.loads(PATH.read_text(encoding="utf-8"))
    kept[arch] = tiles
    rows = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
        + "\n }"
        for name, table in sorted(kept.items())
        if table
    ]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
