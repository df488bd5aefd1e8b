"""Inner product, a unit, of a head's and an embedding's gradient that share one weight ``[V, d]``.

    cross_u = sum_{s, t} z_s[id_t] (h_s . e_t)        s: the unit's rows of the head, t: those of the embedding

h: ``[S, d]``, z: ``[S, V]``, ids: int ``[N]``, e: ``[N, d]`` -> fp64 ``[U]``. 2 L_s L_t d FLOPs a unit, in fp64 throughout,
because head and embedding may cancel. A program takes a chunk of the head's rows and goes through all of the unit's rows
of the embedding: h is read once, e once a chunk, and L_s L_t elements are picked from z.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.chunks import find_chunk, num_places, unit_totals
from fastclip.kernels.configs import Signature, form
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from torch import Tensor

_ROWS, _BLOCK_T, _BLOCK_D = 32, 32, 32


@triton.jit(do_not_specialize=["num_units", "vocabulary", "padding"])
def _tied_cross_kernel(
    parts_ptr,
    h_ptr,
    z_ptr,
    head_offsets_ptr,
    ids_ptr,
    e_ptr,
    offsets_ptr,
    num_units,
    vocabulary: tl.int64,
    padding: tl.int64,
    d,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    D_BLOCKS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    unit, first, stop = find_chunk(head_offsets_ptr, num_units, place, ROWS)
    s = first + tl.arange(0, ROWS)
    mask_s = s < stop
    total = tl.zeros([ROWS, BLOCK_T], tl.float64)
    start = tl.load(offsets_ptr + unit).to(tl.int64)
    end = tl.where(first < stop, tl.load(offsets_ptr + unit + 1).to(tl.int64), start)
    while start < end:
        t = start + tl.arange(0, BLOCK_T)
        mask_t = t < end
        ids = tl.load(ids_ptr + t, mask=mask_t, other=0).to(tl.int64)
        product = tl.zeros([ROWS, BLOCK_T], tl.float64)
        for block in range(0, D_BLOCKS):
            column = block * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = column < d
            h = tl.load(h_ptr + s[:, None] * d + column[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0.0).to(
                tl.float64
            )
            e = tl.load(e_ptr + t[None, :] * d + column[:, None], mask=mask_t[None, :] & mask_d[:, None], other=0.0).to(
                tl.float64
            )
            product = tl.dot(h, e, product, out_dtype=tl.float64)
        counted = mask_t
        if HAS_PADDING:
            counted &= ids != padding
        known = (ids >= 0) & (ids < vocabulary)
        z = tl.load(
            z_ptr + s[:, None] * vocabulary + ids[None, :], mask=mask_s[:, None] & (counted & known)[None, :], other=0.0
        ).to(tl.float64)
        # An id that no row of the weight has: the unit's result is NaN, so that it takes no part in the sum.
        term = tl.where(known[None, :], z * product, float("nan"))
        total += tl.where(mask_s[:, None] & counted[None, :], term, 0.0)
        start += BLOCK_T
    if first < stop:
        tl.store(parts_ptr + place, tl.sum(tl.sum(total, 1)))


def tied_cross(
    h: Tensor, z: Tensor, head_offsets: Tensor, ids: Tensor, e: Tensor, offsets: Tensor, padding_idx: int | None = None
) -> Tensor:
    """fp64 ``[U]``. Rows of padding_idx get no embedding gradient. Raises ValueError if shapes do not fit."""
    refuse_interpreted_bf16(_tied_cross_kernel, h, z, e)
    if h.shape[1] != e.shape[1] or head_offsets.shape != offsets.shape:
        raise ValueError(
            f"h and e must have the same columns and both offsets the same units, got {list(h.shape)}, {list(e.shape)}, "
            f"{list(head_offsets.shape)} and {list(offsets.shape)}"
        )
    # An fp64 dot takes no operands widened from 16 bits (Triton 3.6 fails on them).
    wide = torch.float64 if torch.float64 in (h.dtype, e.dtype) else torch.float32
    h, e, z, ids = h.to(wide).contiguous(), e.to(wide).contiguous(), z.contiguous(), ids.contiguous()
    head_offsets, offsets = head_offsets.contiguous(), offsets.contiguous()
    parts = h.new_empty(num_places(h.shape[0], head_offsets, _ROWS), 1, dtype=torch.float64)
    if parts.numel():
        _tied_cross_kernel[(parts.shape[0],)](
            parts,
            h,
            z,
            head_offsets,
            ids,
            e,
            offsets,
            offsets.numel() - 1,
            z.shape[1],
            -1 if padding_idx is None else padding_idx,
            h.shape[1],
            HAS_PADDING=padding_idx is not None,
            ROWS=_ROWS,
            BLOCK_T=_BLOCK_T,
            BLOCK_D=_BLOCK_D,
            D_BLOCKS=triton.cdiv(h.shape[1], _BLOCK_D),
        )
    return unit_totals(parts, head_offsets, _ROWS)


def signatures() -> list[Signature]:
    pointers = {"parts_ptr": "*fp64", "h_ptr": "*fp32", "z_ptr": "*bf16", "ids_ptr": "*i64", "e_ptr": "*fp32"}
    pointers |= {"offsets_ptr": "*i32", "head_offsets_ptr": "*i32"}
    constants = {"HAS_PADDING": True, "ROWS": _ROWS, "BLOCK_T": _BLOCK_T, "BLOCK_D": _BLOCK_D, "D_BLOCKS": 24}
    return [form(_tied_cross_kernel, "tied_cross bf16", pointers, constants, sizes={"d"})]
