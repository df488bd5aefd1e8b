"""Gradients of biases and gains, a unit: ``S_u = sum_t g_t`` or ``sum_t g_t * x_t`` over its rows, and their squared norms.

g, x: ``[N, p]``, offsets: ``[U + 1]`` -> S ``[U, p]`` in fp32 (fp64 for fp64), or fp64 ``[U]`` norms of those same numbers.
N p additions (twice that with x), one pass over g and x: 2 N p elements read with x; partial sums add N p / 16 bytes. A lane
adds 8 rows in fp32, everything beyond in fp64: a sum is off by at most 9 2^-24 of what it adds (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., section 4.2).
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.chunks import find_chunk, first_place, num_places
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import narrow_dtype, refuse_interpreted_bf16
from torch import Tensor

ROWS = 128  # of a chunk
_BLOCK_P, _BLOCK_T, _TOGETHER = 128, 16, 4


@triton.jit(do_not_specialize=["num_units"])
def _chunk_sums_kernel(
    parts_ptr,
    g_ptr,
    x_ptr,
    offsets_ptr,
    num_units,
    p,
    HAS_X: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    _, first, stop = find_chunk(offsets_ptr, num_units, place, ROWS)
    total = tl.zeros([BLOCK_T, BLOCK_P], NARROW)
    for start in range(0, ROWS, BLOCK_T):
        row = first + start + tl.arange(0, BLOCK_T)
        at = row[:, None] * p + column[None, :]  # [BLOCK_T, BLOCK_P]
        mask = (row < stop)[:, None] & (column < p)[None, :]
        value = tl.load(g_ptr + at, mask=mask, other=0.0).to(NARROW)
        if HAS_X:
            value *= tl.load(x_ptr + at, mask=mask, other=0.0).to(NARROW)
        total += value
    if first < stop:
        tl.store(parts_ptr + place * p + column, tl.sum(total.to(tl.float64), 0), mask=column < p)


@triton.jit
def _unit_sums_kernel(
    out_ptr,
    parts_ptr,
    offsets_ptr,
    p,
    NARROW: tl.constexpr,
    SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = tl.load(offsets_ptr + unit + 1).to(tl.int64) - tl.load(offsets_ptr + unit).to(tl.int64)
    place = first_place(offsets_ptr, unit, ROWS)
    stop = place + (rows + ROWS - 1) // ROWS
    total = tl.zeros([TOGETHER, BLOCK_P], tl.float64)
    while place < stop:
        some = place + tl.arange(0, TOGETHER)
        mask = (some < stop)[:, None] & (column < p)[None, :]
        total += tl.load(parts_ptr + some[:, None] * p + column[None, :], mask=mask, other=0.0)
        place += TOGETHER
    value = tl.sum(total, 0).to(NARROW)
    if SQUARE:
        wide = value.to(tl.float64)
        tl.store(out_ptr + unit * tl.num_programs(1) + tl.program_id(1), tl.sum(wide * wide))
    else:
        tl.store(out_ptr + unit * p + column, value, mask=column < p)


def unit_sums(parts: Tensor, offsets: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[U, p] in dtype: sums of each unit's chunks of ``rows`` rows. parts: fp64 ``[places, p]``."""
    units, p = offsets.numel() - 1, parts.shape[1]
    out = parts.new_empty(units, p, dtype=dtype)
    if out.numel():
        grid = (units, triton.cdiv(p, _BLOCK_P))
        _unit_sums_kernel[grid](
            out,
            parts,
            offsets,
            p,
            NARROW=narrow_dtype(dtype),
            SQUARE=False,
            ROWS=rows,
            BLOCK_P=_BLOCK_P,
            TOGETHER=_TOGETHER,
        )
    return out


def _parts(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
    """fp64 ``[places, p]``: sums of the chunks."""
    refuse_interpreted_bf16(_chunk_sums_kernel, g, x_hat)
    if x_hat is not None and x_hat.shape != g.shape:
        raise ValueError(f"x_hat must have g's shape {list(g.shape)}, got {list(x_hat.shape)}")
    g, x_hat, offsets = g.contiguous(), None if x_hat is None else x_hat.contiguous(), offsets.contiguous()
    n, p = g.shape
    parts = g.new_empty(num_places(n, offsets, ROWS), p, dtype=torch.float64)
    if parts.numel():
        grid = (parts.shape[0], triton.cdiv(p, _BLOCK_P))
        _chunk_sums_kernel[grid](
            parts,
            g,
            x_hat,
            offsets,
            offsets.numel() - 1,
            p,
            HAS_X=x_hat is not None,
            NARROW=narrow_dtype(g.dtype),
            ROWS=ROWS,
            BLOCK_P=_BLOCK_P,
            BLOCK_T=_BLOCK_T,
        )
    return parts


def segment_sum(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
    """[U, p] sums of g ``[N, p]``, or of ``g * x_hat``, over each unit's rows; fp32, or fp64 for fp64."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    return unit_sums(_parts(g, x_hat, offsets), offsets.contiguous(), ROWS, dtype)


def affine_norm(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
    """fp64 ``[U]``: squared norms of the rows of ``segment_sum``."""
    parts, offsets = _parts(g, x_hat, offsets), offsets.contiguous()
    units, p = offsets.numel() - 1, g.shape[1]
    squares = parts.new_empty(units, triton.cdiv(p, _BLOCK_P))
    if squares.numel():
        narrow = narrow_dtype(torch.float64 if g.dtype == torch.float64 else torch.float32)
        _unit_sums_kernel[squares.shape](
            squares,
            parts,
            offsets,
            p,
            NARROW=narrow,
            SQUARE=True,
            ROWS=ROWS,
            BLOCK_P=_BLOCK_P,
            TOGETHER=_TOGETHER,
        )
    return squares.sum(1)


def signatures() -> list[Signature]:
    offsets = {"offsets_ptr": "*i32", "parts_ptr": "*fp64"}
    blocks = {"NARROW": tl.float32, "ROWS": ROWS, "BLOCK_P": _BLOCK_P}
    forms = [
        form(
            _chunk_sums_kernel,
            f"chunk_sums {dtype}",
            {"g_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", **offsets},
            {"HAS_X": True, "BLOCK_T": _BLOCK_T, **blocks},
            sizes={"p"},
        )
        for dtype in ("bf16", "fp32")
    ]
    together = {"SQUARE": False, "TOGETHER": _TOGETHER, **blocks}
    return [*forms, form(_unit_sums_kernel, "unit_sums", {"out_ptr": "*fp32", **offsets}, together, sizes={"p"})]
