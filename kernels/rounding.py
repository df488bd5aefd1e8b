"""From fp64 to fp32, fp16 or bf16 in one rounding, to nearest, ties to even."""

import triton
import triton.language as tl


@triton.jit
def round_once(x, DTYPE: tl.constexpr):
    """x in DTYPE. fp64 to 16 bits by way of fp32 would round twice.

    Rounded to odd first (towards zero, last bit set if anything was lost), the second rounding is right (Boldo and
    Melquiond, IEEE Trans. Comp. 2008).
    """
    nearest = x.to(tl.float32)
    if tl.float32 != DTYPE:
        wide = nearest.to(tl.float64)
        bits = nearest.to(tl.int32, bitcast=True)
        bits -= (tl.abs(wide) > tl.abs(x)).to(tl.int32)
        bits |= (wide != x).to(tl.int32)
        nearest = bits.to(tl.float32, bitcast=True)
    return nearest.to(DTYPE)
