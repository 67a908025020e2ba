"""The search for tiles: what it tries, in which order, and that other tiles compute the same."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from flashdip.bench.tune import CLOSE, Stopwatch, gradient
from flashdip.engine.backends.plans import planned
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.kernels.fused import tables
from flashdip.kernels.fused.launch import Launch, Tile
from flashdip.kernels.fused.program import Program
from flashdip.kernels.fused.tiles import ARCHITECTURES
from flashdip.kernels.fused.tuning import Finding, differing, neighbours, search

TINY = FitConfig(
    network=SkipConfig(inputs=2, outputs=1, down=(20,), skip=2, upsample="nearest"),
    perturbation=0.0,
    stop=("fixed",),
)
WIDE = "product 8 8 20 20 9 1 float32 F1"  # the convolution of a level, there and back


def plan(table: Mapping[str, Tile], device: str = "meta") -> Program:
    cut = ARCHITECTURES["interpreter"]._replace(table=table)
    return planned(TINY, (16, 16), torch.float32, cut, device=device)


class Liking:
    """Says that launches take as long as a made-up cost of the tiles of one key."""

    def __init__(self, key: str, cost: Mapping[tuple[str, int], float]) -> None:
        self.key, self.cost = key, cost
        self.weighed: list[tuple[str, ...]] = []

    def _seconds(self, program: Program) -> float:
        tile = program.tiles.chosen[self.key]
        return 1.0 + sum(self.cost.get((f, v), 0.0) for f, v in tile._asdict().items())

    def seconds(self, launches: Sequence[Launch]) -> float:
        self.weighed.append(tuple(launch.name for launch in launches))
        return float(len(launches))

    def faster(self, base: Program, others: Sequence[Program]) -> list[float]:
        return [self._seconds(base) / self._seconds(other) for other in others]


def test_every_step_of_the_search_changes_one_thing() -> None:
    tile = Tile(8, 16, 128, 64, 2, 4, 3)
    found = neighbours(tile)
    assert len(set(found)) == len(found) >= 10
    for other in found:
        changed = [f for f in Tile._fields if getattr(tile, f) != getattr(other, f)]
        assert len(changed) == 1, other
    assert {"rows", "columns", "outputs", "inputs", "splits", "warps", "stages"} == {
        f for other in found for f in Tile._fields if getattr(tile, f) != getattr(other, f)
    }
    smallest = Tile(1, 16, 16, 16, 1, 4, 1)
    assert all(t.pixels >= 16 and t.outputs >= 16 and t.splits >= 1 for t in neighbours(smallest))


def test_the_search_walks_to_what_is_fastest_and_says_so() -> None:
    before = plan({}).tiles.chosen[WIDE]
    # Half the rows is better, and with it two splits are better still; more warps are worse.
    likes = {("rows", before.rows): 1.0, ("splits", before.splits): 0.5, ("warps", 8): 3.0}
    judge = Liking(WIDE, likes)
    findings = {finding.key: finding for finding in search(plan, judge, {})}
    found = findings[WIDE]
    assert found.before == before
    assert (found.after.rows, found.after.splits) != (before.rows, before.splits)
    assert found.after.rows != before.rows and found.after.splits != before.splits
    assert found.after.warps == before.warps
    assert found.faster == pytest.approx(2.5)
    assert found.launches == ("level0.conv backward", "level0.conv forward")
    assert found.tried > 8 and found.failed == 0
    assert all(f.after == f.before for key, f in findings.items() if key != WIDE)
    assert judge.weighed.count(found.launches[::-1]) == 1


def test_what_fails_everywhere_leaves_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Liking):
        def faster(self, base: Program, others: Sequence[Program]) -> list[float]:
            return [0.0] * len(others)

    def refuse(table: Mapping[str, Tile]) -> Program:
        assert not table or next(iter(table.values())).warps == 4, "no such tile"
        return plan(table)

    finding = next(iter(search(refuse, Refusing(WIDE, {}), {})))
    assert finding.after == finding.before
    assert finding.faster == 1.0
    assert finding.failed == finding.tried - _alike(finding)


def _alike(finding: Finding) -> int:
    """How many of the tiles that were tried make no difference to any launch."""
    base = plan({})
    return sum(
        tile.warps == 4 and not differing(base, plan({finding.key: tile}))
        for tile in neighbours(finding.before)
    )


def test_other_tiles_compute_the_same() -> None:
    """In the interpreter: a tile cut smaller, summed by more programs, in shorter products."""
    own = plan({}).tiles.chosen[WIDE]
    other = {WIDE: own._replace(rows=own.rows // 2, inputs=16, splits=2 * own.splits)}
    assert [a.name for a, _ in differing(plan({}), plan(other))] == [
        "level0.conv forward",
        "level0.conv backward",
    ]
    base, cut = (gradient(plan(table, "cpu")) for table in ({}, other))
    assert base.norm() > 0
    assert (cut - base).norm() <= 1e-5 * base.norm()
    assert not torch.equal(cut, base)  # sums were taken in another order


def test_a_stopwatch_refuses_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "_captured", lambda self, launches: lambda: None)
    base = plan({}, "cpu")
    stopwatch = Stopwatch(torch.device("cpu"), base)
    own = base.tiles.chosen[WIDE]
    other = plan({WIDE: own._replace(splits=2 * own.splits)}, "cpu")
    (ratio,) = stopwatch.faster(base, [other])
    assert ratio > 0
    stopwatch.gradient = stopwatch.gradient * (1 + 2 * CLOSE)
    assert stopwatch.faster(base, [other]) == [0.0]


def test_a_table_is_written_and_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(tables, "PATH", tmp_path / "tiles.json")
    tables.PATH.write_text("{\n}\n")
    tiles = {"product 2 2 float16 F1": Tile(8, 16, 64, 32, 2, 4, 3), "join 4": Tile()}
    tables.write("sm_90", tiles)
    tables.write("sm_80", {"join 4": Tile(warps=8)})
    assert tables.read("sm_90") == tiles
    assert tables.read("sm_80") == {"join 4": Tile(warps=8)}
    assert tables.read("sm_100") == {}
    tables.write("sm_90", {})
    assert tables.read("sm_90") == {}


def test_shipped_tables_name_tiles_that_plans_ask_for() -> None:
    """A key that no rule makes would be dead weight."""
    for architecture in ARCHITECTURES.values():
        for key, tile in architecture.table.items():
            rule, *shape, kind, fits = key.split()
            assert rule in (
                "product",
                "weights",
                "stream",
                "elementwise",
                "patches",
                "join",
                "head",
                "concat",
            ), key
            assert all(part.isdigit() for part in shape) and kind.startswith(("float", "bfloat"))
            assert fits.startswith("F") and all(field is None or field >= 1 for field in tile)
