"""Losses of a linear head, and gradients in its logits for some of the words, without the logits.

    lse_r = log sum_v exp l_rv;  losses_r = lse_r - l_r,label        l: head_logits.py
    z_rv = g_r (exp(l_rv - lse_r) - [v = label_r]), times 1 - (l_rv / c)^2 with soft-capping

h: ``[R, d]``, w: ``[V, d]``, b: ``[V]`` -> ``[2, R]`` in fp32 (fp64 for fp64), and for C words z ``[R, C]`` in h's dtype,
rounded once. 2 R V d FLOPs each in tl.dot. Losses: a program takes BLOCK_R rows and SPAN words, block after block, and leaves
their largest logit, sum of exponentials and label's logit, ``[3, V / SPAN, R]``, which a second kernel joins in the order of
the words. R V d (1 / BLOCK_R + 1 / BLOCK_V) elements are read, most of them from the cache. SPAN does not depend on how many
programs run at once, so neither do the bits. Gradients: a block a program, R C elements written.
"""

import torch
import triton
import triton.language as tl
from fastclip.kernels.configs import HEAD, HEAD_SPAN, Config, Signature, dtype_class
from fastclip.kernels.dtypes import refuse_interpreted_bf16
from fastclip.kernels.head_logits import block_of_logits, cap_of, check_head
from fastclip.kernels.row_norms import dense_rows
from torch import Tensor

_JOIN = Config({"BLOCK": 128}, 4, 3)


@triton.jit
def _expm1(x):
    """exp(x) - 1, also where that cancels: by its series up to x^9 for |x| < 0.1, 3e-14 off."""
    series = 1 + x / 9
    for k in tl.static_range(8, 1, -1):
        series = 1 + x / k * series
    return tl.where(tl.abs(x) < 0.1, x * series, tl.exp(x) - 1)


@triton.jit
def _finite(most):
    """What exponents are taken from: 0 for an infinite largest logit, because inf - inf would be NaN."""
    return tl.where(tl.abs(most) == float("inf"), 0.0, most)


@triton.jit(do_not_specialize=["num_rows", "num_words"])
def _head_losses_kernel(
    parts_ptr,  # [3, spans, R]
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
            logits = block_of_logits(
                h_ptr, stride_h, w_ptr, stride_w, bias_ptr, row, num_rows, word, num_words, d, cap_of(softcap, dtype),
                HAS_BIAS, CAPPED, WIDE, BLOCK_R, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            picked += tl.sum(tl.where(word[None, :] == label[:, None], logits, 0.0), 1)
            logits = tl.where((word < num_words)[None, :], logits, -float("inf"))
            above = tl.maximum(most, tl.max(logits, 1))
            base = _finite(above)
            total = total * tl.exp(most - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
            most = above
    place = span * num_rows + row
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    tl.store(parts_ptr + place, most, mask=row < num_rows)
    tl.store(parts_ptr + plane + place, total, mask=row < num_rows)
    tl.store(parts_ptr + 2 * plane + place, picked, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_words", "spans"])
def _join_spans_kernel(
    out_ptr,  # [2, R]
    parts_ptr,
    labels_ptr,
    num_rows,
    num_words,
    spans,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    plane = spans * num_rows.to(tl.int64)
    most = tl.full([BLOCK], -float("inf"), dtype)
    total = tl.zeros([BLOCK], dtype)
    picked = tl.zeros([BLOCK], dtype)
    place = row
    for _ in range(0, spans):
        part = tl.load(parts_ptr + place, mask=inside, other=0.0)
        above = tl.maximum(most, part)
        base = _finite(above)
        own = tl.load(parts_ptr + plane + place, mask=inside, other=1.0) * tl.exp(part - base)
        total = total * tl.exp(most - base) + own
        picked += tl.load(parts_ptr + 2 * plane + place, mask=inside, other=0.0)
        most = above
        place += num_rows
    label = tl.load(labels_ptr + row, mask=inside, other=0).to(tl.int64)
    log = tl.log(total)
    # Not lse - picked: of large logits that are near each other, lse has lost what the loss consists of.
    loss = tl.where((label >= 0) & (label < num_words), most - picked + log, float("nan"))
    tl.store(out_ptr + row, loss, mask=inside)
    tl.store(out_ptr + num_rows + row, most + log, mask=inside)


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
    cap = cap_of(softcap, dtype)
    logits = block_of_logits(
        h_ptr, stride_h, w_ptr, stride_w, bias_ptr, row, num_rows, word, num_words, d, cap,
        HAS_BIAS, CAPPED, WIDE, BLOCK_R, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    label = tl.load(labels_ptr + row, mask=row < num_rows, other=-1).to(tl.int64) - start
    apart = logits - tl.load(lse_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    g = tl.load(g_ptr + row, mask=row < num_rows, other=0.0)
    z = tl.where(word[None, :] == label[:, None], _expm1(apart), tl.exp(apart)) * g[:, None]
    if CAPPED:
        z *= 1 - logits / cap * (logits / cap)
    # Chosen, not multiplied: a row that counts for nothing may hold inf and NaN.
    z = tl.where((g == 0)[:, None], 0.0, z)
    inside = (row < num_rows)[:, None] & (word < num_words)[None, :]
    tl.store(z_ptr + row[:, None] * num_words + word[None, :], z, mask=inside)


def head_losses(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float) -> Tensor:
    """fp32 (fp64 for fp64) ``[2, R]``: losses, NaN for labels outside [0, V), and log-sum-exps. Raises as check_head."""
    check_head(h, weight, bias, labels)
    refuse_interpreted_bf16(_head_losses_kernel, h, weight)
    config, wide = HEAD[dtype_class(h)], h.dtype == torch.float64
    (rows, d), words = h.shape, weight.shape[0]
    h, weight, labels = dense_rows(h), dense_rows(weight), labels.contiguous()
    spans = triton.cdiv(words, HEAD_SPAN)
    parts = h.new_empty(3, spans, rows, dtype=torch.float64 if wide else torch.float32)
    out = parts.new_empty(2, rows)
    if rows:
        if words:
            _head_losses_kernel[(triton.cdiv(rows, config.blocks["BLOCK_R"]), spans)](
                parts, h, h.stride(0), weight, weight.stride(0), h if bias is None else bias.contiguous(), labels,
                rows, words, d, softcap,
                HAS_BIAS=bias is not None, CAPPED=softcap > 0, WIDE=wide, SPAN=HEAD_SPAN, **config.options(),
            )  # fmt: skip
        grid = (triton.cdiv(rows, _JOIN.blocks["BLOCK"]),)
        _join_spans_kernel[grid](out, parts, labels, rows, words, spans, WIDE=wide, **_JOIN.options())
    return out


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
    """``[R, C]`` in h's dtype; weight ``[C, d]``, bias ``[C]``: words start to start + C. Raises as check_head."""
    check_head(h, weight, bias, labels)
    if lse.shape != labels.shape or g.shape != labels.shape:
        raise ValueError(f"lse and g must be {list(labels.shape)}, got {list(lse.shape)} and {list(g.shape)}")
    refuse_interpreted_bf16(_head_gradient_kernel, h, weight)
    config, wide = HEAD[dtype_class(h)], h.dtype == torch.float64
    (rows, d), words = h.shape, weight.shape[0]
    h, weight, labels = dense_rows(h), dense_rows(weight), labels.contiguous()
    lse, g = (x.to(torch.float64 if wide else torch.float32).contiguous() for x in (lse, g))
    z = h.new_empty(rows, words)
    if z.numel():
        grid = triton.cdiv(rows, config.blocks["BLOCK_R"]), triton.cdiv(words, config.blocks["BLOCK_V"])
        _head_gradient_kernel[grid](
            z, h, h.stride(0), weight, weight.stride(0), h if bias is None else bias.contiguous(), labels, lse, g,
            rows, words, start, d, softcap,
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
    for wide in ("fp32", "fp64"):
        pointers = {"out_ptr": f"*{wide}", "parts_ptr": f"*{wide}", "labels_ptr": "*i64"}
        found.append(_JOIN.form(_join_spans_kernel, f"join_spans {wide}", pointers, {"WIDE": wide == "fp64"}))
    return found
