// Sums of products in lanes that do not wait for each other: the order is fixed, the compiler need not guess.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../inline.h"

namespace fastclip {

typedef float f32x16 __attribute__((vector_size(64)));

template <class X, class Y>
FASTCLIP_INLINE double dot(const X* x, const Y* y, int64_t n) {
  constexpr int64_t kLanes = 32;
  double lanes[kLanes] = {}, total = 0;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[c + l]) * static_cast<double>(y[c + l]);
  for (; c < n; ++c) total += static_cast<double>(x[c]) * static_cast<double>(y[c]);
  for (double lane : lanes) total += lane;
  return total;
}

template <class X>
FASTCLIP_INLINE double square(const X* x, int64_t n) {
  return dot(x, x, n);
}

// Sums of kDeep squares in fp32, of those in fp64: off by a relative (kDeep + 6) 2^-24, either way. Exact where that would
// overflow or lose small ones.
template <int kDeep, class X>
FASTCLIP_INLINE double square_near(const X* x, int64_t n) {
  if constexpr (!std::is_same_v<X, double>) {
    constexpr int64_t kLanes = 64, kSegment = kDeep * kLanes;
    if (n < kLanes) return square(x, n);
    double total = 0;
    for (int64_t start = 0; start < n; start += kSegment) {
      const int64_t end = start + kSegment < n ? start + kSegment : n;
      float lanes[kLanes] = {};
      int64_t c = start;
      for (; c + kLanes <= end; c += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<float>(x[c + l]) * static_cast<float>(x[c + l]);
      for (int64_t l = 0; c + l < end; ++l) lanes[l] += static_cast<float>(x[c + l]) * static_cast<float>(x[c + l]);
      float some[16] = {};
      for (int64_t l = 0; l < kLanes; l += 16)
        for (int64_t q = 0; q < 16; ++q) some[q] += lanes[l + q];
      double sums[4] = {};
      for (int64_t l = 0; l < 16; l += 4)
        for (int64_t q = 0; q < 4; ++q) sums[q] += some[l + q];
      total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    if (total > 1e-20 && total < 1e37) return total;
  }
  return square(x, n);
}

// At least the exact sum of squares, and no more than 5e-6 above.
template <class X>
FASTCLIP_INLINE double square_above(const X* x, int64_t n) {
  return square_near<32>(x, n) * (1 + 40 * 0x1p-24);
}

// The sums of 16 vectors' lanes, as one vector: halves are added as they are turned.
FASTCLIP_INLINE f32x16 lane_sums(f32x16 (&x)[16]) {
  for (int i = 0; i < 16; i += 2)
    x[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  for (int i = 0; i < 16; i += 4)
    x[i] = __builtin_shufflevector(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  for (int i = 0; i < 16; i += 8)
    x[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(x[i], x[i + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return __builtin_shufflevector(x[0], x[8], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(x[0], x[8], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// out[4 i + j] (+)= the product of fp32 rows x[i] and y[j] over n columns, in fp32.
FASTCLIP_INLINE void dots(const float* const* x, const float* const* y, int64_t n, bool accumulate, float (&out)[16]) {
  f32x16 lanes[16] = {};
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) {
    f32x16 left[4], right;
    for (int i = 0; i < 4; ++i) std::memcpy(&left[i], x[i] + c, sizeof right);
    for (int j = 0; j < 4; ++j) {
      std::memcpy(&right, y[j] + c, sizeof right);
      for (int i = 0; i < 4; ++i) lanes[4 * i + j] += left[i] * right;
    }
  }
  f32x16 total = lane_sums(lanes);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      float rest = total[4 * i + j];
      for (int64_t q = c; q < n; ++q) rest += x[i][q] * y[j][q];
      out[4 * i + j] = accumulate ? out[4 * i + j] + rest : rest;
    }
}

template <class X>
FASTCLIP_INLINE void add_to(double* __restrict__ to, const X* __restrict__ from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += static_cast<double>(from[c]);
}

}  // namespace fastclip
