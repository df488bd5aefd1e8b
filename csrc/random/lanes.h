// What the generators and the normals are written in: one number a thread (CUDA, tests) or vectors of them (CPU).
//
// W holds 32-bit words, one a block: uint32_t, or 16 lanes. The same source works on both: operators, and the functions here.
// A vector of 16 words is taken apart into its even and its odd lanes, 8 of 64 bits each, which crosses no lanes.
#pragma once

#include <cmath>
#include <cstdint>

#include "../inline.h"

namespace fastclip {

#if !defined(__CUDACC__)
// In the compiler's own notation: one source for every instruction set.
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
#endif

FASTCLIP_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTCLIP_INLINE double from_bits(uint64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
FASTCLIP_INLINE double square_root(double x) { return std::sqrt(x); }
// The two halves of x times m, modulo 2^32 and above.
struct Multiply {
  FASTCLIP_INLINE void operator()(uint32_t x, uint32_t m, uint32_t& high, uint32_t& low) const {
    const uint64_t product = uint64_t{x} * m;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
#if !defined(__CUDACC__)
  // Of the lower halves of lanes; what stands above them is anything, before and after.
  FASTCLIP_INLINE void operator()(u64x8 x, uint32_t m, u64x8& high, u64x8& low) const {
    low = (x & 0xffffffffULL) * m;
    high = low >> 32;
  }
#endif
};

#if !defined(__CUDACC__)
FASTCLIP_INLINE u64x8 even(u32x16 x) { return reinterpret_cast<u64x8>(x) & 0xffffffffULL; }
FASTCLIP_INLINE u64x8 odd(u32x16 x) { return reinterpret_cast<u64x8>(x) >> 32; }
FASTCLIP_INLINE u64x8 bits_of(f64x8 x) { return reinterpret_cast<u64x8>(x); }
FASTCLIP_INLINE f64x8 from_bits(u64x8 x) { return reinterpret_cast<f64x8>(x); }

FASTCLIP_INLINE f64x8 square_root(f64x8 x) {
  double lanes[8];
  __builtin_memcpy(lanes, &x, sizeof x);
  for (double& lane : lanes) lane = __builtin_sqrt(lane);
  __builtin_memcpy(&x, lanes, sizeof x);
  return x;
}

FASTCLIP_INLINE u32x16 join(u64x8 even, u64x8 odd) { return reinterpret_cast<u32x16>((even & 0xffffffffULL) | (odd << 32)); }

// Rows to columns, 8 x 8.
FASTCLIP_INLINE void transpose(f64x8 (&x)[8]) {
  f64x8 y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) {
      x[j] = __builtin_shufflevector(y[j], y[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      x[j + 2] = __builtin_shufflevector(y[j], y[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; ++j) {
    y[j] = __builtin_shufflevector(x[j], x[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[j + 4] = __builtin_shufflevector(x[j], x[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) x[i] = y[i];
}
#endif

}  // namespace fastclip
