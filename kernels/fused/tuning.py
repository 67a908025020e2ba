"""The search for better tiles: one field of one tile at a time, the slowest launches first.

What is faster is asked of a `Judge`, which measures on a GPU or asks the cost model: the search is
the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flashdip.kernels.fused.launch import Launch, Tile
from flashdip.kernels.fused.program import Program

PIXELS = (16, 512)  # of a tile, the fewest and the most that are tried
INPUTS = (16, 256)
STAGES = (1, 5)
WARPS = (4, 8)
GAIN = 1.02  # times as fast, or a change is not worth it

Plan = Callable[[Mapping[str, Tile]], Program]  # plans a step with these in place of the rules'


class Judge(Protocol):
    """Says how fast plans are."""

    def seconds(self, launches: Sequence[Launch]) -> float:
        """Return how long launches take together."""
        ...

    def faster(self, base: Program, others: Sequence[Program]) -> list[float]:
        """Return how many times as fast the launches in which each differs from `base` are.

        0 stands for one that cannot be compiled or run, or computes something else.
        """
        ...


@dataclass(frozen=True)
class Finding:
    """What became of a tile.

    Attributes:
        key: See `Tiles.key`.
        launches: Names of those that it cuts.
        before: The tile as it was.
        after: The best one found; the same if there is none.
        faster: How many times as fast the launches became, as the judge says.
        tried: How many tiles were tried.
        failed: How many of them can not be used.
    """

    key: str
    launches: tuple[str, ...]
    before: Tile
    after: Tile
    faster: float
    tried: int
    failed: int


def neighbours(tile: Tile) -> list[Tile]:
    """Return the tiles that differ from one in a single respect."""
    shapes = [
        tile._replace(rows=rows, columns=columns)
        for rows, columns in (
            (2 * tile.rows, tile.columns),
            (tile.rows, 2 * tile.columns),
            (tile.rows // 2, tile.columns),
            (tile.rows, tile.columns // 2),
        )
        if PIXELS[0] <= rows * columns <= PIXELS[1]
    ]
    if tile.outputs > 16:
        shapes.append(tile._replace(outputs=tile.outputs // 2))
    depths = [n for n in (tile.inputs // 2, 2 * tile.inputs) if INPUTS[0] <= n <= INPUTS[1]]
    shapes += [tile._replace(inputs=n) for n in depths]
    shapes += [tile._replace(splits=n) for n in {tile.splits // 2, 2 * tile.splits} if n]
    shapes += [tile._replace(warps=n) for n in WARPS if n != tile.warps]
    stages = [n for n in (tile.stages - 1, tile.stages + 1) if STAGES[0] <= n <= STAGES[1]]
    return shapes + [tile._replace(stages=n) for n in stages]


def differing(one: Program, other: Program) -> list[tuple[Launch, Launch]]:
    """Return the launches of two plans of the same step that are not cut or compiled alike."""
    pairs = zip([*one.launches, *one.after], [*other.launches, *other.after], strict=True)
    return [(a, b) for a, b in pairs if _cut(a) != _cut(b)]


def _cut(launch: Launch) -> object:
    constants = tuple(sorted(launch.constants.items()))
    return launch.grid, constants, launch.warps, launch.stages, launch.bytes


def search(plan: Plan, judge: Judge, table: Mapping[str, Tile]) -> Iterator[Finding]:
    """Look for better tiles; what is found is used from then on.

    Args:
        plan: Plans the step.
        judge: Says what is faster.
        table: Tiles to begin with, by key.

    Yields:
        A finding for each tile of the step as soon as it is done with, those that matter most
        first.
    """
    table = dict(table)
    base = plan(table)
    weights = {key: _weight(plan, judge, table, base, key) for key in base.tiles.chosen}
    for key in sorted(weights, key=lambda key: -weights[key]):
        if weights[key]:
            finding = _descend(plan, judge, table, key)
            if finding.after != finding.before:
                table[key] = finding.after
            yield finding


def _weight(plan: Plan, judge: Judge, table: Mapping[str, Tile], base: Program, key: str) -> float:
    """Return how long the launches take that a tile cuts; 0 if it cuts none."""
    for tile in neighbours(base.tiles.chosen[key]):
        other = _planned(plan, {**table, key: tile})
        if other is not None and (pairs := differing(base, other)):
            return judge.seconds([launch for launch, _ in pairs])
    return 0.0


def _descend(plan: Plan, judge: Judge, table: Mapping[str, Tile], key: str) -> Finding:
    base = plan(table)
    before = best = base.tiles.chosen[key]
    seen, failed, gain, names = {best}, 0, 1.0, set[str]()
    while fresh := [tile for tile in neighbours(best) if tile not in seen]:
        seen.update(fresh)
        planned = {tile: _planned(plan, {**table, key: tile}) for tile in fresh}
        made = {tile: program for tile, program in planned.items() if program is not None}
        changed = {tile: program for tile, program in made.items() if differing(base, program)}
        names |= {a.name for program in changed.values() for a, _ in differing(base, program)}
        ratios = judge.faster(base, list(changed.values()))
        failed += len(fresh) - len(made) + ratios.count(0.0)
        ratio, tile = max(zip(ratios, changed, strict=True), default=(0.0, best))
        if ratio < GAIN:
            break
        best, base, gain = tile, changed[tile], gain * ratio
    return Finding(key, tuple(sorted(names)), before, best, gain, len(seen) - 1, failed)


def _planned(plan: Plan, table: Mapping[str, Tile]) -> Program | None:
    """Plan a step; None where a kernel does not take such a tile."""
    try:
        return plan(table)
    except (AssertionError, ValueError):
        return None
