"""ChaCha20's block function (RFC 8439, section 2.3): 16 words for each lane, about 1000 integer operations.

State words 4-11 are the key, 12-13 a 64-bit block number and 14-15 a 64-bit nonce, low halves first: below block 2^32
RFC 8439's own layout. The same words as csrc/random/chacha20.h and fastclip/random.py, which defines the stream.
"""

import triton
import triton.language as tl


@triton.jit
def _add(x, y):
    # Wraps by design, in debug builds too.
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def _rotate(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _quarter_round(a, b, c, d):
    a = _add(a, b)
    d = _rotate(d ^ a, 16)
    c = _add(c, d)
    b = _rotate(b ^ c, 12)
    a = _add(a, b)
    d = _rotate(d ^ a, 8)
    c = _add(c, d)
    b = _rotate(b ^ c, 7)
    return a, b, c, d


@triton.jit
def chacha20(k0, k1, k2, k3, k4, k5, k6, k7, nonce_low, nonce_high, low, high):
    """16 words ``[n]``, uint32, of the blocks whose numbers have the halves low and high ``[n]``."""
    none = low ^ low
    k0, k1, k2, k3 = none | k0, none | k1, none | k2, none | k3
    k4, k5, k6, k7 = none | k4, none | k5, none | k6, none | k7
    n0, n1 = none | nonce_low, none | nonce_high
    c0 = tl.full(low.shape, 0x61707865, tl.uint32)
    c1 = tl.full(low.shape, 0x3320646E, tl.uint32)
    c2 = tl.full(low.shape, 0x79622D32, tl.uint32)
    c3 = tl.full(low.shape, 0x6B206574, tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, low, high, n0, n1
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        _add(x0, c0),
        _add(x1, c1),
        _add(x2, c2),
        _add(x3, c3),
        _add(x4, k0),
        _add(x5, k1),
        _add(x6, k2),
        _add(x7, k3),
        _add(x8, k4),
        _add(x9, k5),
        _add(x10, k6),
        _add(x11, k7),
        _add(x12, low),
        _add(x13, high),
        _add(x14, n0),
        _add(x15, n1),
    )
