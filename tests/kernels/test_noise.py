"""The perturbation: normal draws, read from another place for each seed, fit, retry and step."""

import torch

from flashdip.kernels import noise


def test_known_answers() -> None:
    """The written function, pinned: every backend and every version draws the same."""
    assert noise.key(0) == 1_955_356_219
    assert [noise.offset(noise.key(0), step) for step in (1, 2, 3)] == [3897136, 3092616, 793800]
    assert noise.key(7, fit=2, retry=1) == 577_268_952
    assert noise.table()[:3].tolist() == [-1.0654296875, 0.88134765625, 1.5849609375]


def test_table_is_standard_normal_and_fits_float16() -> None:
    """Mean, deviation, kurtosis of four million draws."""
    table = noise.table().double()
    assert len(table) == noise.TABLE_SIZE
    assert torch.equal(table.half().double(), table)
    assert abs(float(table.mean())) < 2e-3
    assert abs(float(table.std()) - 1) < 2e-3
    assert abs(float((table**4).mean()) - 3) < 0.02


def test_offsets_spread_evenly_and_depend_on_everything() -> None:
    """Aligned, within the table, uniform over it, other for each seed, fit, retry and step."""
    key = noise.key(0)
    offsets = torch.tensor([noise.offset(key, step) for step in range(1, 4001)])
    assert int(offsets.min()) >= 0
    assert int(offsets.max()) < noise.TABLE_SIZE
    assert not (offsets % noise.ALIGNMENT).any()
    counts = torch.histc(offsets.double(), bins=16, min=0, max=noise.TABLE_SIZE)
    chi_square = float(((counts - 250) ** 2 / 250).sum())
    assert chi_square < 37.7  # 15 degrees of freedom: one in a thousand is larger
    keys = {noise.key(s, f, r) for s in (0, 1, 2**31, 2**40) for f in range(3) for r in range(3)}
    assert len(keys) == 36


def test_large_seeds_are_told_apart() -> None:
    """The hash works modulo 2^31 - 1; seeds that are equal there are not."""
    prime = 2**31 - 1
    assert len({noise.key(seed) for seed in (0, prime, 2 * prime, prime**2 - prime)}) == 4
