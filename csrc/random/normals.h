// Box-Muller in fp64, as fastclip/random.py defines it: two 64-bit words to two standard normals.
//
//   u = 1 - w 2^-64      theta = 2 pi s 2^-64, s = a as two's complement      r = sqrt(-2 ln u)
//   even = r cos(theta)  odd = r sin(theta)
//
// Only additions, multiplications, one division and one square root, none of them contracted: every instruction set and
// device gives the same bits. Polynomials interpolate at Chebyshev's nodes: what they are off by lies below 2^-55 of the result
// for the logarithm, 2^-55 for sine and 2^-61 for cosine. U holds 32-bit halves of words in 64-bit lanes.
#pragma once

#include "lanes.h"

namespace fastclip {

// 2^52 + x and 2^84 + 2^32 x, exactly: x put into the last bits of a double. Not every set converts unsigned lanes.
template <class U>
FASTCLIP_INLINE auto above_two52(U x) {
  return from_bits(x | 0x4330000000000000ULL);
}
template <class U>
FASTCLIP_INLINE auto above_two84(U x) {
  return from_bits(x | 0x4530000000000000ULL);
}

// Pairs by Horner's rule in x^2: half the chain of dependent operations.
template <int N, class F>
FASTCLIP_INLINE F polynomial(F x, const double (&coefficients)[N]) {
  const F square = x * x;
  F sum = N % 2 ? F{} + coefficients[N - 1] : coefficients[N - 2] + coefficients[N - 1] * x;
  for (int i = N - 3 - (N % 2 == 0); i >= 0; i -= 2) sum = sum * square + (coefficients[i] + coefficients[i + 1] * x);
  return sum;
}

// -ln(1 - w 2^-64), good to a relative 2^-50 from w = 1 to w = 2^64 - 1, and 0 at w = 0.
template <class U>
FASTCLIP_INLINE auto minus_log(U low, U high) {
  using F = decltype(from_bits(low));
  // u and 1 - u, each rounded once from the word: neither is taken from the other, so neither cancels.
  const double lifted = 0x1p84 + 0x1p52, scale = 0x1p-64;
  const uint64_t flip = 0xffffffffULL;
  const F complement = ((above_two84(high) - lifted) + above_two52(low)) * scale;
  const F u = ((above_two84(high ^ flip) - lifted) + (above_two52(low ^ flip) + 1.0)) * scale;
  // u = 2^k m with m in [sqrt(1/2), sqrt(2)).
  const U shifted = bits_of(u) - 0x3fe6a09e667f3bcdULL + (65ULL << 52);
  const U exponent = shifted >> 52;  // k + 65
  const F m = from_bits(bits_of(u) - ((exponent - 65) << 52));
  const F k = above_two52(exponent) - (0x1p52 + 65.0);
  const F f = exponent == 65 ? -complement : m - 1.0;
  // ln(1 + f) = 2 atanh(s), |s| < 0.1716.
  const F s = f / (f + 2.0), z = s * s, twice = s + s;
  const double odd[7] = {0x1.5555555555558p-2, 0x1.99999999952d7p-3, 0x1.2492492df281ap-3, 0x1.c71c62e3f11e6p-4,
                         0x1.7462b51cb66b1p-4, 0x1.39fe51a7c18f9p-4, 0x1.2b5900de53b32p-4};
  // ln 2 in two parts; k times the first is exact.
  const double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  return -(k * ln2_high + (twice + (twice * z * polynomial(z, odd) + k * ln2_low)));
}

// cos and sin of 2 pi s 2^-64, good to an absolute 2^-51.
template <class U, class F>
FASTCLIP_INLINE void direction(U low, U high, F& cos, F& sin) {
  const U q = (high + (1u << 29)) >> 30;             // quadrant, 4 as good as 0
  const U rest = (high - (q << 30)) + (1ULL << 31);  // 2^31 more than a number in [-2^29, 2^29)
  const double half_pi = 1.57079632679489661923, lifted = 0x1p84 + 0x1p63 + 0x1p52;
  const F x = ((above_two84(rest) - lifted) + above_two52(low)) * (half_pi * 0x1p-62);
  const F z = x * x;
  const double sin_series[6] = {-0x1.5555555555555p-3, 0x1.1111111110bb2p-7,   -0x1.a01a019e83816p-13,
                                0x1.71de379654304p-19, -0x1.ae600aca92c64p-26, 0x1.5e0b05bff20f2p-33};
  const double cos_series[7] = {-0x1p-1,
                                0x1.5555555555551p-5,
                                -0x1.6c16c16c15d77p-10,
                                0x1.a01a019de0f7cp-16,
                                -0x1.27e4f8e47066ep-22,
                                0x1.1eea7efd95c58p-29,
                                -0x1.8ff9bca27a304p-37};
  const F sin_x = x + x * z * polynomial(z, sin_series);
  const F cos_x = 1.0 + z * polynomial(z, cos_series);
  const auto swap = (q & 1) != 0;
  cos = from_bits(bits_of(swap ? sin_x : cos_x) ^ (((q + 1) & 2) << 62));
  sin = from_bits(bits_of(swap ? cos_x : sin_x) ^ ((q & 2) << 62));
}

// The two normals of one pair of words, given by halves.
template <class U, class F>
FASTCLIP_INLINE void normal_pair(U w_low, U w_high, U a_low, U a_high, F& first, F& second) {
  const F log = minus_log(w_low, w_high);
  const F r = square_root(log + log);
  F cos, sin;
  direction(a_low, a_high, cos, sin);
  first = r * cos;
  second = r * sin;
}

// One block's words to its 8 normals.
FASTCLIP_INLINE void normals(const uint32_t (&words)[16], double* out) {
  for (int j = 0; j < 4; ++j)
    normal_pair<uint64_t>(words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3], out[2 * j], out[2 * j + 1]);
}

#if !defined(__CUDACC__)
// 16 blocks, lane by lane: out[8 b + i] is element i of block b.
FASTCLIP_INLINE void normals(const u32x16 (&words)[16], double* out) {
  f64x8 z[2][8];  // of even and odd blocks, by element
  for (int j = 0; j < 4; ++j) {
    const u32x16 *w = &words[4 * j], *a = w + 2;
    normal_pair(even(w[0]), even(w[1]), even(a[0]), even(a[1]), z[0][2 * j], z[0][2 * j + 1]);
    normal_pair(odd(w[0]), odd(w[1]), odd(a[0]), odd(a[1]), z[1][2 * j], z[1][2 * j + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    transpose(z[half]);
    for (int r = 0; r < 8; ++r) __builtin_memcpy(out + 8 * (2 * r + half), &z[half][r], sizeof z[half][r]);
  }
}
#endif

}  // namespace fastclip
