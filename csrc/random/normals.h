// Box-Muller in fp64, as fastclip/random.py defines it: two 64-bit words to two standard normals, 8 pairs at once.
//
//   u = 1 - w 2^-64      theta = 2 pi s 2^-64, s = a as two's complement      r = sqrt(-2 ln u)
//   even = r cos(theta)  odd = r sin(theta)
//
// Only additions, multiplications, one division and one square root, none of them contracted: every instruction set gives
// the same bits. Series are Taylor's, long enough that what is left out lies below 2^-54 of the result.
#pragma once

#include "vectors.h"

namespace fastclip {

FASTCLIP_INLINE f64x8 square_root(f64x8 x) {
  double lanes[8];
  __builtin_memcpy(lanes, &x, sizeof x);
  for (double& lane : lanes) lane = __builtin_sqrt(lane);
  __builtin_memcpy(&x, lanes, sizeof x);
  return x;
}

template <int N>
FASTCLIP_INLINE f64x8 polynomial(f64x8 x, const double (&coefficients)[N]) {
  // Pairs by Horner's rule in x^2: half the chain of dependent operations.
  static_assert(N % 2 == 0);
  const f64x8 square = x * x;
  f64x8 sum = coefficients[N - 2] + coefficients[N - 1] * x;
  for (int i = N - 4; i >= 0; i -= 2) sum = sum * square + (coefficients[i] + coefficients[i + 1] * x);
  return sum;
}

// -ln(1 - w 2^-64), good to a relative 2^-50 from w = 1 to w = 2^64 - 1, and 0 at w = 0.
FASTCLIP_INLINE f64x8 minus_log(u32x8 low, u32x8 high) {
  // u and 1 - u, each rounded once from the word: neither is taken from the other, so neither cancels.
  const double lifted = 0x1p84 + 0x1p52, scale = 0x1p-64;
  const f64x8 complement = ((above_two84(high) - lifted) + above_two52(low)) * scale;
  const f64x8 u = ((above_two84(~high) - lifted) + (above_two52(~low) + 1.0)) * scale;
  // u = 2^k m with m in [sqrt(1/2), sqrt(2)).
  const u64x8 half_root = u64x8{} + 0x3fe6a09e667f3bcdULL;
  const u64x8 shifted = bits_of(u) - half_root + (65ULL << 52);
  const u64x8 exponent = shifted >> 52;  // k + 65
  const f64x8 m = from_bits(bits_of(u) - ((exponent - 65) << 52));
  const f64x8 k = from_bits(exponent | 0x4330000000000000ULL) - (0x1p52 + 65.0);
  const f64x8 f = exponent == 65 ? -complement : m - 1.0;
  // ln(1 + f) = 2 atanh(s), |s| < 0.1716.
  const f64x8 s = f / (f + 2.0), z = s * s, twice = s + s;
  const double odd[10] = {1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  // ln 2 in two parts; k times the first is exact.
  const double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  return -(k * ln2_high + (twice + (twice * z * polynomial(z, odd) + k * ln2_low)));
}

// cos and sin of 2 pi s 2^-64, good to an absolute 2^-51.
FASTCLIP_INLINE void direction(u32x8 low, u32x8 high, f64x8& cos, f64x8& sin) {
  const u32x8 quadrant = (high + (1u << 29)) >> 30;
  const u32x8 rest = high - (quadrant << 30) + (1u << 31);  // 2^31 more than a number in [-2^29, 2^29)
  const double half_pi = 1.57079632679489661923, lifted = 0x1p84 + 0x1p63 + 0x1p52;
  const f64x8 x = ((above_two84(rest) - lifted) + above_two52(low)) * (half_pi * 0x1p-62);
  const f64x8 z = x * x;
  const double sin_series[8] = {-1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800.0,
                                -1.0 / 1307674368000.0, 1.0 / 355687428096000.0};
  const double cos_series[8] = {-1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600.0,
                                -1.0 / 87178291200.0, 1.0 / 20922789888000.0};
  const f64x8 sin_x = x + x * z * polynomial(z, sin_series);
  const f64x8 cos_x = 1.0 + z * polynomial(z, cos_series);
  const u64x8 q = widen(quadrant);
  const i64x8 swap = (q & 1) != 0;
  cos = from_bits(bits_of(swap ? sin_x : cos_x) ^ (((q + 1) & 2) << 62));
  sin = from_bits(bits_of(swap ? cos_x : sin_x) ^ ((q & 2) << 62));
}

// Blocks of 16 words, lane by lane, to normals: out[8 b + i] is element i of block b.
FASTCLIP_INLINE void normals(const u32x16 (&words)[16], double* out) {
  for (int half = 0; half < 2; ++half) {
    f64x8 z[8];  // by element, lanes are blocks
    for (int pair = 0; pair < 4; ++pair) {
      u32x8 w[4];
      for (int i = 0; i < 4; ++i) w[i] = half ? upper(words[4 * pair + i]) : lower(words[4 * pair + i]);
      const f64x8 log = minus_log(w[0], w[1]);
      const f64x8 r = square_root(log + log);
      f64x8 cos, sin;
      direction(w[2], w[3], cos, sin);
      z[2 * pair] = r * cos;
      z[2 * pair + 1] = r * sin;
    }
    transpose(z);
    __builtin_memcpy(out + 64 * half, z, sizeof z);
  }
}

}  // namespace fastclip
