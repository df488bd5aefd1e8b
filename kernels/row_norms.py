"""Norms of rows, rounded up: ``n_t = |x_t| (1 + 1e-9)``, and per unit ``sum_t |a_t||g_t|``.

x: ``[N, d]`` -> fp64 ``[N]``, one pass over x, 2 N d FLOPs in fp64: small rows may have large partners, so that squares
that are 0 in fp32 count. 1e-9 is beyond what summing up to 2^22 squares in fp64 takes away.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.chunks import unit_totals
from fastclip.kernels.configs import Config, Signature
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from torch import Tensor

_BLOCK_T, _BLOCK_D = 16, 128


@triton.jit(do_not_specialize=["num_rows"])
def _row_norms_kernel(out_ptr, x_ptr, stride, num_rows, d, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float64)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = (row < num_rows)[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        wide = x.to(tl.float32).to(tl.float64) if x.dtype != tl.float64 else x
        total += wide * wide
    tl.store(out_ptr + row, tl.sqrt(tl.sum(total, 1)) * (1 + 1e-9), mask=row < num_rows)


def dense_rows(x: Tensor) -> Tensor:
    """x ``[N, d]`` with its columns side by side; rows may stand anywhere, or all in one place."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_norms(x: Tensor, out: Tensor) -> Tensor:
    """out: fp64 ``[N]``, returned. x: ``[N, d]``, dense_rows."""
    n, d = x.shape
    if n:
        grid = (triton.cdiv(n, _BLOCK_T),)
        _row_norms_kernel[grid](out, x, x.stride(0), n, d, BLOCK_T=_BLOCK_T, BLOCK_D=_BLOCK_D)
    return out


def row_norm_products(a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """fp64 ``[U]``: sums of ``|a_t||g_t|`` over each unit's rows. a: ``[N, d]``, g: ``[N, p]``, offsets: ``[U + 1]``."""
    refuse_interpreted_bf16(_row_norms_kernel, a, g)
    norms = torch.empty(2, a.shape[0], dtype=torch.float64, device=a.device)
    row_norms(dense_rows(a), norms[0])
    row_norms(dense_rows(g), norms[1])
    return unit_totals((norms[0] * norms[1])[:, None], offsets.contiguous(), 1)


def signatures() -> list[Signature]:
    config = Config({"BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D}, 4, 3)
    return [
        config.form(_row_norms_kernel, f"row_norms {x}", {"out_ptr": "*fp64", "x_ptr": f"*{x}"}, {})
        for x in ("bf16", "fp32")
    ]
