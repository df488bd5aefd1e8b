"""Rows brought together by what they are looked up by: a stable sort, and sums over runs of equal keys.

A run's first row is its head: a row whose key differs from the one before. There is a program for every sorted row, and those
that are no heads leave. So nobody has to know how many runs there are: no sync, no atomics, and a run's rows are added in one
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def units_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """int ``[N]``: the unit that each row belongs to."""
    every = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, every, right=True) - 1


def sort_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ``[N]`` keys in order, and the rows they come from; rows with one key keep their order."""
    return torch.sort(keys.long(), stable=True)


@triton.jit
def is_head(keys_ptr, i):
    """Whether a run starts at sorted row i."""
    before = tl.load(keys_ptr + i - 1, mask=i > 0, other=0)
    return (i == 0) | (tl.load(keys_ptr + i) != before)


@triton.jit
def run_sum(
    rows_ptr,
    factors_ptr,
    keys_ptr,
    order_ptr,
    i,
    n,
    d,
    column,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_D] in WIDE: columns of the sum of the run that starts at sorted row i, each row times its factor if SCALED.

    rows: ``[n, d]``, factors: ``[n]`` in WIDE. Rows of factor 0 are not read.
    """
    key = tl.load(keys_ptr + i)
    total = tl.zeros([BLOCK_D], WIDE)
    going = i < n
    while going:
        place = i + tl.arange(0, BLOCK_T)
        mine = (place < n) & (tl.load(keys_ptr + place, mask=place < n, other=0) == key)
        row = tl.load(order_ptr + place, mask=mine, other=0)
        mask = mine
        if SCALED:
            factor = tl.load(factors_ptr + row, mask=mine, other=0.0)
            mask = mine & (factor != 0.0)
        value = tl.load(
            rows_ptr + row[:, None] * d + column[None, :], mask=mask[:, None] & (column < d)[None, :], other=0.0
        ).to(WIDE)
        if SCALED:
            value *= factor[:, None]
        total += tl.sum(value, 0)
        i += BLOCK_T
        going = tl.sum(mine.to(tl.int32)) == BLOCK_T
    return total
