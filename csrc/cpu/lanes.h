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

// Up to the exact sum of squares or no more than 5e-6 above, never below: fp32 over 32 squares, fp64 from there.
template <class X>
FASTCLIP_INLINE double square_above(const X* x, int64_t n) {
  if constexpr (!std::is_same_v<X, double>) {
    constexpr int64_t kLanes = 64, kSegment = 32 * kLanes;
    double total = 0;
    for (int64_t start = 0; start < n; start += kSegment) {
      const int64_t end = start + kSegment < n ? start + kSegment : n;
      float lanes[kLanes] = {};
      int64_t c = start;
      for (; c + kLanes <= end; c += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<float>(x[c + l]) * static_cast<float>(x[c + l]);
      for (int64_t l = 0; c + l < end; ++l) lanes[l] += static_cast<float>(x[c + l]) * static_cast<float>(x[c + l]);
      float some[4] = {};
      for (int64_t l = 0; l < kLanes; l += 4)
        for (int64_t q = 0; q < 4; ++q) some[q] += lanes[l + q];
      total += (static_cast<double>(some[0]) + some[1]) + (static_cast<double>(some[2]) + some[3]);
    }
    if (total > 1e-20 && total < 1e37) return total * (1 + 64 * 0x1p-24);
  }
  return square(x, n) * (1 + 1e-9);
}

// The products of fp32 row x with four others, in fp32.
FASTCLIP_INLINE void dots(const float* x, const float* const (&y)[4], int64_t n, float (&out)[4]) {
  f32x16 lanes[4] = {};
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) {
    f32x16 left, right;
    std::memcpy(&left, x + c, sizeof left);
    for (int q = 0; q < 4; ++q) {
      std::memcpy(&right, y[q] + c, sizeof right);
      lanes[q] += left * right;
    }
  }
  for (int q = 0; q < 4; ++q) {
    float total = 0;
    for (int64_t rest = c; rest < n; ++rest) total += x[rest] * y[q][rest];
    for (int l = 0; l < 16; ++l) total += lanes[q][l];
    out[q] = total;
  }
}

template <class X>
FASTCLIP_INLINE void add_to(double* __restrict__ to, const X* __restrict__ from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += static_cast<double>(from[c]);
}

}  // namespace fastclip
