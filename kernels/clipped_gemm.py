"""``out += sum_u c_u g_u^T a_u``, or ``out =``, over units u with rows g_u, a_u and factors c_u.

a: ``[N, d]``, g: ``[N, p]``, factors: ``[U]`` -> out fp32 or fp64 ``[p, d]``; 2 N d p FLOPs, a tile of out reads N (BLOCK_P
+ BLOCK_D) elements. Units are cut into chunks (chunks.py) of BLOCK_T rows at most; a chunk's product is formed in fp32 (in
fp64 for fp64 out) and multiplied by the factor there, so that no narrow copy of c g is ever made. Chunks are added in the
order of their rows; those of factor 0 are not loaded, whatever stands in them.

The sum over a unit's L rows is off by at most ``c (gamma + (L / BLOCK_T + 2) 2^-24) sum_t |a_t||g_t|`` with gamma of
kernels/products.py for one dot of BLOCK_T.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.chunks import find_chunk, num_places
from fastclip.kernels.configs import GEMM, Config, Signature, dtype_class
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.products import widened
from fastclip.kernels.row_norms import dense_rows
from torch import Tensor

_SHORT = 48  # rows a unit


@triton.jit(do_not_specialize=["num_units"])
def _chunk_factors_kernel(
    chunks_ptr,  # int64 [places, 2]: first row and number of rows, 0 for a factor of 0
    chunk_factors_ptr,
    offsets_ptr,
    factors_ptr,
    num_units,
    BLOCK_T: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    unit, first, stop = find_chunk(offsets_ptr, num_units, place, BLOCK_T)
    factor = tl.load(factors_ptr + unit)
    tl.store(chunks_ptr + 2 * place, first)
    tl.store(chunks_ptr + 2 * place + 1, tl.where(factor == 0, 0, tl.maximum(stop - first, 0)))
    tl.store(chunk_factors_ptr + place, factor)


@triton.jit(do_not_specialize=["places"])
def _clipped_gemm_kernel(
    out_ptr,
    chunks_ptr,
    chunk_factors_ptr,
    a_ptr,
    stride_a,
    d,
    g_ptr,
    stride_g,
    p,
    stride_out,
    places,
    ACCUMULATE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float64 if WIDE else tl.float32)
    for place in range(0, places):
        first = tl.load(chunks_ptr + 2 * place)
        inside = t < tl.load(chunks_ptr + 2 * place + 1)
        row = first + t
        g = tl.load(g_ptr + row[None, :] * stride_g + i[:, None], mask=inside[None, :] & (i < p)[:, None], other=0.0)
        a = tl.load(a_ptr + row[:, None] * stride_a + j[None, :], mask=inside[:, None] & (j < d)[None, :], other=0.0)
        product = tl.dot(widened(g), widened(a)) if WIDE else tl.dot(g, a, input_precision="ieee")
        acc += product * tl.load(chunk_factors_ptr + place)
    to = out_ptr + i.to(tl.int64)[:, None] * stride_out + j[None, :]
    mask = (i < p)[:, None] & (j < d)[None, :]
    if ACCUMULATE:
        acc += tl.load(to, mask=mask, other=0.0)
    tl.store(to, acc, mask=mask)


def clipped_gemm(a: Tensor, g: Tensor, offsets: Tensor, factors: Tensor, out: Tensor, accumulate: bool = True) -> None:
    """As above; out's columns side by side, factors of any floating dtype. Raises ValueError for other shapes or dtypes."""
    if a.dim() != 2 or g.dim() != 2 or a.shape[0] != g.shape[0] or out.shape != (g.shape[1], a.shape[1]):
        raise ValueError(
            f"a must be [N, d], g [N, p], out [p, d], got {list(a.shape)}, {list(g.shape)}, {list(out.shape)}"
        )
    if factors.shape != (offsets.numel() - 1,):
        raise ValueError(
            f"factors must be [U] for offsets [U + 1], got {list(factors.shape)} and {list(offsets.shape)}"
        )
    if out.dtype not in (torch.float32, torch.float64) or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(f"out must be fp32 or fp64 with dense rows, got {out.dtype} with strides {list(out.stride())}")
    refuse_interpreted_bf16(_clipped_gemm_kernel, a, g)
    dtype_class(a, g)
    n, units = a.shape[0], factors.numel()
    if n == 0 or out.numel() == 0:
        if not accumulate:
            out.zero_()
        return
    wide = out.dtype == torch.float64
    if a.dtype != g.dtype or (a.dtype == torch.float64 and not wide):
        a, g = (x.to(out.dtype) for x in (a, g))  # products of one dtype
    config = GEMM["fp64" if wide else dtype_class(a), "short" if n < _SHORT * units else "long"]
    block, places = config.blocks, num_places(n, offsets, config.blocks["BLOCK_T"])
    a, g, offsets = dense_rows(a), dense_rows(g), offsets.contiguous()
    chunks = torch.empty(places, 2, dtype=torch.int64, device=a.device)
    chunk_factors = torch.empty(places, dtype=out.dtype, device=a.device)
    _chunk_factors_kernel[(places,)](
        chunks, chunk_factors, offsets, factors.to(out.dtype).contiguous(), units, BLOCK_T=block["BLOCK_T"]
    )
    p, d = out.shape
    _clipped_gemm_kernel[(triton.cdiv(p, block["BLOCK_P"]), triton.cdiv(d, block["BLOCK_D"]))](
        out, chunks, chunk_factors, a, a.stride(0), d, g, g.stride(0), p, out.stride(0), places,
        ACCUMULATE=accumulate, WIDE=wide, **config.options(),
    )  # fmt: skip


def signatures() -> list[Signature]:
    where = {"chunks_ptr": "*i64", "chunk_factors_ptr": "*fp32"}
    small = Config({"BLOCK_T": 64}, 4, 3)
    pointers = {**where, "offsets_ptr": "*i32", "factors_ptr": "*fp32"}
    found = [small.form(_chunk_factors_kernel, "chunk_factors", pointers, {})]
    rows = [("bf16", "half", "long"), ("bf16", "half", "short"), ("fp16", "half", "long"), ("fp32", "fp32", "long")]
    for x, kind, size in [*rows, ("bf16", "fp64", "long"), ("fp32", "fp64", "long"), ("fp64", "fp64", "long")]:
        out = "*fp64" if kind == "fp64" else "*fp32"
        pointers = {**where, "out_ptr": out, "chunk_factors_ptr": out, "a_ptr": f"*{x}", "g_ptr": f"*{x}"}
        constants = {"ACCUMULATE": True, "WIDE": kind == "fp64"}
        name = f"clipped_gemm {x} to {out[1:]}, {size}"
        found.append(GEMM[kind, size].form(_clipped_gemm_kernel, name, pointers, constants))
    return found
