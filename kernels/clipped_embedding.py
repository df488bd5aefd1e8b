"""The clipped sum of embedding gradients: ``out[v] += sum_{t: id_t = v} c_u(t) g_t``.

ids: int ``[N]``, g: ``[N, d]``, offsets: ``[U + 1]``, factors c: ``[U]``, out: fp32 or fp64 ``[V, d]``. Rows are sorted by id;
the head of each run sums its rows, times their factors, in out's dtype, and adds the sum to its row of out, which is nobody
else's. 2 N d FLOPs; g is read once, and rows of out that are looked up are read and written.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import narrow_dtype, refuse_interpreted_bf16
from fastclip.kernels.runs import is_head, run_sum, sort_rows, units_of_rows
from torch import Tensor

_BLOCK_D, _BLOCK_T = 256, 16


@triton.jit(do_not_specialize=["n", "vocabulary"])
def _add_runs_kernel(
    out_ptr,
    g_ptr,
    factors_ptr,
    keys_ptr,
    order_ptr,
    n,
    d,
    stride_v,
    vocabulary,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + i)
    # Nothing is written outside out, whatever stands in ids.
    if is_head(keys_ptr, i) & (key >= 0) & (key < vocabulary):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = run_sum(g_ptr, factors_ptr, keys_ptr, order_ptr, i, n, d, column, True, WIDE, BLOCK_T, BLOCK_D)
        at = out_ptr + key * stride_v + column
        tl.store(at, tl.load(at, mask=column < d, other=0.0) + total, mask=column < d)


def clipped_embedding(
    ids: Tensor, g: Tensor, offsets: Tensor, factors: Tensor, out: Tensor, padding_idx: int | None = None
) -> None:
    """Adds to out ``[V, d]``. Rows of padding_idx, of factor 0 and of ids outside [0, V) are left out.

    Raises ValueError if out is not fp32 or fp64 with dense rows of g's width.
    """
    refuse_interpreted_bf16(_add_runs_kernel, g)
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out must be fp32 or fp64, got {out.dtype}; sums accumulate in fp32")
    if out.dim() != 2 or out.shape[1] != g.shape[1] or (out.stride(1) != 1 and out.shape[1] > 1):
        raise ValueError(
            f"out must be [V, {g.shape[1]}] with dense rows, got {list(out.shape)}, strides {out.stride()}"
        )
    g, offsets = g.contiguous(), offsets.contiguous()
    n, d = g.shape
    if n == 0 or d == 0:
        return
    ids = ids.long()
    row_factors = factors.to(out.dtype)[units_of_rows(offsets, n)]  # [N]
    if padding_idx is not None:
        row_factors = row_factors.masked_fill(ids == padding_idx, 0.0)
    keys, order = sort_rows(ids)
    _add_runs_kernel[(n, triton.cdiv(d, _BLOCK_D))](
        out,
        g,
        row_factors,
        keys,
        order,
        n,
        d,
        out.stride(0),
        out.shape[0],
        WIDE=narrow_dtype(out.dtype),
        BLOCK_T=_BLOCK_T,
        BLOCK_D=_BLOCK_D,
    )


def signatures() -> list[Signature]:
    pointers = {"out_ptr": "*fp32", "g_ptr": "*bf16", "factors_ptr": "*fp32", "keys_ptr": "*i64", "order_ptr": "*i64"}
    constants = {"WIDE": tl.float32, "BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D}
    return [form(_add_runs_kernel, "clipped_embedding bf16", pointers, constants, sizes={"d", "stride_v"})]
