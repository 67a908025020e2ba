"""Which rows of its input a row of a convolution's output sees, and the other way round.

All that is said of rows holds for columns. Three kinds of convolution differ in nothing else:

"conv": kernel K, stride S, padded by `before` rows in front (reflected or zero), one group of
    output rows: output row m sees padded rows S m + slot, slot = 0 .. K - 1.

"nearest": conv3x3 of the map with its pixels doubled, computed on the small map. Output rows fall
    into two groups, even and odd; each sees two rows of the small map, through the sum of those of
    the three taps that fall on the same small row (FOLDED, below): 16 products instead of 36.
    Reflection of the doubled map is replication of the small one.

"bilinear": bilinear enlargement is doubling followed by the filter [1, 2, 1] / 4, which changes
    places with the convolution. So this is "nearest" with one more row at either end, for the
    filter to come. Doubled rows are then reflected about the outermost *doubled* row: row -1 of the
    result is of the kind of even rows, but sees small rows 1, 0; the last one is of the kind of odd
    rows and sees H - 1, H - 2. Reflection padding only.

A group's rows are numbered m = 0 .. members - 1.
"""

from typing import Literal, NamedTuple

import triton
import triton.language as tl

from flashdip.kernels.opset import Pad

Kind = Literal["conv", "nearest", "bilinear"]

# Which of the three taps are summed: [group, slot] -> taps.
FOLDED = (((0,), (1, 2)), ((0, 1), (2,)))


class Geometry(NamedTuple):
    """How a convolution's output lies over its input; see the module's text.

    Attributes:
        kind: What is convolved.
        size: Kernel size K; of the folded kinds 2.
        stride: 1 or 2; of the folded kinds 1.
        before: Rows of padding in front; of the folded kinds 1.
        pad: How the input goes on beyond its border.
    """

    kind: Kind = "conv"
    size: int = 3
    stride: int = 1
    before: int = 1
    pad: Pad = "reflection"

    @property
    def groups(self) -> int:
        """Groups of output rows."""
        return 1 if self.kind == "conv" else 2

    def members(self, side: int) -> int:
        """Return how many rows each group has, for an input of `side` rows."""
        if self.kind == "conv":
            after = self.size - 1 - self.before
            return (side + self.before + after - self.size) // self.stride + 1
        return side + (self.kind == "bilinear")

    def side(self, side: int) -> int:
        """Return the number of output rows; the outer ones of "bilinear" included."""
        return self.groups * self.members(side)


@triton.jit
def members(side, KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """Return how many rows each group has, for an input of `side` rows."""
    if KIND == "conv":
        return (side - 1) // S + 1
    elif KIND == "nearest":
        return side
    else:
        return side + 1


@triton.jit
def placed(group, m, side, KIND: tl.constexpr):
    """Return where member m of a group lies among the output rows."""
    if KIND == "conv":
        return m
    elif KIND == "nearest":
        return 2 * m + group
    else:  # row r of the doubled map lies at r + 1
        even = tl.where(m == 0, 0, 2 * m - 1)
        odd = tl.where(m == side, 2 * side + 1, 2 * m + 2)
        return tl.where(group == 0, even, odd)


@triton.jit
def source(
    group, m, slot, side, KIND: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """Return which input row member m of a group sees through a slot, and whether it exists.

    For members that do not exist the row is any that does.
    """
    if KIND == "conv":
        row = S * m + slot - BEFORE
    elif KIND == "nearest":
        row = m + group + slot - 1
    else:
        # Even: 1 0, then as nearest, one member later. Odd: as nearest, then H - 1, H - 2.
        first = tl.where(slot == 0, 1, 0)
        even = tl.where(m == 0, first, tl.maximum(m - 2 + slot, 0))
        last = side - 1 - slot
        odd = tl.where(m == side, last, tl.minimum(m + slot, side - 1))
        row = tl.where(group == 0, even, odd)
    inside = (row >= 0) & (row < side)
    if PAD == "reflection":
        if KIND == "conv":
            row = tl.maximum(row, -row)
            row = tl.minimum(row, 2 * (side - 1) - row)
        inside = row == row
    return tl.minimum(tl.maximum(row, 0), side - 1), inside


@triton.jit
def targets(
    group, row, slot, side, KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BEFORE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Return the members that see input row `row` through a slot: at most two.

    Returns:
        The ordinary member and whether it exists, and the one that sees the row only because of
        the padding and whether it exists: `main, main_exists, extra, extra_exists`.
    """
    count = members(side, KIND, K, S)
    if KIND == "conv":
        offset = row + BEFORE - slot
        main, aligned = offset // S, offset % S == 0
        main_exists = (offset >= 0) & aligned & (main < count)
        extra, extra_exists = main, main_exists & (row < 0)
        if PAD == "reflection":
            # Padded rows -row and 2 (side - 1) - row are reflected to `row`; never both at once.
            low, high = -row + BEFORE - slot, 2 * (side - 1) - row + BEFORE - slot
            by_low = (row > 0) & (low >= 0) & (low % S == 0) & (low // S < count)
            by_high = (row < side - 1) & (high >= 0) & (high % S == 0) & (high // S < count)
            by_low = by_low & (slot < BEFORE)
            by_high = by_high & (slot > BEFORE)
            extra = tl.where(by_low, low // S, high // S)
            extra_exists = by_low | by_high
    elif KIND == "nearest":
        main = row - group - slot + 1
        main_exists = (main >= 0) & (main < side)
        extra = tl.where(group == 0, 0, side - 1)
        extra_exists = (row == extra) & (slot == group)
        if PAD != "reflection":
            extra_exists = extra_exists & (row < 0)
    else:
        even = group == 0
        main = tl.where(even, row + 2 - slot, row - slot)
        # Even member 1 is clamped through slot 0; member 0 sees 1 0. Odd mirrors it.
        main_exists = tl.where(even, main <= side, main >= 0)
        end = tl.where(even, row, side - 1 - row)  # rows from the end that is clamped
        inner = tl.where(even, slot == 0, slot == 1)  # the slot that may reach beyond it
        step = tl.where(inner, tl.where(end == 0, 1, 0), 0)
        extra = tl.where(even, step, side - step)
        extra_exists = (end == 0) | ((end == 1) & inner)
    main = tl.minimum(tl.maximum(main, 0), count - 1)
    extra = tl.minimum(tl.maximum(extra, 0), count - 1)
    return main, main_exists, extra, extra_exists
