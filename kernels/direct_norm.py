"""``|W_u|^2`` for ``W_u = sum_t g_t a_t^T`` of a unit's rows, in tiles of W_u that are squared where they stand.

a: ``[N, d]``, g: ``[N, p]`` -> fp64 partial sums ``[U, S]``; 2 L d p FLOPs a unit, no [p, d] leaves the chip. S programs a unit
take every S-th tile of [p, d] each, and all of the unit's rows: rows are never split, because a square needs the whole sum.
Only units that are asked for are looked at.

W_u itself is off by at most ``e = gamma_L sum_t |a_t||g_t| + L sqrt(d p) 2^-125`` in Frobenius norm (kernels/products.py, K
= BLOCK_T and G = ceil(L / BLOCK_T)), so its square by ``2 e |W| + e^2``; squares of a tile's rows are added in fp32, which
takes at most ``(BLOCK_P + 2) 2^-24`` of them, and everything beyond in fp64.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import DIRECT, DIRECT_AGAIN, Config, Signature
from fastclip.kernels.products import dot
from fastclip.kernels.tiles import rows_of
from torch import Tensor

SLICES = 128  # programs a unit, whatever the batch: the order of a unit's sums is its own


@triton.jit(do_not_specialize=["longest", "begin", "num_slices"])
def _direct_kernel(
    slices_ptr,
    offsets_ptr,
    again_ptr,
    a_ptr,
    stride_a,
    d,
    g_ptr,
    stride_g,
    p,
    longest,
    begin,
    num_slices,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    first, stop = rows_of(offsets_ptr, unit)
    wanted = tl.load(again_ptr + unit) != 0
    if WIDE:
        wanted = wanted & (stop - first > longest)
    if wanted:
        tiles_d = (d + BLOCK_D - 1) // BLOCK_D
        tiles = tiles_d * ((p + BLOCK_P - 1) // BLOCK_P)
        total = tl.zeros([], tl.float64)
        tile = tl.program_id(1)
        while tile < tiles:
            i = tile // tiles_d * BLOCK_P + tl.arange(0, BLOCK_P)
            j = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
            acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float64 if WIDE else tl.float32)
            for done in range(0, stop - first, BLOCK_T):
                row = first + done + tl.arange(0, BLOCK_T)
                inside = row < stop
                g = tl.load(
                    g_ptr + row[None, :] * stride_g + i[:, None], mask=inside[None, :] & (i < p)[:, None], other=0.0
                )
                a = tl.load(
                    a_ptr + row[:, None] * stride_a + j[None, :], mask=inside[:, None] & (j < d)[None, :], other=0.0
                )
                acc = dot(g, a, acc, WIDE, BLOCK_T)
            total += tl.sum(tl.sum(acc * acc, 0).to(tl.float64))
            tile += tl.num_programs(1)
        tl.store(slices_ptr + unit * num_slices + begin + tl.program_id(1), total)


def _config(a: Tensor, g: Tensor, kind: str, wide: bool) -> Config:
    if wide:
        return DIRECT_AGAIN
    return DIRECT[kind, "narrow" if min(a.shape[1], g.shape[1]) <= 16 else "wide"]


def num_slices(a: Tensor, g: Tensor, kind: str, wide: bool) -> int:
    """How many partial sums a unit has."""
    blocks, sides = _config(a, g, kind, wide).blocks, sorted((a.shape[1], g.shape[1]))
    return min(SLICES, triton.cdiv(sides[0], blocks["BLOCK_P"]) * triton.cdiv(sides[1], blocks["BLOCK_D"]))


def direct_bound(a: Tensor, g: list[Tensor], kind: str) -> tuple[int, int, float]:
    """(u, BLOCK_T, s) of the fp32 sums of ``direct_parts``, as above, at worst over g.

    gamma_L = (u + ceil(L / BLOCK_T)) 2^-24 (1 + 2^-8); adding squares takes s times their sum.
    """
    blocks = [_config(a, x, kind, kind == "fp64").blocks for x in g]
    step = blocks[0]["BLOCK_T"]  # one for all sizes
    units = 1 + (step if all(x.dtype == torch.float32 for x in (a, *g)) else 3 * step)
    return units, step, (max(x["BLOCK_P"] for x in blocks) + 2) * 2.0**-24


def direct_parts(
    slices: Tensor,
    begin: int,
    again: Tensor,
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    longest: int,
    kind: str,
    wide: bool,
) -> None:
    """slices: fp64 ``[U, S]``, written from column begin on, for units of ``again`` ``[U]``; rows dense.

    wide: in fp64, and only for units of more than ``longest`` rows.
    """
    if a.shape[1] < g.shape[1]:
        a, g = g, a  # |W| = |W^T|
    config = _config(a, g, kind, wide)
    grid = (offsets.numel() - 1, num_slices(a, g, kind, wide))
    _direct_kernel[grid](
        slices, offsets, again, a, a.stride(0), a.shape[1], g, g.stride(0), g.shape[1], longest, begin, slices.shape[1],
        WIDE=wide, **config.options(),
    )  # fmt: skip


def signatures() -> list[Signature]:
    found = []
    rows = [("bf16", "wide"), ("bf16", "narrow"), ("fp16", "wide"), ("fp32", "wide"), ("fp32", "narrow")]
    where = {"slices_ptr": "*fp64", "offsets_ptr": "*i32", "again_ptr": "*i32"}
    for x, size in [*rows, ("bf16", "again"), ("fp32", "again"), ("fp64", "again"), ("fp64", "again, bf16")]:
        wide = size.startswith("again")
        config = DIRECT_AGAIN if wide else DIRECT["fp32" if x == "fp32" else "half", size]
        pointers = {**where, "a_ptr": f"*{x}", "g_ptr": "*bf16" if size.endswith("bf16") else f"*{x}"}
        found.append(config.form(_direct_kernel, f"direct_norm {x}, {size}", pointers, {"WIDE": wide}))
    return found
