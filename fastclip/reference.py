"""Every op of :mod:`fastclip.ops` in plain torch, any device, any floating dtype up to fp64.

Rows are gathered by unit: unit u owns rows ``offsets[u]:offsets[u + 1]`` (int32 ``[U + 1]``; units may be empty). A unit
with inf or NaN gets a non-finite norm and touches no other unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

UNIT_ROUNDOFF_FP64 = 2.0**-53
UNIT_ROUNDOFF_FP32 = 2.0**-24
# How far below the exact norm, relatively, linear_norm may come: the optimizer draws that much more noise.
NORM_SLACK = 2.0**-8
# Rows that do not cancel have (sum_t |a_t||g_t|)^2 of at most L times the squared norm; beyond this many L, fp64.
CANCELLING = 4
_CHUNK_BYTES = 64 << 20
_GRAM_BLOCK = 128  # rows
LARGEST_ROW, LARGEST_ROW_FP64 = 2.0**100, 2.0**400
_FLUSHED = 2.0**-50  # times sqrt(columns): products of rows below it may lose themselves to what processors flush


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower: the dtype of clipped sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_norm(a: Tensor, g: Tensor, offsets: Tensor, route: str = "auto") -> Tensor:
    """fp64 ``[U]``: squared Frobenius norms of ``W_u = sum_t g_t a_t^T``, the first row of :func:`linear_norm_parts`."""
    return linear_norm_parts(a, g, offsets, route)[0]


def linear_norm_parts(a: Tensor, g: Tensor, offsets: Tensor, route: str = "auto") -> Tensor:
    """fp64 ``[2, U]``: squared Frobenius norms of ``W_u = sum_t g_t a_t^T``, and ``sum_t |a_t||g_t|``.

    a: ``[N, d]``, g: ``[N, p]``. route: "gram" sums ``(a_s . a_t)(g_s . g_t)`` over pairs of rows, L^2 (d + p) FLOPs by
    symmetry; "direct" squares ``W_u``, 2 L d p FLOPs; "auto" takes the cheaper one for the unit's length.

    Never below the exact value by more than a factor ``(1 - NORM_SLACK)^2``. The Gram sum cancels where rows do, so its
    error is bounded by what it sums: fp32 products in blocks of B columns, G blocks added in fp32 and the rest in fp64, are
    off by at most ``R = 2 (B + G + 1) 2^-24 (sum_t |a_t||g_t|)^2`` (Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., section 3.1, and Cauchy-Schwarz). A unit for which R is not small beside the result, or whose rows
    cancel at all, is done again in fp64, where the same bound is 1e-9 of that and is added. Rows that do not cancel have
    ``(sum_t |a_t||g_t|)^2`` of about L times the squared norm, so that longer units get smaller blocks. The direct route
    runs in fp64 here and sums squares. A unit with a row whose norm is beyond LARGEST_ROW gets inf, and so no part in the sum:
    beside it, what underflows in another factor would matter.
    """
    out = g.new_zeros(2, offsets.numel() - 1, dtype=torch.float64)
    d, p = a.shape[1], g.shape[1]
    largest = LARGEST_ROW_FP64 if torch.float64 in (a.dtype, g.dtype) else LARGEST_ROW
    for units, length, first in _equal_lengths(offsets):
        gram = route == "gram" or (route == "auto" and length * (d + p) <= 2 * d * p)
        step = max(1, _CHUNK_BYTES // (8 * length * (d + p)))
        for i in range(0, len(units), step):
            n = min(step, len(units) - i)
            rows = slice(first + i * length, first + (i + n) * length)
            a_u, g_u = a[rows].view(n, length, d), g[rows].view(n, length, p)
            a_norms, g_norms = _row_norms(a_u), _row_norms(g_u)
            products = a_norms * g_norms
            here = slice(units[i], units[i] + n)
            square = _gram(a_u, g_u, products) if gram else _direct(a_u, g_u, products)
            too_large = ((a_norms > largest) | (g_norms > largest)).any(1)
            out[0, here] = square.masked_fill(too_large, torch.inf)
            out[1, here] = products.sum(1)
    return out


def linear_norms(a: Tensor, g: Sequence[Tensor], offsets: Tensor, route: str = "auto") -> Tensor:
    """fp64 ``[K, 2, U]``: :func:`linear_norm_parts` of K layers that read one input a. g: K times ``[N, p]``."""
    return torch.stack([linear_norm_parts(a, x, offsets, route) for x in g])


def _gram(a: Tensor, g: Tensor, products: Tensor) -> Tensor:
    """[n] from a ``[n, L, d]``, g ``[n, L, p]``: in fp32 where that is proven to be enough, in fp64 where not.

    products: fp64 ``[n, L]``, ``|a_t||g_t|``.
    """
    spread = products.sum(1).square_()  # [n]
    length, d, p = a.shape[1], a.shape[2], g.shape[2]
    error = gram_error(d, p, length)
    wide = torch.float64 in (a.dtype, g.dtype) or error * length > 2 * NORM_SLACK
    if wide or a.device.type != "cpu":  # on a GPU the test below would wait for the device
        return _gram_fp64(a, g, spread)
    columns, group = _blocks(d, p, length)
    short = columns >= max(d, p)
    total = _gram_short(a.float(), g.float()) if short else _gram_fp32(a.float(), g.float(), columns, group)
    tiny = (_row_norms(a) < _FLUSHED * math.sqrt(d)) | (_row_norms(g) < _FLUSHED * math.sqrt(p))
    lost = 2 * (products * tiny).sum(1) * spread.sqrt()
    enough = (error * spread <= 2 * NORM_SLACK * total) & (spread <= CANCELLING * length * total)
    again = ~(enough & (lost <= 1e-6 * total) & (total > 1e-30) & total.isfinite())
    nothing = spread == 0  # a unit that does not touch this layer: common, and not worth another look
    if bool(nothing.any()):
        again[nothing] = ~((a[nothing] == 0).all(2).all(1) | (g[nothing] == 0).all(2).all(1))
    if bool(again.any()):
        total[again] = _gram_fp64(a[again], g[again], spread[again])
    return total


def _blocks(d: int, p: int, length: int) -> tuple[int, int]:
    """(columns whose products are summed in fp32, blocks of columns that are added in fp32); csrc has the same rule."""
    if (d + p + 2) * UNIT_ROUNDOFF_FP32 * length <= 2 * NORM_SLACK:
        return max(d, p), 1
    return (128, 16) if length <= 256 else (64, 16) if length <= 512 else (32, 8) if length <= 1024 else (32, 4)


def gram_error(d: int, p: int, length: int) -> float:
    """Times ``(sum_t |a_t||g_t|)^2``: the most that the fp32 Gram sum of a unit of ``length`` rows is off."""
    columns, group = _blocks(d, p, length)
    return (d + p + 2 if columns >= max(d, p) else 2 * (columns + group + 1)) * UNIT_ROUNDOFF_FP32


def direct_error(length: int) -> float:
    """Times ``sum_t |a_t||g_t|``: the most that ``W_u`` of a unit of ``length`` rows is off in the compiled direct route."""
    return (min(length, 1024) + 18) * UNIT_ROUNDOFF_FP32


def _gram_short(a: Tensor, g: Tensor) -> Tensor:
    """[n] from fp32 a ``[n, L, d]``, g ``[n, L, p]``, all units at once: off by (d + p + 2) 2^-24 of the spread."""
    return torch.bmm(a, a.mT).mul_(torch.bmm(g, g.mT)).sum((1, 2), dtype=torch.float64)


def _gram_fp32(a: Tensor, g: Tensor, columns: int, group: int) -> Tensor:
    """[n] from fp32 a ``[n, L, d]``, g ``[n, L, p]``, unit by unit, block row by block row of the upper triangle."""
    total = a.new_zeros(a.shape[0], dtype=torch.float64)
    for u in range(a.shape[0]):
        for i in range(0, a.shape[1], _GRAM_BLOCK):
            j = min(i + _GRAM_BLOCK, a.shape[1])
            pair = _products(a[u], i, j, columns, group).mul_(_products(g[u], i, j, columns, group))  # [block, L - i]
            total[u] += pair[:, : j - i].sum() + 2 * pair[:, j - i :].sum()
    return total


def _products(x: Tensor, i: int, j: int, columns: int, group: int) -> Tensor:
    """fp64 ``[j - i, L - i]``: products of rows i:j of fp32 x ``[L, d]`` with rows i:, in blocks of columns."""
    length, d = x.shape
    blocks = d // columns
    out = x.new_zeros(j - i, length - i, dtype=torch.float64)
    parts = x[:, : blocks * columns].view(length, blocks, columns).transpose(0, 1)  # [blocks, L, columns]
    for some in parts.split(group) if blocks else ():
        out += torch.bmm(some[:, i:j], some[:, i:].mT).sum(0)
    if blocks * columns < d:
        tail = x[:, blocks * columns :]
        out += tail[i:j] @ tail[i:].mT
    return out


def _gram_fp64(a: Tensor, g: Tensor, spread: Tensor) -> Tensor:
    """[n] from a ``[n, L, d]``, g ``[n, L, p]``, rounded up by its error bound. spread: [n], ``(sum_t |a_t||g_t|)^2``."""
    a, g = a.double(), g.double()
    total = a.new_zeros(a.shape[0])
    for i in range(0, a.shape[1], _GRAM_BLOCK):
        j = min(i + _GRAM_BLOCK, a.shape[1])
        pair = torch.bmm(a[:, i:j], a[:, i:].mT).mul_(torch.bmm(g[:, i:j], g[:, i:].mT))  # [n, block, L - i]
        total += pair[:, :, : j - i].sum((1, 2)) + 2 * pair[:, :, j - i :].sum((1, 2))
    terms = a.shape[2] + g.shape[2] + 2 * a.shape[1] + 4
    return total + 4 * terms * UNIT_ROUNDOFF_FP64 * spread


def _row_norms(x: Tensor) -> Tensor:
    """fp64 norms over the last dimension, never below the exact ones: small rows may have large partners."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).mul_(1 + 1e-9)


def _direct(a: Tensor, g: Tensor, products: Tensor) -> Tensor:
    """[n] from a ``[n, L, d]``, g ``[n, L, p]``: ``W_u`` in slices of p, squared and dropped; in fp64.

    products: fp64 ``[n, L]``. What W_u itself may be off by, ``(L + 2) 2^-53 sum_t |a_t||g_t|``, is added to its norm.
    """
    a, g = a.double(), g.double()
    n, length, d = a.shape
    total = a.new_zeros(n)
    step = max(1, _CHUNK_BYTES // (8 * d * n))
    for i in range(0, g.shape[2], step):
        total += torch.bmm(g[:, :, i : i + step].mT, a).square_().sum((1, 2))
    return (total.sqrt() + (length + 2) * UNIT_ROUNDOFF_FP64 * products.sum(1)).square_()


def row_norm_products(a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """fp64 ``[U]``: ``sum_t |a_t||g_t|``, what rounding errors of ``W_u`` scale with. a: ``[N, d]``, g: ``[N, p]``."""
    return segment_sum((_row_norms(a) * _row_norms(g))[:, None], None, offsets).squeeze(1)


def embedding_norm(ids: Tensor, g: Tensor, offsets: Tensor, padding_idx: int | None = None) -> Tensor:
    """fp64 ``[U]``: ``sum_v |sum_{t: id_t = v} g_t|^2``. ids: int ``[N]``, g: ``[N, d]``; rows of padding_idx left out."""
    num_units = offsets.numel() - 1
    out = g.new_zeros(num_units, dtype=torch.float64)
    unit = _unit_of_row(offsets)
    ids = ids.long()
    if padding_idx is not None:
        keep = ids != padding_idx
        ids, g, unit = ids[keep], g[keep], unit[keep]
    pairs, inverse = torch.unique(unit * 2**32 + ids, return_inverse=True)
    sums = g.new_zeros(pairs.numel(), g.shape[1], dtype=torch.float64).index_add_(0, inverse, g.double())
    return out.index_add_(0, pairs.div(2**32, rounding_mode="floor"), sums.square_().sum(1))


def tied_cross(
    h: Tensor, z: Tensor, head_offsets: Tensor, ids: Tensor, e: Tensor, offsets: Tensor, padding_idx: int | None = None
) -> Tensor:
    """fp64 ``[U]``: inner product of a head's and an embedding's gradient where both use one weight ``[V, d]``.

    ``sum_{s,t} z_s[id_t] (h_s . e_t)`` with h: ``[S, d]`` the head's input, z: ``[S, V]`` the logits' gradient, ids: int
    ``[N]``, e: ``[N, d]`` the embedding's output gradient. Rows of padding_idx get no embedding gradient.
    """
    out = h.new_zeros(offsets.numel() - 1, dtype=torch.float64)
    head, tail = head_offsets.tolist(), offsets.tolist()
    for u in range(out.numel()):
        rows, cols = slice(head[u], head[u + 1]), slice(tail[u], tail[u + 1])
        ids_u, e_u = ids[cols].long(), e[cols].double()
        if padding_idx is not None:
            e_u = e_u.masked_fill((ids_u == padding_idx)[:, None], 0.0)
        out[u] = (z[rows][:, ids_u].double() * (h[rows].double() @ e_u.mT)).sum()
    return out


def segment_sum(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
    """[U, p]: ``sum_t g_t`` or, with x_hat ``[N, p]``, ``sum_t g_t * x_hat_t`` over each unit's rows; fp32 or fp64."""
    dtype = accumulation_dtype(g.dtype)
    g = g.to(dtype)
    rows = g if x_hat is None else g * x_hat.to(dtype)
    out = rows.new_zeros(offsets.numel() - 1, g.shape[1])
    for units, length, first in _equal_lengths(offsets):
        block = rows[first : first + len(units) * length].view(len(units), length, -1)
        torch.sum(block, 1, out=out[units[0] : units[-1] + 1])
    return out


def affine_norm(g: Tensor, x_hat: Tensor | None, offsets: Tensor) -> Tensor:
    """fp64 ``[U]``: squared norm of the gradient of a bias (x_hat None) or of a norm layer's gain. g, x_hat: ``[N, p]``."""
    return segment_sum(g, x_hat, offsets).double().square_().sum(1)


def layer_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, offsets: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """(dx ``[N, p]`` in x's dtype, ``[1 or 2, U, p]``: per-unit gradients of the gain, and of the bias).

    g, x: ``[N, p]``, mean, rstd: ``[N]``, weight: ``[p]``. mean None: RMSNorm's; weight None: all ones.
    """
    dtype = accumulation_dtype(x.dtype)
    rstd, x_hat = rstd.to(dtype)[:, None], x.to(dtype)
    x_hat = (x_hat if mean is None else x_hat - mean.to(dtype)[:, None]) * rstd
    v = g.to(dtype) if weight is None else g.to(dtype) * weight.to(dtype)
    dx = v - x_hat * (v * x_hat).mean(1, keepdim=True)
    dx = dx if mean is None else dx - v.mean(1, keepdim=True)
    parts = [segment_sum(g, x_hat, offsets)] + ([segment_sum(g, None, offsets)] if bias else [])
    return (dx * rstd).to(x.dtype), torch.stack(parts)


def clipped_gemm(
    a: Tensor, g: Tensor, offsets: Tensor, factors: Tensor, out: Tensor, accumulate: bool = True
) -> Tensor:
    """``out += sum_u factors[u] g_u^T a_u`` (``out =`` without accumulate), returned.

    a: ``[N, d]``, g: ``[N, p]``, factors: ``[U]``, out: fp32 or fp64 ``[p, d]``. Factors multiply rows in out's dtype,
    never a narrower copy. Rows of a unit with factor 0 are zeroed, not multiplied, so its inf and NaN stay with it.
    """
    row = factors.to(out.dtype).repeat_interleave(offsets.diff().long())[:, None]  # [N, 1]
    a, g = a.to(out.dtype), g.to(out.dtype)
    if factors.device.type != "cpu" or not bool(factors.all()):
        a, g = a.masked_fill(row == 0, 0.0), g.masked_fill(row == 0, 0.0)
    if a.shape[1] <= g.shape[1]:
        a = a * row
    else:
        g = g * row
    return out.addmm_(g.mT, a, beta=1.0 if accumulate else 0.0)


def clipped_embedding(
    ids: Tensor, g: Tensor, offsets: Tensor, factors: Tensor, out: Tensor, padding_idx: int | None = None
) -> Tensor:
    """``out[id_t] += factors[u] g_t`` over all rows t of all units u, returned.

    ids: int ``[N]``, g: ``[N, d]``, factors: ``[U]``, out: fp32 or fp64 ``[V, d]``. Rows of padding_idx are left out.
    """
    row = factors.to(out.dtype).repeat_interleave(offsets.diff().long())
    ids = ids.long()
    if padding_idx is not None:
        row = row.masked_fill(ids == padding_idx, 0.0)
    rows = (g.to(out.dtype) * row[:, None]).masked_fill_((row == 0)[:, None], 0.0)
    return out.index_add_(0, ids, rows)


def clipped_sum(grads: Tensor, factors: Tensor, out: Tensor) -> Tensor:
    """``out += sum_u factors[u] grads[u]``, returned. grads: ``[U, ...]`` per-unit gradients, out: ``[...]``."""
    factors = factors.to(out.dtype)
    flat = grads.reshape(grads.shape[0], out.numel()).to(out.dtype).masked_fill((factors == 0)[:, None], 0.0)  # [U, P]
    return out.add_((factors @ flat).view_as(out))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """fp32 (fp64 for fp64) ``[2, R]``: softmax cross-entropy of each row, in nats, and its log-sum-exp.

    logits: ``[R, V]``, labels: int ``[R]`` in [0, V).
    """
    wide = logits.to(accumulation_dtype(logits.dtype))
    lse = torch.logsumexp(wide, 1)
    return torch.stack([lse - wide.gather(1, labels.long()[:, None]).squeeze(1), lse])


def cross_entropy_backward(logits: Tensor, labels: Tensor, lse: Tensor, g: Tensor) -> Tensor:
    """``logits = g_r (softmax(logits) - onehot(labels))`` in their place, returned. logits: ``[R, V]``, lse, g: ``[R]``."""
    rows, labels = torch.arange(labels.numel(), device=logits.device), labels.long()
    wide = logits.to(accumulation_dtype(logits.dtype)) - lse[:, None]
    at_label = wide[rows, labels].expm1()  # softmax - 1 cancels in a narrower dtype
    wide = wide.exp_()
    wide[rows, labels] = at_label
    return logits.copy_(wide.mul_(g.to(wide.dtype)[:, None]))


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """torch.optim.AdamW's update number ``step`` (from 1) of param and its moments, in place. All of one shape."""
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def sgd_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
) -> None:
    """torch.optim.SGD's update of param and its buffer, in place. first: the buffer holds nothing yet."""
    grad = grad.add(param, alpha=weight_decay)
    if momentum_buffer is not None:
        momentum_buffer.mul_(0.0 if first else momentum).add_(grad, alpha=1.0 if first else 1 - dampening)
        grad = grad.add(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    param.add_(grad, alpha=-lr)


def _unit_of_row(offsets: Tensor) -> Tensor:
    lengths = offsets.diff().long()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def _equal_lengths(offsets: Tensor) -> Iterator[tuple[range, int, int]]:
    """Runs of neighbouring units of one length > 0: (units, length, first row)."""
    bounds = offsets.tolist()
    u, num_units = 0, len(bounds) - 1
    while u < num_units:
        length = bounds[u + 1] - bounds[u]
        v = u + 1
        while v < num_units and bounds[v + 1] - bounds[v] == length:
            v += 1
        if length:
            yield range(u, v), length, bounds[u]
        u = v
