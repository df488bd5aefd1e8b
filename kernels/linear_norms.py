"""Per unit and layer ``|W_u|^2`` and ``sum_t |a_t||g_t|``, never below the exact norm by more than a factor 1 - NORM_SLACK.

a: ``[N, d]``, K times g: ``[N, p]``, offsets: ``[U + 1]`` -> fp64 ``[K, 2, U]``. In this order, without a look at the
device from the host:

1. norms of all rows, rounded up (row_norms.py);
2. units of at most ``longest`` rows by pairs of rows in fp32 (gram_norm.py), with a bound R on what that is off by;
3. a unit is left as it is if ``R <= 2 NORM_SLACK |W|^2`` and its rows do not cancel, ``(sum_t |a_t||g_t|)^2 <= CANCELLING L
   |W|^2``: for rows that do, the bound would be all there is;
4. all others, by kernels whose programs look at a flag and leave, by tiles of W_u in fp32 (direct_norm.py), whose R is about
   sqrt(L) times smaller where rows of a have much in common; judged alike;
5. what is left in fp64, with the fp64 bound added.

A unit with a row that is not finite or beyond LARGEST_ROW gets inf: beside it, what underflows elsewhere would matter. A
unit without rows gets 0. fp64 input goes to step 5 at once. docs/sensitivity.md says what the rest of the privacy proof
does with it.
"""

from functools import reduce

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import GRAM_BLOCK, Config, Signature, dtype_class, longest_gram
from fastclip.kernels.direct_norm import direct_bound, direct_parts, num_slices
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.gram_norm import MOST_LAYERS, gram_again, gram_parts
from fastclip.kernels.row_norms import dense_rows, row_norms
from fastclip.kernels.tiles import most_tiles, rows_of, tile_starts
from torch import Tensor

# As in fastclip.reference.
NORM_SLACK, CANCELLING = 2.0**-8, 4
LARGEST_ROW, LARGEST_ROW_FP64 = 2.0**100, 2.0**400
_WIDTH = 1024


@triton.jit
def _sum(ptr, first, stop, step: tl.constexpr, WIDTH: tl.constexpr):
    """fp64: of every step-th number from first to stop."""
    total = tl.zeros([WIDTH], tl.float64)
    while first < stop:
        at = first + tl.arange(0, WIDTH)
        total += tl.load(ptr + at * step, mask=at < stop, other=0.0)
        first += WIDTH
    return tl.sum(total)


@triton.jit
def _columns(layer, slices_0, slices_1, slices_2):
    """(first, stop): where a layer's partial sums stand in a row of slices."""
    first = tl.where(layer == 0, 0, tl.where(layer == 1, slices_0, slices_0 + slices_1)).to(tl.int64)
    return first, first + tl.where(layer == 0, slices_0, tl.where(layer == 1, slices_1, slices_2))


@triton.jit
def _enough(error, square, spread, rows, NORM_SLACK: tl.constexpr, CANCELLING: tl.constexpr):
    proven = (error <= 2 * NORM_SLACK * square) & (square < float("inf"))
    return proven & (spread * spread <= CANCELLING * rows.to(tl.float64) * square)


@triton.jit
def _judge_gram_kernel(
    out_ptr,  # fp64 [K, 2, U]
    again_ptr,  # int32 [K, U]
    parts_ptr,  # fp64 [K, most, 2]
    starts_ptr,
    offsets_ptr,
    norms_ptr,  # fp64 [1 + K, N]
    num_units: tl.int64,
    num_rows: tl.int64,
    most: tl.int64,
    longest: tl.int64,
    WIDE: tl.constexpr,
    LARGEST: tl.constexpr,
    NORM_SLACK: tl.constexpr,
    CANCELLING: tl.constexpr,
    WIDTH: tl.constexpr,
):
    unit, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, stop = rows_of(offsets_ptr, unit)
    rows = stop - first
    spreads = tl.zeros([WIDTH], tl.float64)
    large = tl.zeros([WIDTH], tl.int32)
    start = first
    while start < stop:
        row = start + tl.arange(0, WIDTH)
        left = tl.load(norms_ptr + row, mask=row < stop, other=0.0)
        right = tl.load(norms_ptr + (1 + layer) * num_rows + row, mask=row < stop, other=0.0)
        spreads += left * right
        large += tl.where((left <= LARGEST) & (right <= LARGEST), 0, 1)  # NaN is not <= anything
        start += WIDTH
    spread = tl.sum(spreads)
    finite = tl.sum(large) == 0
    again = finite & (rows > 0)
    square = spread * 0
    if not WIDE:
        again = again & (spread > 0)
        if rows <= longest:
            begin = tl.load(starts_ptr + unit)
            end = tl.load(starts_ptr + unit + 1)
            square = _sum(parts_ptr + 2 * layer * most, begin, end, 2, WIDTH)
            error = _sum(parts_ptr + 2 * layer * most + 1, begin, end, 2, WIDTH) * (1 + 2.0**-12)
            length = rows.to(tl.float64)
            error += length * length * 2.0**-123  # what underflows in forming both
            again = again & (_enough(error, square, spread, rows, NORM_SLACK, CANCELLING) == 0)
        square = tl.where(spread > 0, square, 0.0)
    to = out_ptr + 2 * layer * num_units + unit
    tl.store(to, tl.where(finite, tl.where(rows > 0, square, 0.0), float("inf")))
    tl.store(to + num_units, spread)
    tl.store(again_ptr + layer * num_units + unit, again.to(tl.int32))


@triton.jit
def _judge_direct_kernel(
    out_ptr,
    again_ptr,
    slices_ptr,  # fp64 [U, S]
    offsets_ptr,
    num_units: tl.int64,
    slices_0: tl.int64,
    slices_1: tl.int64,
    slices_2: tl.int64,
    area: tl.int64,  # d p, of the widest layer
    units: tl.int64,  # as direct_bound has them
    block: tl.int64,
    squares: tl.float64,
    NORM_SLACK: tl.constexpr,
    CANCELLING: tl.constexpr,
    WIDTH: tl.constexpr,
):
    unit, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    flag = again_ptr + layer * num_units + unit
    if tl.load(flag) != 0:
        first, stop = rows_of(offsets_ptr, unit)
        rows = stop - first
        to = out_ptr + 2 * layer * num_units + unit
        spread = tl.load(to + num_units)
        begin, end = _columns(layer, slices_0, slices_1, slices_2)
        square = _sum(slices_ptr + unit * (slices_0 + slices_1 + slices_2), begin, end, 1, WIDTH)
        gamma = (units + (rows + block - 1) // block).to(tl.float64) * (2.0**-24 * (1 + 2.0**-8))
        off = gamma * spread + rows.to(tl.float64) * tl.sqrt(area.to(tl.float64)) * 2.0**-125
        error = 2 * off * tl.sqrt(square) + off * off + squares * square + area.to(tl.float64) * 2.0**-125
        tl.store(to, square)
        tl.store(flag, (_enough(error, square, spread, rows, NORM_SLACK, CANCELLING) == 0).to(tl.int32))


@triton.jit
def _finish_kernel(
    out_ptr,
    again_ptr,
    parts_ptr,
    slices_ptr,
    starts_ptr,
    offsets_ptr,
    num_units: tl.int64,
    most: tl.int64,
    longest: tl.int64,
    slices_0: tl.int64,
    slices_1: tl.int64,
    slices_2: tl.int64,
    d: tl.int64,
    widest: tl.int64,
    WIDTH: tl.constexpr,
):
    unit, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tl.load(again_ptr + layer * num_units + unit) != 0:
        first, stop = rows_of(offsets_ptr, unit)
        rows = stop - first
        to = out_ptr + 2 * layer * num_units + unit
        spread = tl.load(to + num_units)
        if rows <= longest:
            begin = tl.load(starts_ptr + unit)
            square = _sum(parts_ptr + 2 * layer * most, begin, tl.load(starts_ptr + unit + 1), 2, WIDTH)
            terms = (d + widest + 2 * rows + 4).to(tl.float64)
            square += 4 * terms * 2.0**-53 * spread * spread
        else:
            begin, end = _columns(layer, slices_0, slices_1, slices_2)
            square = _sum(slices_ptr + unit * (slices_0 + slices_1 + slices_2), begin, end, 1, WIDTH)
            norm = tl.sqrt(square) + (rows + 2).to(tl.float64) * 2.0**-53 * spread
            square = norm * norm
        tl.store(to, square)


def _some_layers(out: Tensor, a: Tensor, g: list[Tensor], offsets: Tensor, route: str, norms: Tensor) -> None:
    """out: fp64 ``[K, 2, U]``, written, for K <= MOST_LAYERS. norms: fp64 ``[1 + K, N]``, all a's already there."""
    (n, d), units, layers = a.shape, offsets.numel() - 1, len(g)
    kind = dtype_class(a, *g)
    wide = kind == "fp64"
    longest = longest_gram(route, n, d, sum(x.shape[1] for x in g))
    for k, x in enumerate(g):
        row_norms(x, norms[1 + k])
    starts = tile_starts(offsets, longest, GRAM_BLOCK)
    parts = out.new_empty(layers, most_tiles(n, units, longest, GRAM_BLOCK), 2)
    counts, counts_again = ([num_slices(a, x, kind, w) for x in g] for w in (wide, True))
    slices = out.new_empty(units * max(sum(counts), sum(counts_again)))
    again = torch.empty(layers, units, dtype=torch.int32, device=a.device)
    grid, widest = (units, layers), max(x.shape[1] for x in g)
    rule = {"NORM_SLACK": NORM_SLACK, "CANCELLING": CANCELLING, "WIDTH": _WIDTH}

    def by_slices(counts: list[int], wide: bool) -> None:
        table = slices[: units * sum(counts)].view(units, sum(counts))
        for k, x in enumerate(g):
            direct_parts(table, sum(counts[:k]), again[k], a, x, offsets, longest, kind, wide)

    if longest and not wide:
        gram_parts(parts, starts, a, g, offsets, norms, kind)
    largest = LARGEST_ROW_FP64 if wide else LARGEST_ROW
    _judge_gram_kernel[grid](
        out, again, parts, starts, offsets, norms, units, n, parts.shape[1], longest, WIDE=wide, LARGEST=largest, **rule
    )
    if not wide:
        by_slices(counts, False)
        bound = direct_bound(a, g, kind)
        _judge_direct_kernel[grid](out, again, slices, offsets, units, *_three(counts), d * widest, *bound, **rule)
    if longest:
        for k, x in enumerate(g):
            gram_again(parts[k], starts, again[k], a, x, offsets, longest)
    if longest < n:
        by_slices(counts_again, True)
    _finish_kernel[grid](
        out, again, parts, slices, starts, offsets, units, parts.shape[1], longest, *_three(counts_again), d, widest,
        WIDTH=_WIDTH,
    )  # fmt: skip


def _three(counts: list[int]) -> list[int]:
    return (counts + [0] * MOST_LAYERS)[:MOST_LAYERS]


def linear_norms(a: Tensor, g: list[Tensor], offsets: Tensor, route: str = "auto") -> Tensor:
    """fp64 ``[K, 2, U]`` of a ``[N, d]`` and K times g ``[N, p]``. Raises ValueError for other shapes or dtypes."""
    for x in g:
        if a.dim() != 2 or x.dim() != 2 or a.shape[0] != x.shape[0]:
            raise ValueError(f"a must be [N, d] and g [N, p] with the same N, got {list(a.shape)} and {list(x.shape)}")
    refuse_interpreted_bf16(_judge_gram_kernel, a, *g)
    if dtype_class(a, *g) != "fp64":  # there each is widened by itself, and a tied head's [N, V] is not copied
        dtype = reduce(torch.promote_types, (x.dtype for x in g), a.dtype)
        a, g = a.to(dtype), [x.to(dtype) for x in g]
    units, n = offsets.numel() - 1, a.shape[0]
    out = torch.zeros(len(g), 2, units, dtype=torch.float64, device=a.device)
    if units == 0 or n == 0 or not all(x.shape[1] for x in (a, *g)):
        return out
    a, offsets, layers = dense_rows(a), offsets.contiguous(), [dense_rows(x) for x in g]
    norms = torch.empty(1 + min(len(g), MOST_LAYERS), n, dtype=torch.float64, device=a.device)
    row_norms(a, norms[0])
    for k in range(0, len(g), MOST_LAYERS):
        _some_layers(out[k : k + MOST_LAYERS], a, layers[k : k + MOST_LAYERS], offsets, route, norms)
    return out


def signatures() -> list[Signature]:
    rule = {"NORM_SLACK": NORM_SLACK, "CANCELLING": CANCELLING}
    flags, offsets = {"out_ptr": "*fp64", "again_ptr": "*i32"}, {"offsets_ptr": "*i32"}
    parts, slices = {"parts_ptr": "*fp64", "starts_ptr": "*i64"}, {"slices_ptr": "*fp64"}
    config, judged = Config({"WIDTH": _WIDTH}, 4, 3), {**rule, "LARGEST": LARGEST_ROW, "WIDE": False}
    pointers = {**flags, **parts, **offsets, "norms_ptr": "*fp64"}
    return [
        config.form(_judge_gram_kernel, "judge_gram", pointers, judged),
        config.form(_judge_direct_kernel, "judge_direct", {**flags, **slices, **offsets}, rule),
        config.form(_finish_kernel, "finish", {**flags, **parts, **slices, **offsets}, {}),
    ]
