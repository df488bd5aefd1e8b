"""Logits of a block of rows and words, ``l_rv = h_r . w_v + b_v``, or ``c tanh`` of that by c; for linear_cross_entropy.py.

h: ``[R, d]``, w: ``[V, d]``, b: ``[V]`` -> ``[BLOCK_R, BLOCK_V]`` in fp32 (fp64 for fp64), which stay on chip. 2 d FLOPs and
d (1 / BLOCK_R + 1 / BLOCK_V) elements a logit. A row's logits do not depend on the other rows, nor on which launch forms them.
"""

import triton
import triton.language as tl
from fastclip.kernels.products import dot
from torch import Tensor


@triton.jit
def cap_of(softcap, dtype: tl.constexpr):
    """[1, 1] in dtype: a float argument is a number of Python's in the interpreter, and fp64 on a GPU."""
    return (tl.zeros([1, 1], tl.float64) + softcap).to(dtype)


@triton.jit
def block_of_logits(
    h_ptr, stride_h, w_ptr, stride_w, bias_ptr, row, num_rows, word, num_words, d, cap,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_V]; rows and words beyond the last count as zeros. row, word: int64."""
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float64 if WIDE else tl.float32)
    for first in range(0, d, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (row < num_rows)[:, None] & (k < d)[None, :]
        h = tl.load(h_ptr + row[:, None] * stride_h + k[None, :], mask=inside, other=0.0)
        inside = (word < num_words)[None, :] & (k < d)[:, None]
        w = tl.load(w_ptr + word[None, :] * stride_w + k[:, None], mask=inside, other=0.0)
        acc = dot(h, w, acc, WIDE, BLOCK_K)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + word, mask=word < num_words, other=0.0).to(acc.dtype)[None, :]
    if CAPPED:
        # tanh, off by 2^-23 of the cap also near 0: a logit near the cap is rounded by as much.
        acc = cap * (1 - 2 / (tl.exp(2 * acc / cap) + 1))
    return acc


def check_head(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """ValueError for what the kernels would read beyond an end of, or as another dtype."""
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise ValueError(
            f"h must be [R, d], weight [V, d], labels [R], got {list(h.shape)}, {list(weight.shape)}, {list(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    if h.dtype != weight.dtype or labels.is_floating_point():
        raise ValueError(
            f"h and weight must be of one dtype, labels integers, got {h.dtype}, {weight.dtype}, {labels.dtype}"
        )
