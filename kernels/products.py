"""Products of blocks of rows in tl.dot, and how far rounding takes them.

A dot of K terms from zero, added to the sum of the earlier ones in fp32 (``max_num_imprecise_acc`` keeps the compiler from
joining the two: without it all terms are one chain). G such blocks are off by at most ``gamma sum_i |x_i||y_i|`` with

- fp32 terms, multiplied and added in fp32: ``gamma = (K + G) 2^-24`` (Higham, Accuracy and Stability of Numerical
  Algorithms, 2nd ed., section 3.1);
- bf16 and fp16 terms: their products are exact in fp32; tensor cores add n of them to the accumulator at once, n >= 4, each
  of the n + 1 addends cut at 2^-23 of the largest, and the sum once more (Fasi, Higham, Mikaitis and Pranesh, Numerical
  behavior of NVIDIA tensor cores, PeerJ Computer Science 7, 2021): ``gamma = (1.5 K + G / 2) 2^-23``;

and by 2^-125 a term for what underflows. ``gamma`` is rounded up for terms of second order.
"""

import torch
import triton
import triton.language as tl

UNDERFLOW = 2.0**-125


def gamma(dtype: torch.dtype, terms: int, block: int) -> float:
    """Times the sum of ``|x_i||y_i|``: how far a sum of ``terms`` products is off at most, in dots of ``block``."""
    blocks = triton.cdiv(terms, block)
    units = block + blocks if dtype == torch.float32 else 3 * block + blocks
    return (units + 1) * 2.0**-24 * (1 + 2.0**-8)


@triton.jit
def widened(x):
    """x in fp64, as tl.dot can take it: straight from bf16 or fp16, Triton 3.6 fails to lay it out for the fp64 instruction."""
    if x.dtype == tl.float64:
        return x
    else:
        return tl.sum(x.to(tl.float32)[:, :, None], 2).to(tl.float64)


@triton.jit
def dot(x, y, acc, WIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + x y, x: [M, BLOCK_K], y: [BLOCK_K, N]; in fp64 if WIDE, else as above."""
    if WIDE:
        return tl.dot(widened(x), widened(y), acc, out_dtype=tl.float64)
    else:
        return acc + tl.dot(x, y, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
