// Sums of products in lanes that do not wait for each other: the order is fixed, the compiler need not guess.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dispatch.h"

namespace fastclip {

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));

// x y + z; rounded once where AVX-512 does so in one instruction.
template <class Set>
FASTCLIP_INLINE f32x16 multiply_add(f32x16 x, f32x16 y, f32x16 z) {
#if defined(__x86_64__)
  if constexpr (Set::value == Capability::kAvx512) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(z) : "v"(x), "v"(y));
    return z;
  }
#endif
  return x * y + z;
}

// 16 elements in fp32.
template <class X>
FASTCLIP_INLINE f32x16 load16(const X* x) {
  f32x16 out;
  if constexpr (std::is_same_v<X, float>) {
    std::memcpy(&out, x, sizeof out);
  } else if constexpr (std::is_same_v<X, c10::BFloat16>) {
    typedef uint16_t u16x16 __attribute__((vector_size(32)));
    typedef uint32_t u32x16 __attribute__((vector_size(64)));
    u16x16 bits;
    std::memcpy(&bits, x, sizeof bits);
    const u32x16 wide = __builtin_convertvector(bits, u32x16) << 16;
    std::memcpy(&out, &wide, sizeof out);
  } else {
    for (int l = 0; l < 16; ++l) out[l] = static_cast<float>(x[l]);
  }
  return out;
}

// The first n < 16 of them, and zeros.
template <class Set, class X>
FASTCLIP_INLINE f32x16 load_some(const X* x, int64_t n) {
#if defined(__x86_64__)
  if constexpr (Set::value == Capability::kAvx512 && std::is_same_v<X, float>) {
    f32x16 out;
    asm("vmovups (%1), %0%{%2%}%{z%}" : "=v"(out) : "r"(x), "Yk"(static_cast<uint16_t>((1 << n) - 1)) : "memory");
    return out;
  }
#endif
  float some[16];
  for (int64_t l = 0; l < 16; ++l) some[l] = l < n ? static_cast<float>(x[l]) : 0.0f;
  return load16(some);
}

template <class X, class Y>
FASTCLIP_INLINE double dot(const X* x, const Y* y, int64_t n) {
  constexpr int64_t kLanes = 32;
  double found = 0;
  int64_t c = 0;
  if (n >= kLanes) {
    double lanes[kLanes] = {};
    for (; c + kLanes <= n; c += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[c + l]) * static_cast<double>(y[c + l]);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    found = lanes[0];
  }
  for (; c < n; ++c) found += static_cast<double>(x[c]) * static_cast<double>(y[c]);
  return found;
}

template <class X>
FASTCLIP_INLINE double square(const X* x, int64_t n) {
  return dot(x, x, n);
}

// The sum of 16 lanes in fp64.
FASTCLIP_INLINE double total(f32x16 x) {
  const f64x8 eight = __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), f64x8) +
                      __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), f64x8);
  const f64x8 four = eight + __builtin_shufflevector(eight, eight, 4, 5, 6, 7, 0, 1, 2, 3);
  const f64x8 two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1, 6, 7, 4, 5);
  return two[0] + two[1];
}

// What fp32 may have lost of a sum of squares, or not been able to hold.
FASTCLIP_INLINE bool within_fp32(double squares) { return squares > 1e-20 && squares < 1e37; }

// Sums of kDeep squares in fp32, of those in fp64: off by a relative (kDeep + 6) 2^-24, either way. Exact where that would
// overflow or lose small ones.
template <int kDeep, class Set, class X>
FASTCLIP_INLINE double square_near(const X* x, int64_t n) {
  if constexpr (!std::is_same_v<X, double>) {
    constexpr int64_t kLanes = 64, kSegment = kDeep * kLanes;
    if (n < kLanes / 2) return square(x, n);
    double found = 0;
    for (int64_t start = 0; start < n; start += kSegment) {
      const int64_t end = start + kSegment < n ? start + kSegment : n;
      f32x16 sums[4] = {};
      int64_t c = start;
      for (; c + kLanes <= end; c += kLanes)
        for (int i = 0; i < 4; ++i) {
          const f32x16 part = load16(x + c + 16 * i);
          sums[i] = multiply_add<Set>(part, part, sums[i]);
        }
      for (; c + 16 <= end; c += 16) {
        const f32x16 part = load16(x + c);
        sums[0] += part * part;
      }
      if (c < end) {
        const f32x16 part = load_some<Set>(x + c, end - c);
        sums[1] += part * part;
      }
      found += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    if (within_fp32(found)) return found;
  }
  return square(x, n);
}

// At least the exact sum of squares, and no more than 5e-6 above.
template <class Set, class X>
FASTCLIP_INLINE double square_above(const X* x, int64_t n) {
  return square_near<32, Set>(x, n) * (1 + 40 * 0x1p-24);
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

// out[4 i + j] = the product of fp32 rows x[i] and y[j] over n columns, in fp32: n / 16 + 1 additions in each lane, 4 above them.
template <class Set>
FASTCLIP_INLINE void dots(const float* const* x, const float* const* y, int64_t n, float (&out)[16]) {
  f32x16 lanes[16] = {};
  const auto add = [&](const auto& load) FASTCLIP_LAMBDA {
    f32x16 left[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) left[i] = load(x[i]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const f32x16 right = load(y[j]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) lanes[4 * i + j] = multiply_add<Set>(left[i], right, lanes[4 * i + j]);
    }
  };
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) add([&](const float* row) FASTCLIP_LAMBDA { return load16(row + c); });
  if (c < n) add([&](const float* row) FASTCLIP_LAMBDA { return load_some<Set>(row + c, n - c); });
  const f32x16 sums = lane_sums(lanes);
  std::memcpy(out, &sums, sizeof sums);
}

template <class X>
FASTCLIP_INLINE void add_to(double* __restrict__ to, const X* __restrict__ from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += static_cast<double>(from[c]);
}

}  // namespace fastclip
