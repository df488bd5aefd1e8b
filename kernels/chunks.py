"""Units of rows cut into chunks of R rows, while the host knows neither their lengths nor their number.

Unit u owns rows offsets[u]:offsets[u + 1]; its chunk c takes rows offsets[u] + c R and on, at most R. Chunk c of unit u has the
place offsets[u] // R + u + c: no other chunk has it, because floor(s + L) >= floor(s) + ceil(L) - 1 for every s and L, and all
places lie below N // R + U. So a grid of that many programs covers every unit, each program finds its chunk by binary search,
and what it finds goes to its own place of a buffer of partial sums: no sync, no atomics, one order. Chunks count from the
unit's first row, so that a unit's bits do not depend on what stands before it.
"""

import triton
import triton.language as tl
from fastclip.kernels.configs import Signature, form
from torch import Tensor


def num_places(rows: int, offsets: Tensor, size: int) -> int:
    """How many places chunks of ``size`` rows take at most."""
    return rows // size + offsets.numel() - 1


@triton.jit
def first_place(offsets_ptr, unit, SIZE: tl.constexpr):
    return tl.load(offsets_ptr + unit).to(tl.int64) // SIZE + unit


@triton.jit
def find_chunk(offsets_ptr, num_units, place, SIZE: tl.constexpr):
    """(unit, first row, stop): int64 rows; first >= stop where no chunk has this place."""
    low = place * 0
    high = low + num_units
    while high - low > 1:
        middle = (low + high) // 2
        below = first_place(offsets_ptr, middle, SIZE) <= place
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    chunk = place - first_place(offsets_ptr, low, SIZE)
    first = tl.load(offsets_ptr + low).to(tl.int64) + chunk * SIZE
    stop = tl.minimum(first + SIZE, tl.load(offsets_ptr + low + 1).to(tl.int64))
    return low, first, stop


@triton.jit(do_not_specialize=["width"])
def _unit_totals_kernel(out_ptr, parts_ptr, offsets_ptr, width, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64)
    if SIZE == 1:
        first = tl.load(offsets_ptr + unit).to(tl.int64)
        stop = tl.load(offsets_ptr + unit + 1).to(tl.int64)
    else:
        first = first_place(offsets_ptr, unit, SIZE)
        rows = tl.load(offsets_ptr + unit + 1).to(tl.int64) - tl.load(offsets_ptr + unit).to(tl.int64)
        stop = first + (rows + SIZE - 1) // SIZE
    total = tl.zeros([BLOCK], tl.float64)
    start, end = first * width, stop * width
    while start < end:
        at = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + at, mask=at < end, other=0.0)
        start += BLOCK
    tl.store(out_ptr + unit, tl.sum(total))


def unit_totals(parts: Tensor, offsets: Tensor, size: int) -> Tensor:
    """fp64 ``[U]``: sums of each unit's rows of fp64 parts ``[places, width]``; size 1: parts has a place for every row."""
    out = parts.new_empty(offsets.numel() - 1)
    if out.numel():
        _unit_totals_kernel[(out.numel(),)](out, parts, offsets, parts.shape[1], SIZE=size, BLOCK=256)
    return out


def signatures() -> list[Signature]:
    pointers = {"out_ptr": "*fp64", "parts_ptr": "*fp64", "offsets_ptr": "*i32"}
    return [form(_unit_totals_kernel, "unit_totals", pointers, {"SIZE": 1, "BLOCK": 256})]
