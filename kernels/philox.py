"""Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3).

For seeded streams, which are not private: it is no cipher. The same words as csrc/random/philox.h.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """4 words ``[n]`` of counters ``[n]``, low words first, all uint32; k0, k1: scalars."""
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    k0, k1 = (c0 ^ c0) | k0, (c0 ^ c0) | k1
    for _ in range(10):
        high0, low0 = tl.umulhi(c0, m0), tl.mul(c0, m0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, m1), tl.mul(c2, m1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, tl.full(k0.shape, 0x9E3779B9, tl.uint32), sanitize_overflow=False)
        k1 = tl.add(k1, tl.full(k1.shape, 0xBB67AE85, tl.uint32), sanitize_overflow=False)
    return c0, c1, c2, c3
