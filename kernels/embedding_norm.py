"""Squared norms of embedding gradients: ``sum_v |sum_{t in S_u: id_t = v} g_t|^2`` for every unit u.

ids: int ``[N]``, g: ``[N, d]``, offsets: ``[U + 1]`` -> fp64 ``[U]``. Rows are sorted by (unit, id); the head of each run sums
its rows in fp64 and squares. N d additions; g is read once, N d elements, beside a sort of N keys and N / BLOCK_D fp64 squares.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.chunks import unit_totals
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.runs import is_head, run_sum, sort_rows, units_of_rows
from torch import Tensor

_BLOCK_D, _BLOCK_T = 256, 8


@triton.jit(do_not_specialize=["n", "padding"])
def _run_squares_kernel(
    squares_ptr,
    g_ptr,
    keys_ptr,
    order_ptr,
    n,
    d,
    padding: tl.int64,
    HAS_PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    square = tl.zeros([BLOCK_D], tl.float64)
    summed = is_head(keys_ptr, i)
    if HAS_PADDING:
        summed &= (tl.load(keys_ptr + i) & 0xFFFFFFFF) != padding
    if summed:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = run_sum(g_ptr, g_ptr, keys_ptr, order_ptr, i, n, d, column, False, tl.float64, BLOCK_T, BLOCK_D)
        square = total * total
    tl.store(squares_ptr + i * tl.num_programs(1) + tl.program_id(1), tl.sum(square))


def embedding_norm(ids: Tensor, g: Tensor, offsets: Tensor, padding_idx: int | None = None) -> Tensor:
    """fp64 ``[U]`` of ids ``[N]`` in [0, 2^31) and g ``[N, d]``; rows of padding_idx are left out."""
    refuse_interpreted_bf16(_run_squares_kernel, g)
    g, offsets = g.contiguous(), offsets.contiguous()
    n, d = g.shape
    # A unit's rows stay within offsets[u]:offsets[u + 1] when they are sorted.
    keys, order = sort_rows(units_of_rows(offsets, n).long() * 2**32 + (ids.long() & 0xFFFFFFFF))
    squares = g.new_empty(n, triton.cdiv(d, _BLOCK_D), dtype=torch.float64)
    if squares.numel():
        _run_squares_kernel[squares.shape](
            squares,
            g,
            keys,
            order,
            n,
            d,
            -1 if padding_idx is None else padding_idx,
            HAS_PADDING=padding_idx is not None,
            BLOCK_T=_BLOCK_T,
            BLOCK_D=_BLOCK_D,
        )
    return unit_totals(squares, offsets, 1)


def signatures() -> list[Signature]:
    pointers = {"squares_ptr": "*fp64", "g_ptr": "*bf16", "keys_ptr": "*i64", "order_ptr": "*i64"}
    constants = {"HAS_PADDING": True, "BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D}
    return [form(_run_squares_kernel, "embedding_norm bf16", pointers, constants, sizes={"d"})]
