"""Tiles of pairs of rows: the upper triangle of each unit's [L, L], in blocks of B rows, all units' one after another.

A unit of L rows has n = ceil(L / B) blocks and n (n + 1) / 2 tiles; tile j (j + 1) / 2 + i takes block i <= j of its rows
against block j. Only the device knows how many tiles there are: a prefix sum over the units stands in memory, programs take
every P-th tile until its last entry, and find a tile's unit by binary search. A tile's place in a buffer of partial sums is
its number, and the order within a unit does not depend on the other units.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import GRAM_BLOCK, Config, Signature
from torch import Tensor

_WIDTH = 1024


@triton.jit
def num_tiles(rows, BLOCK: tl.constexpr):
    blocks = (rows + BLOCK - 1) // BLOCK
    return blocks * (blocks + 1) // 2


@triton.jit
def rows_of(offsets_ptr, unit):
    """(first row, stop), int64."""
    return tl.load(offsets_ptr + unit).to(tl.int64), tl.load(offsets_ptr + unit + 1).to(tl.int64)


@triton.jit
def block_pair(tile):
    """(i, j) with i <= j and tile = j (j + 1) / 2 + i."""
    j = ((tl.sqrt((8 * tile + 1).to(tl.float64)) - 1) / 2).to(tl.int64)
    j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)  # the root may be rounded over an integer
    j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
    return tile - j * (j + 1) // 2, j


@triton.jit
def find_unit(starts_ptr, num_units, tile):
    """The unit that holds a tile: the last one that starts at or before it."""
    low = tile * 0
    high = low + num_units
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(starts_ptr + middle) <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["num_units", "longest"])
def _tile_starts_kernel(starts_ptr, offsets_ptr, num_units, longest, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    lane = tl.arange(0, WIDTH).to(tl.int64)
    before = tl.zeros([WIDTH], tl.int64)  # tiles of all earlier units, in every lane
    start = tl.zeros([], tl.int64)
    while start < num_units:
        unit = start + lane
        mask = unit < num_units
        first = tl.load(offsets_ptr + unit, mask=mask, other=0).to(tl.int64)
        rows = tl.load(offsets_ptr + unit + 1, mask=mask, other=0).to(tl.int64) - first
        tiles = tl.where(rows <= longest, num_tiles(rows, BLOCK), 0)
        tl.store(starts_ptr + unit + 1, before + tl.cumsum(tiles, 0), mask=mask)
        before += tl.sum(tiles, 0)
        start += WIDTH
    tl.store(starts_ptr + lane, lane * 0, mask=lane == 0)


def tile_starts(offsets: Tensor, longest: int, block: int) -> Tensor:
    """int64 ``[U + 1]``: where each unit's tiles start; units of more than ``longest`` rows have none."""
    units = offsets.numel() - 1
    starts = torch.empty(units + 1, dtype=torch.int64, device=offsets.device)
    _tile_starts_kernel[(1,)](starts, offsets, units, longest, BLOCK=block, WIDTH=_WIDTH)
    return starts


def most_tiles(rows: int, units: int, longest: int, block: int) -> int:
    """No fewer than all units together have."""
    blocks = triton.cdiv(min(longest, rows), block)
    return (rows // block + units) * (blocks + 1) // 2


def signatures() -> list[Signature]:
    config = Config({"BLOCK": GRAM_BLOCK, "WIDTH": _WIDTH}, 4, 3)
    return [config.form(_tile_starts_kernel, "tile_starts", {"starts_ptr": "*i64", "offsets_ptr": "*i32"}, {})]
