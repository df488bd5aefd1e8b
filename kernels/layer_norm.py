"""Backward of LayerNorm and RMSNorm, with the gradients of gain and bias a unit, in one pass.

    x_hat = (x - mean) rstd        v = g w        dx = rstd (v - mean_p(v) - x_hat mean_p(v x_hat))
    gain_u = sum_{t in S_u} g_t x_hat_t           bias_u = sum_{t in S_u} g_t

RMSNorm has no mean: x_hat = x rstd, and mean_p(v) drops out (Ba, Kiros and Hinton, 2016; Zhang and Sennrich, NeurIPS 2019).
g, x: ``[N, p]``, mean, rstd: ``[N]``, w: ``[p]`` -> dx ``[N, p]``, gain and bias ``[U, p]``. About 12 N p FLOPs; g and x are
read once and dx written, 3 N p elements, and partial sums add N p / 2 bytes. A lane adds up to 32 rows in fp32, everything
beyond in fp64.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.affine_norm import unit_sums
from fastclip.kernels.chunks import find_chunk, num_places
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import narrow_dtype, refuse_interpreted_bf16
from torch import Tensor

_ROWS, _TILE, _LARGEST = 32, 4096, 8192


@triton.jit(do_not_specialize=["num_units"])
def _layer_norm_backward_kernel(
    dx_ptr,
    gain_ptr,
    bias_ptr,
    g_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    offsets_ptr,
    num_units,
    p,
    HAS_MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_P)
    mask_p = column < p
    _, first, stop = find_chunk(offsets_ptr, num_units, place, ROWS)
    gain = tl.zeros([BLOCK_T, BLOCK_P], NARROW)
    bias = tl.zeros([BLOCK_T, BLOCK_P], NARROW)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=mask_p, other=0.0).to(NARROW)
    for start in range(0, ROWS, BLOCK_T):
        row = first + start + tl.arange(0, BLOCK_T)
        mask_t = row < stop
        at = row[:, None] * p + column[None, :]  # [BLOCK_T, BLOCK_P]
        mask = mask_t[:, None] & mask_p[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(NARROW)
        x_hat = tl.load(x_ptr + at, mask=mask, other=0.0).to(NARROW)
        rstd = tl.load(rstd_ptr + row, mask=mask_t, other=0.0).to(NARROW)
        if HAS_MEAN:
            mean = tl.load(mean_ptr + row, mask=mask_t, other=0.0).to(NARROW)
            x_hat -= mean[:, None]
        x_hat *= rstd[:, None]
        gain += g * x_hat
        if HAS_BIAS:
            bias += g
        v = g
        if HAS_WEIGHT:
            v = g * weight[None, :]
        dx = v - x_hat * (tl.sum(v * x_hat, 1) / p)[:, None]
        if HAS_MEAN:
            dx -= (tl.sum(v, 1) / p)[:, None]
        tl.store(dx_ptr + at, (dx * rstd[:, None]).to(dx_ptr.dtype.element_ty), mask=mask)
    if first < stop:
        tl.store(gain_ptr + place * p + column, tl.sum(gain.to(tl.float64), 0), mask=mask_p)
        if HAS_BIAS:
            tl.store(bias_ptr + place * p + column, tl.sum(bias.to(tl.float64), 0), mask=mask_p)


def _blocks(p: int) -> tuple[dict[str, int], int]:
    """Block sizes, and warps, for rows of p."""
    block_p = triton.next_power_of_2(max(p, 1))
    return {"BLOCK_T": max(1, min(8, _TILE // block_p)), "BLOCK_P": block_p}, max(8, block_p // 512)


def layer_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, offsets: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """(dx ``[N, p]`` in x's dtype, sums ``[1 or 2, U, p]``: gain's, and bias'), sums in fp32, or fp64 for fp64.

    mean: None for RMSNorm. weight: None if it is all ones. bias: whether there is one. Raises ValueError on shapes that do
    not fit and on p beyond 8192, whose row does not fit a program's registers.
    """
    refuse_interpreted_bf16(_layer_norm_backward_kernel, g, x, weight)
    n, p = x.shape
    if g.shape != x.shape or rstd.numel() != n or (mean is not None and mean.numel() != n):
        raise ValueError(f"g must have x's shape {list(x.shape)} and mean and rstd {n} rows, got g {list(g.shape)}")
    if weight is not None and weight.shape != (p,):
        raise ValueError(f"weight must be [{p}], got {list(weight.shape)}")
    if p > _LARGEST:
        raise ValueError(f"p must be at most {_LARGEST}, got {p}; use torch's own backward and segment_sum")
    g, x, rstd, offsets = g.contiguous(), x.contiguous(), rstd.contiguous(), offsets.contiguous()
    mean, weight = (None if y is None else y.contiguous() for y in (mean, weight))
    dx = torch.empty_like(x)
    gain, shift = (g.new_empty(num_places(n, offsets, _ROWS), p, dtype=torch.float64) for _ in range(2))
    blocks, num_warps = _blocks(p)
    if gain.numel():
        _layer_norm_backward_kernel[(gain.shape[0],)](
            dx,
            gain,
            shift,
            g,
            x,
            mean,
            rstd,
            weight,
            offsets,
            offsets.numel() - 1,
            p,
            HAS_MEAN=mean is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias,
            NARROW=narrow_dtype(x.dtype),
            ROWS=_ROWS,
            num_warps=num_warps,
            **blocks,
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dx, torch.stack([unit_sums(part, offsets, _ROWS, dtype) for part in ((gain, shift) if bias else (gain,))])


def signatures() -> list[Signature]:
    def of(dtype: str, block_p: int) -> Signature:
        pointers = {f"{name}_ptr": f"*{dtype}" for name in ("dx", "g", "x", "weight")}
        pointers |= {"gain_ptr": "*fp64", "bias_ptr": "*fp64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
        blocks, num_warps = _blocks(block_p)
        constants = {
            "HAS_MEAN": True,
            "HAS_WEIGHT": True,
            "HAS_BIAS": True,
            "NARROW": tl.float32,
            "ROWS": _ROWS,
            **blocks,
        }
        return form(
            _layer_norm_backward_kernel,
            f"layer_norm_backward {dtype} {block_p}",
            {**pointers, "offsets_ptr": "*i32"},
            constants,
            sizes={"p"},
            num_warps=num_warps,
        )

    return [of("bf16", 1024), of("bf16", 8192), of("fp32", 4096)]
