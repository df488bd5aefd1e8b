"""``|W_u|^2 = sum_{s,t} (a_s . a_t)(g_s . g_t)`` over pairs of rows of a unit, for up to three layers that read one input a.

a: ``[N, d]``, g: up to three ``[N, p]`` -> fp64 partial sums, one place a tile: kernels/tiles.py. By symmetry a tile off
the diagonal counts twice: L^2 (d + sum of p) FLOPs a unit; a tile reads 2 B (d + p) elements and no product leaves the
chip.

The second partial sum bounds the first's error. With ``|P_a - A| <= alpha = gamma_a |a_s||a_t| + d 2^-125`` and ``beta``
alike for g (kernels/products.py), ``|P_a P_g - A G| <= |P_a| beta + |P_g| alpha + alpha beta``; forming the product and
adding B of them in fp32 takes at most ``(B + 2) 2^-24 |P_a P_g|`` more, everything beyond is added in fp64. That is far
less than Cauchy-Schwarz over both factors where either's rows are not parallel.
"""

import triton
import triton.language as tl
from fastclip.kernels.configs import GRAM, GRAM_AGAIN, Signature, programs
from fastclip.kernels.products import UNDERFLOW, dot, gamma
from fastclip.kernels.tiles import block_pair, find_unit, num_tiles, rows_of
from torch import Tensor

MOST_LAYERS = 3


@triton.jit
def _pair_products(x_ptr, stride, columns, i, j, stop, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK, BLOCK]: rows i of x times rows j."""
    acc = tl.zeros([BLOCK, BLOCK], tl.float64 if WIDE else tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            x_ptr + i[:, None] * stride + k[None, :], mask=(i < stop)[:, None] & (k < columns)[None, :], other=0.0
        )
        right = tl.load(
            x_ptr + j[None, :] * stride + k[:, None], mask=(j < stop)[None, :] & (k < columns)[:, None], other=0.0
        )
        acc = dot(left, right, acc, WIDE, BLOCK_K)
    return acc


@triton.jit
def _pair_norms(norms_ptr, i, j, stop):
    """fp32 [BLOCK, BLOCK]: |x_i||x_j|, of rows that fp32 has no norm for no less."""
    left = tl.load(norms_ptr + i, mask=i < stop, other=0.0).to(tl.float32)
    right = tl.load(norms_ptr + j, mask=j < stop, other=0.0).to(tl.float32)
    return tl.maximum(left, 2.0**-126)[:, None] * tl.maximum(right, 2.0**-126)[None, :]


@triton.jit
def _store_layer(
    parts_ptr,
    products,  # of a, [BLOCK, BLOCK], and alpha
    alpha,
    g_ptr,
    stride,
    p,
    norms_ptr,
    gamma_g,
    i,
    j,
    stop,
    weight,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNDERFLOW: tl.constexpr,
):
    others = _pair_products(g_ptr, stride, p, i, j, stop, False, BLOCK, BLOCK_K)
    beta = _pair_norms(norms_ptr, i, j, stop) * gamma_g + p * UNDERFLOW
    both = products * others
    error = tl.abs(products) * beta + tl.abs(others) * alpha + alpha * beta + tl.abs(both) * ((BLOCK + 2) * 2.0**-24)
    tl.store(parts_ptr, tl.sum(tl.sum(both, 0).to(tl.float64)) * weight)
    tl.store(parts_ptr + 1, tl.sum(tl.sum(error, 0).to(tl.float64)) * weight)


@triton.jit(do_not_specialize=["num_units", "num_rows", "most"])
def _gram_kernel(
    parts_ptr,  # fp64 [K, most, 2]
    starts_ptr,
    offsets_ptr,
    a_ptr,
    stride_a,
    d,
    gamma_a: tl.float32,
    g0_ptr,
    stride_0,
    p0,
    gamma_0: tl.float32,
    g1_ptr,
    stride_1,
    p1,
    gamma_1: tl.float32,
    g2_ptr,
    stride_2,
    p2,
    gamma_2: tl.float32,
    norms_ptr,  # fp64 [1 + K, N], a's first
    num_units,
    num_rows,
    most,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNDERFLOW: tl.constexpr,
):
    n, place = num_rows.to(tl.int64), 2 * most.to(tl.int64)
    total = tl.load(starts_ptr + num_units)
    tile = tl.program_id(0).to(tl.int64)
    while tile < total:
        unit = find_unit(starts_ptr, num_units, tile)
        first, stop = rows_of(offsets_ptr, unit)
        block_i, block_j = block_pair(tile - tl.load(starts_ptr + unit))
        i = first + block_i * BLOCK + tl.arange(0, BLOCK)
        j = first + block_j * BLOCK + tl.arange(0, BLOCK)
        weight = tl.where(block_i == block_j, 1.0, 2.0)
        products = _pair_products(a_ptr, stride_a, d, i, j, stop, False, BLOCK, BLOCK_K)
        alpha = _pair_norms(norms_ptr, i, j, stop) * gamma_a + d * UNDERFLOW
        at = parts_ptr + 2 * tile
        _store_layer(
            at, products, alpha, g0_ptr, stride_0, p0, norms_ptr + n, gamma_0, i, j, stop, weight,
            BLOCK, BLOCK_K, UNDERFLOW,
        )  # fmt: skip
        if LAYERS > 1:
            _store_layer(
                at + place, products, alpha, g1_ptr, stride_1, p1, norms_ptr + 2 * n, gamma_1, i, j, stop, weight,
                BLOCK, BLOCK_K, UNDERFLOW,
            )  # fmt: skip
        if LAYERS > 2:
            _store_layer(
                at + 2 * place, products, alpha, g2_ptr, stride_2, p2, norms_ptr + 3 * n, gamma_2, i, j, stop, weight,
                BLOCK, BLOCK_K, UNDERFLOW,
            )  # fmt: skip
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["longest"])
def _gram_again_kernel(
    parts_ptr,  # fp64 [most, 2]
    starts_ptr,
    offsets_ptr,
    again_ptr,
    a_ptr,
    stride_a,
    d,
    g_ptr,
    stride_g,
    p,
    longest,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    first, stop = rows_of(offsets_ptr, unit)
    if tl.load(again_ptr + unit) != 0 and stop - first <= longest:
        start = tl.load(starts_ptr + unit)
        tiles = num_tiles(stop - first, BLOCK)
        tile = tl.program_id(1).to(tl.int64)
        while tile < tiles:
            block_i, block_j = block_pair(tile)
            i = first + block_i * BLOCK + tl.arange(0, BLOCK)
            j = first + block_j * BLOCK + tl.arange(0, BLOCK)
            weight = tl.where(block_i == block_j, 1.0, 2.0)
            both = _pair_products(a_ptr, stride_a, d, i, j, stop, True, BLOCK, BLOCK_K)
            both *= _pair_products(g_ptr, stride_g, p, i, j, stop, True, BLOCK, BLOCK_K)
            tl.store(parts_ptr + 2 * (start + tile), tl.sum(both) * weight)
            tile += tl.num_programs(1)


def gram_parts(
    parts: Tensor, starts: Tensor, a: Tensor, g: list[Tensor], offsets: Tensor, norms: Tensor, kind: str
) -> None:
    """parts: fp64 ``[K, most, 2]``, written where tiles are; g: K <= 3 tensors; norms: fp64 ``[1 + K, N]``; rows dense."""
    config, (n, d) = GRAM[kind], a.shape
    layers: list[Tensor | int | float] = []
    for x in (g + g[:1] * MOST_LAYERS)[:MOST_LAYERS]:
        layers += [x, x.stride(0), x.shape[1], gamma(x.dtype, x.shape[1], config.blocks["BLOCK_K"])]
    grid = (min(parts.shape[1], programs(a.device)),)
    _gram_kernel[grid](
        parts,
        starts,
        offsets,
        a,
        a.stride(0),
        d,
        gamma(a.dtype, d, config.blocks["BLOCK_K"]),
        *layers,
        norms,
        offsets.numel() - 1,
        n,
        parts.shape[1],
        LAYERS=len(g),
        UNDERFLOW=UNDERFLOW,
        **config.options(),
    )


def gram_again(
    parts: Tensor, starts: Tensor, again: Tensor, a: Tensor, g: Tensor, offsets: Tensor, longest: int
) -> None:
    """The first of parts ``[most, 2]`` in fp64, for units of ``again`` ``[U]`` of at most ``longest`` rows; others are left."""
    units = offsets.numel() - 1
    grid = (units, min(parts.shape[0], max(1, programs(a.device) // units)))
    _gram_again_kernel[grid](
        parts, starts, offsets, again, a, a.stride(0), a.shape[1], g, g.stride(0), g.shape[1], longest,
        **GRAM_AGAIN.options(),
    )  # fmt: skip


def signatures() -> list[Signature]:
    found = []
    where = {"parts_ptr": "*fp64", "starts_ptr": "*i64", "offsets_ptr": "*i32"}
    for x, layers in (("bf16", 1), ("bf16", 3), ("fp16", 1), ("fp32", 1), ("fp32", 3)):
        config = GRAM["fp32" if x == "fp32" else "half"]
        rows = {**where, "norms_ptr": "*fp64", **dict.fromkeys(("a_ptr", "g0_ptr", "g1_ptr", "g2_ptr"), f"*{x}")}
        constants = {"LAYERS": layers, "UNDERFLOW": UNDERFLOW}
        found.append(config.form(_gram_kernel, f"gram_norm {x}, {layers} layers", rows, constants))
    for x, y in (("bf16", "bf16"), ("fp32", "fp32"), ("fp64", "fp64"), ("fp64", "bf16")):
        rows = {**where, "again_ptr": "*i32", "a_ptr": f"*{x}", "g_ptr": f"*{y}"}
        found.append(GRAM_AGAIN.form(_gram_again_kernel, f"gram_norm again {x} {y}", rows, {}))
    return found
