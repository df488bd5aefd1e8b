"""Box-Muller in fp64, as fastclip/random.py defines it: two 64-bit words to two standard normals.

    u = 1 - w 2^-64      theta = 2 pi s 2^-64, s = a as two's complement      r = sqrt(-2 ln u)
    even = r cos(theta)  odd = r sin(theta)

Operation for operation csrc/random/normals.h, whose polynomials and bounds these are: additions, multiplications, one division
and one square root, which IEEE 754 rounds in one way. Kernels are launched with enable_fp_fusion=False, so that nothing is
contracted and the bits are the CPU's. Words come as halves in int64 lanes.
"""

import triton
import triton.language as tl


@triton.jit
def _above_two52(x):
    """2^52 + x, exactly: x < 2^52 put into the last bits of a double."""
    return (x | 0x4330000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _above_two84(x):
    """2^84 + 2^32 x, exactly."""
    return (x | 0x4530000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _polynomial7(x, c0, c1, c2, c3, c4, c5, c6):
    # Pairs by Horner's rule in x^2.
    square = x * x
    total = c6 * square + (c4 + c5 * x)
    total = total * square + (c2 + c3 * x)
    return total * square + (c0 + c1 * x)


@triton.jit
def minus_log(low, high):
    """-ln(1 - w 2^-64), good to a relative 2^-50 from w = 1 to w = 2^64 - 1, and 0 at w = 0."""
    # u and 1 - u, each rounded once from the word: neither is taken from the other, so neither cancels.
    complement = ((_above_two84(high) - (2.0**84 + 2.0**52)) + _above_two52(low)) * 2.0**-64
    flipped = _above_two84(high ^ 0xFFFFFFFF) - (2.0**84 + 2.0**52)
    u = (flipped + (_above_two52(low ^ 0xFFFFFFFF) + 1.0)) * 2.0**-64
    # u = 2^k m with m in [sqrt(1/2), sqrt(2)).
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD + (65 << 52)) >> 52  # k + 65
    m = (bits - ((exponent - 65) << 52)).to(tl.float64, bitcast=True)
    k = _above_two52(exponent) - (2.0**52 + 65.0)
    f = tl.where(exponent == 65, -complement, m - 1.0)
    # ln(1 + f) = 2 atanh(s), |s| < 0.1716.
    s = f / (f + 2.0)
    z = s * s
    twice = s + s
    series = _polynomial7(
        z,
        0.3333333333333335,
        0.19999999999949722,
        0.14285714313001635,
        0.11111105565129939,
        0.09091444727837474,
        0.07665855309105386,
        0.07308292712444311,
    )
    # ln 2 in two parts; k times the first is exact.
    return -(k * 0.6931471805598903 + (twice + (twice * z * series + k * 5.497923018708371e-14)))


@triton.jit
def direction(low, high):
    """cos and sin of 2 pi s 2^-64, good to an absolute 2^-51."""
    q = (high + (1 << 29)) >> 30  # quadrant, 4 as good as 0
    rest = (high - (q << 30)) + (1 << 31)  # 2^31 more than a number in [-2^29, 2^29)
    lifted = _above_two84(rest) - (2.0**84 + 2.0**63 + 2.0**52)
    x = (lifted + _above_two52(low)) * (1.57079632679489661923 * 2.0**-62)
    z = x * x
    square = z * z
    series = -2.505113165023518e-08 + 1.5918115263265974e-10 * z
    series = series * square + (-0.00019841269836756774 + 2.7557316101617874e-06 * z)
    series = series * square + (-0.16666666666666666 + 0.008333333333330948 * z)
    sin = x + x * z * series
    series = _polynomial7(
        z,
        -0.5,
        0.04166666666666664,
        -0.001388888888888077,
        2.4801587293690305e-05,
        -2.755731556524682e-07,
        2.0875886564482672e-09,
        -1.1367988423294987e-11,
    )
    cos = 1.0 + z * series
    swap = (q & 1) != 0
    cosine = tl.where(swap, sin, cos).to(tl.int64, bitcast=True) ^ (((q + 1) & 2) << 62)
    sine = tl.where(swap, cos, sin).to(tl.int64, bitcast=True) ^ ((q & 2) << 62)
    return cosine.to(tl.float64, bitcast=True), sine.to(tl.float64, bitcast=True)


@triton.jit
def normal_pair(w_low, w_high, a_low, a_high):
    """Two fp64 normals ``[n]`` of words w (radius) and a (angle), whose halves are uint32 ``[n]``."""
    log = minus_log(w_low.to(tl.int64), w_high.to(tl.int64))
    r = tl.sqrt(log + log)
    cos, sin = direction(a_low.to(tl.int64), a_high.to(tl.int64))
    return r * cos, r * sin
