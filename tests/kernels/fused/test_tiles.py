"""How streams of pixels are cut, on every architecture."""

import pytest
import torch

from flashdip.kernels.fused.tiles import ARCHITECTURES, Tiles


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fits", [1, 3, 400])
def test_streams(arch: str, dtype: torch.dtype, fits: int) -> None:
    """All fits have programs, each of them a tile, and no more of them than run at once."""
    processors = ARCHITECTURES[arch].processors
    tiles = Tiles(ARCHITECTURES[arch], dtype, fits)
    for side in (1, 7, 32, 64, 128, 512, 2048):
        for channels in (3, 16, 128):
            stream, head = tiles.stream(side**2, channels), tiles.head(side**2, channels)
            for tile, places in ((stream, processors), (head, 2 * processors)):
                assert 1 <= tile.splits <= -(-(side**2) // tile.pixels)
                assert tile.splits == 1 or tile.splits * fits <= places


def test_small_maps_leave_few_sums_behind() -> None:
    """By the rules a program's sum is worth several tiles, unless all processors are taken."""
    tiles = Tiles(ARCHITECTURES["sm_90"]._replace(table={}), torch.float16, 1)
    programs = {side: tiles.stream(side**2, 128).splits for side in (32, 64, 128, 256, 512)}
    assert programs == {32: 32, 64: 64, 128: 103, 256: 132, 512: 132}
    warps = [tiles.stream(side**2, 128).warps for side in (64, 128)]
    assert warps == [4, 8]  # where a second program, with other inputs, finds room
