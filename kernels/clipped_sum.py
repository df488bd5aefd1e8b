"""The clipped sum of per-unit gradients that stand there whole: ``out += sum_u c_u G_u``.

G: ``[U, P]``, factors c: ``[U]``, out: fp32 or fp64 ``[P]``. 2 U P FLOPs; reads G once, reads and writes out. Units are added
in their order, in fp64, and out is rounded once. Units of factor 0 are read and left out of the sum: their inf and NaN stay
with them.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from torch import Tensor

_BLOCK, _TOGETHER = 1024, 4


@triton.jit
def clipped_columns(grads_ptr, factors_ptr, num_units, p, column, mask, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """fp64 [BLOCK]: columns of ``sum_u factors[u] grads[u]``. grads: ``[U, p]``, factors: fp64 ``[U]``."""
    total = tl.zeros([BLOCK], tl.float64)
    first = num_units * 0
    while first < num_units:
        for i in tl.static_range(TOGETHER):  # loads of some units in flight together
            unit = (first + i).to(tl.int64)
            factor = tl.load(factors_ptr + unit, mask=unit < num_units, other=0.0)
            value = tl.load(grads_ptr + tl.minimum(unit, num_units - 1) * p + column, mask=mask, other=0.0)
            total = tl.where(factor == 0.0, total, total + factor * value.to(tl.float64))  # no load waits for a factor
        first += TOGETHER
    return total


@triton.jit(do_not_specialize=["num_units"])
def _clipped_sum_kernel(
    out_ptr, grads_ptr, factors_ptr, num_units, p: tl.int64, BLOCK: tl.constexpr, TOGETHER: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < p
    total = clipped_columns(grads_ptr, factors_ptr, num_units, p, column, mask, BLOCK, TOGETHER)
    total += tl.load(out_ptr + column, mask=mask, other=0.0).to(tl.float64)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def check_whole(grads: Tensor, factors: Tensor, out: Tensor) -> None:
    """ValueError unless grads are ``[U, *out.shape]``, factors ``[U]`` and out contiguous."""
    if grads.dim() == 0 or factors.shape != grads.shape[:1] or grads.numel() != grads.shape[0] * out.numel():
        raise ValueError(
            f"grads must be [U, *out.shape] and factors [U], got {list(grads.shape)}, {list(factors.shape)} and "
            f"out {list(out.shape)}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}; pass a buffer of its own")


def clipped_sum(grads: Tensor, factors: Tensor, out: Tensor) -> None:
    """Adds to out. Raises ValueError if shapes do not fit, or out is not contiguous fp32 or fp64."""
    refuse_interpreted_bf16(_clipped_sum_kernel, grads)
    check_whole(grads, factors, out)
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out must be fp32 or fp64, got {out.dtype}; sums accumulate in fp32")
    if out.numel():
        _clipped_sum_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            out,
            grads.contiguous(),
            factors.double().contiguous(),
            factors.numel(),
            out.numel(),
            BLOCK=_BLOCK,
            TOGETHER=_TOGETHER,
        )


def signatures() -> list[Signature]:
    pointers = {"out_ptr": "*fp32", "grads_ptr": "*bf16", "factors_ptr": "*fp64"}
    constants = {"BLOCK": _BLOCK, "TOGETHER": _TOGETHER}
    return [form(_clipped_sum_kernel, "clipped_sum bf16", pointers, constants, sizes={"p"})]
