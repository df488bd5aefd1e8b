"""Losses of a linear head, and gradients in its logits for some of the words, without the logits.

    l_rv = h_r . w_v + b_v, or c tanh of that by c;  lse_r = log sum_v exp l_rv;  losses_r = lse_r - l_r,label
    z_rv = g_r (exp(l_rv - lse_r) - [v = label_r]), times 1 - (l_rv / c)^2 with soft-capping

h: ``[R, d]``, w: ``[V, d]``, b: ``[V]``. Both 2 R V d FLOPs in tl.dot, sums in fp32 (fp64 for fp64). Losses: a program takes
BLOCK_R rows and SPAN words, and leaves log-sum-exp and label's logit of those, ``[2, V / SPAN, R]``; it reads d (BLOCK_R +
BLOCK_V) elements a block of words. SPAN does not depend on how many programs there are. Gradients: a tile a program, rounded
once to h's dtype.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import HEAD, HEAD_SPAN, Signature, dtype_class
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.products import dot
from fastclip.kernels.row_norms import dense_rows
from torch import Tensor


@triton.jit
def _expm1(x):
    """exp(x) - 1, also where that cancels: by its series up to x^9 for |x| < 0.1, 3e-14 off."""
    series = 1 + x / 9
    for k in tl.static_range(8, 1, -1):
        series = 1 + x / k * series
    return tl.where(tl.abs(x) < 0.1, x * series, tl.exp(x) - 1)


@triton.jit
def _cap(softcap, dtype: tl.constexpr):
    """[1, 1]"""
    return (tl.zeros([1, 1], tl.float64) + softcap).to(dtype)


@triton.jit
def _logits(
    h_ptr, stride_h, w_ptr, stride_w, bias_ptr, row, num_rows, word, stop, d, cap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_V] of these rows and words."""
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float64 if WIDE else tl.float32)
    for first in range(0, d, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row < num_rows)[:, None] & (k < d)[None, :]
        h = tl.load(h_ptr + row[:, None] * stride_h + k[None, :], mask=inside, other=0.0)
        inside = (word < stop)[None, :] & (k < d)[:, None]
        w = tl.load(w_ptr + word[None, :] * stride_w + k[:, None], mask=inside, other=0.0)
        acc = dot(h, w, acc, WIDE, BLOCK_K)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + word, mask=word < stop, other=0.0).to(acc.dtype)[None, :]
    if CAPPED:
        acc = cap * (1 - 2 / (tl.exp(2 * acc / cap) + 1))  # tanh
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_words"])
def _head_losses_kernel(
    parts_ptr,  # [2, spans, R]
    h_ptr,
    stride_h,
    w_ptr,
    stride_w,
    bias_ptr,
    labels_ptr,
    num_rows,
    num_words,
    d,
    softcap: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    span = tl.program_id(1).to(tl.int64)
    label = tl.load(labels_ptr + row, mask=row < num_rows, other=-1).to(tl.int64)
    most = tl.full([BLOCK_R], -float("inf"), dtype)
    total = tl.zeros([BLOCK_R], dtype)
    picked = tl.zeros([BLOCK_R], dtype)
    for step in range(0, SPAN // BLOCK_V):
        first = span * SPAN + step * BLOCK_V
        if first < num_words:
            word = first + tl.arange(0, BLOCK_V)
            logits = _logits(
                h_ptr, stride_h, w_ptr, stride_w, bias_ptr, row, num_rows, word, num_words, d, _cap(softcap, dtype),
                HAS_BIAS, CAPPED, WIDE, BLOCK_R, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            picked += tl.sum(tl.where(word[None, :] == label[:, None], logits, 0.0), 1)
            logits = tl.where((word < num_words)[None, :], logits, -float("inf"))
            above = tl.maximum(most, tl.max(logits, 1))
            total = total * tl.exp(most - above) + tl.sum(tl.exp(logits - above[:, None]), 1)
            most = above
    place = span * num_rows + row
    tl.store(parts_ptr + place, most + tl.log(total), mask=row < num_rows)
    place += tl.num_programs(1).to(tl.int64) * num_rows
    tl.store(parts_ptr + place, picked, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_words", "start"])
def _head_gradient_kernel(
    z_ptr,
    h_ptr,
    stride_h,
    w_ptr,
    stride_w,
    bias_ptr,
    labels_ptr,
    lse_ptr,
    g_ptr,
    num_rows,
    num_words,
    start,
    d,
    softcap: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    word = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    cap = _cap(softcap, dtype)
    logits = _logits(
        h_ptr, stride_h, w_ptr, stride_w, bias_ptr, row, num_rows, word, num_words, d, cap,
        HAS_BIAS, CAPPED, WIDE, BLOCK_R, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    label = tl.load(labels_ptr + row, mask=row < num_rows, other=-1).to(tl.int64) - start
    apart = logits - tl.load(lse_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    g = tl.load(g_ptr + row, mask=row < num_rows, other=0.0)
    z = tl.where(word[None, :] == label[:, None], _expm1(apart), tl.exp(apart)) * g[:, None]
    if CAPPED:
        z *= 1 - logits / cap * (logits / cap)
    z = tl.where((g == 0)[:, None], 0.0, z)
    inside = (row < num_rows)[:, None] & (word < num_words)[None, :]
    tl.store(z_ptr + row[:, None] * num_words + word[None, :], z, mask=inside)


def head_losses(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float) -> Tensor:
    """fp32 (fp64 for fp64) ``[2, R]``: losses, NaN for labels outside [0, V), and log-sum-exps."""
    refuse_interpreted_bf16(_head_losses_kernel, h, weight)
    config, wide = HEAD[dtype_class(h, weight)], h.dtype == torch.float64
    (rows, d), words = h.shape, weight.shape[0]
    h, weight, labels = dense_rows(h), dense_rows(weight), labels.contiguous()
    spans = triton.cdiv(words, HEAD_SPAN)
    parts = h.new_empty(2, spans, rows, dtype=torch.float64 if wide else torch.float32)
    if rows:
        _head_losses_kernel[(triton.cdiv(rows, config.blocks["BLOCK_R"]), spans)](
            parts, h, h.stride(0), weight, weight.stride(0), h if bias is None else bias.contiguous(), labels,
            rows, words, d, softcap,
            HAS_BIAS=bias is not None, CAPPED=softcap > 0, WIDE=wide, SPAN=HEAD_SPAN, **config.options(),
        )  # fmt: skip
    lse = parts[0].logsumexp(0)
    losses = (lse - parts[1].sum(0)).masked_fill_((labels < 0) | (labels >= words), torch.nan)
    return torch.stack([losses, lse])


def head_gradient(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    g: Tensor,
    start: int,
    softcap: float,
) -> Tensor:
    """``[R, C]`` in h's dtype; weight ``[C, d]``, bias ``[C]``: words start to start + C."""
    refuse_interpreted_bf16(_head_gradient_kernel, h, weight)
    config, wide = HEAD[dtype_class(h, weight)], h.dtype == torch.float64
    (rows, d), words = h.shape, weight.shape[0]
    h, weight, labels = dense_rows(h), dense_rows(weight), labels.contiguous()
    dtype = torch.float64 if wide else torch.float32
    z = h.new_empty(rows, words)
    if z.numel():
        grid = triton.cdiv(rows, config.blocks["BLOCK_R"]), triton.cdiv(words, config.blocks["BLOCK_V"])
        _head_gradient_kernel[grid](
            z, h, h.stride(0), weight, weight.stride(0), h if bias is None else bias.contiguous(), labels,
            lse.to(dtype).contiguous(), g.to(dtype).contiguous(), rows, words, start, d, softcap,
            HAS_BIAS=bias is not None, CAPPED=softcap > 0, WIDE=wide, **config.options(),
        )  # fmt: skip
    return z


def signatures() -> list[Signature]:
    found = []
    for x, kind in (("bf16", "half"), ("fp16", "half"), ("fp32", "fp32"), ("fp64", "fp64")):
        wide = "*fp64" if kind == "fp64" else "*fp32"
        rows = {"h_ptr": f"*{x}", "w_ptr": f"*{x}", "bias_ptr": f"*{x}", "labels_ptr": "*i64"}
        for capped in (False, True) if x == "bf16" else (False,):
            constants = {"HAS_BIAS": capped, "CAPPED": capped, "WIDE": kind == "fp64"}
            name = f"{x}, bias and soft-capping" if capped else x
            losses = {"parts_ptr": wide, **rows}
            found.append(
                HEAD[kind].form(_head_losses_kernel, f"head_losses {name}", losses, constants | {"SPAN": HEAD_SPAN})
            )
            gradient = {"z_ptr": f"*{x}", **rows, "lse_ptr": wide, "g_ptr": wide}
            found.append(HEAD[kind].form(_head_gradient_kernel, f"head_gradient {name}", gradient, constants))
    return found
