"""Which rows a convolution's rows see, against padding and doubling written out in full."""

import pytest
import torch
import triton
import triton.language as tl

from flashdip.kernels.fused.geometry import FOLDED, Geometry, members, placed, source, targets

GEOMETRIES = [
    *[
        Geometry("conv", size, stride, (size - 1) // 2, pad)
        for size in (1, 3, 5, 7)
        for stride in (1, 2)
        for pad in ("reflection", "zero")
    ],
    Geometry("nearest", 2, 1, 1, "reflection"),
    Geometry("nearest", 2, 1, 1, "zero"),
    Geometry("bilinear", 2, 1, 1, "reflection"),
]
ROOM = tl.constexpr(32)


@triton.jit
def probe(
    seen_ptr, placed_ptr, targets_ptr, group, slot, side, KIND: tl.constexpr, K: tl.constexpr,
    S: tl.constexpr, BEFORE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Store what each function says of the members and of the rows; -1 where nothing exists."""
    i = tl.arange(0, ROOM)
    row, inside = source(group, i, slot, side, KIND, S, BEFORE, PAD)
    count = members(side, KIND, K, S)
    tl.store(seen_ptr + i, tl.where(inside, row, -1), i < count)
    tl.store(placed_ptr + i, placed(group, i, side, KIND), i < count)
    main, exists, extra, extra_exists = targets(group, i, slot, side, KIND, K, S, BEFORE, PAD)
    tl.store(targets_ptr + i, tl.where(exists, main, -1), i < side)
    tl.store(targets_ptr + ROOM + i, tl.where(extra_exists, extra, -1), i < side)


def row_seen(geometry: Geometry, side: int, group: int, member: int, slot: int) -> int:
    """The definition: the input row, or -1 for a padded zero."""
    if geometry.kind == "conv":
        return _within(geometry.stride * member + slot - geometry.before, side, geometry.pad)
    if geometry.kind == "nearest":
        row = 2 * member + group
    elif group == 0:
        row = 2 * member - 2 if member else -1
    else:
        row = 2 * member + 1 if member < side else 2 * side
    rows = [_within(row + tap - 1, 2 * side, geometry.pad) for tap in FOLDED[group][slot]]
    small = {row if row < 0 else row // 2 for row in rows}
    assert len(small) == 1  # the summed taps do fall on one row
    return small.pop()


def _within(row: int, side: int, pad: str) -> int:
    if 0 <= row < side:
        return row
    return -1 if pad == "zero" else (side - 1) - abs((side - 1) - abs(row))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rows(geometry: Geometry) -> None:
    """Every member of every group, every slot, and every row's members; all rows are placed."""
    for side in (2, 3, 4, 5, 8, 11):
        if geometry.pad == "reflection" and geometry.before >= side:
            continue
        count, placed_rows = geometry.members(side), set()
        for group in range(geometry.groups):
            for slot in range(geometry.size):
                seen, places, reached = (torch.full((n, 32), -7).int() for n in (1, 1, 2))
                kind = (geometry.kind, geometry.size, geometry.stride, geometry.before)
                probe[(1,)](seen, places, reached, group, slot, side, *kind, geometry.pad)
                expected = [row_seen(geometry, side, group, m, slot) for m in range(count)]
                assert seen[0, :count].tolist() == expected
                placed_rows |= set(places[0, :count].tolist())
                for row in range(side):
                    members_of_row = [m for m in range(count) if expected[m] == row]
                    assert sorted(m for m in reached[:, row].tolist() if m >= 0) == members_of_row
        assert placed_rows == set(range(geometry.side(side)))
