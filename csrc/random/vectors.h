// Vectors of 16 32-bit and 8 64-bit lanes, in the compiler's own notation: one source for every instruction set.
#pragma once

#include "../inline.h"

#include <cstdint>

namespace fastclip {

typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));

FASTCLIP_INLINE u32x8 lower(u32x16 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
FASTCLIP_INLINE u32x8 upper(u32x16 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
FASTCLIP_INLINE u64x8 widen(u32x8 x) { return __builtin_convertvector(x, u64x8); }
FASTCLIP_INLINE u64x8 bits_of(f64x8 x) { return reinterpret_cast<u64x8>(x); }
FASTCLIP_INLINE f64x8 from_bits(u64x8 x) { return reinterpret_cast<f64x8>(x); }

// 2^52 + x and 2^84 + 2^32 x, exactly: x put into the last bits of a double. Not every set converts unsigned lanes.
FASTCLIP_INLINE f64x8 above_two52(u32x8 x) { return from_bits(widen(x) | 0x4330000000000000ULL); }
FASTCLIP_INLINE f64x8 above_two84(u32x8 x) { return from_bits(widen(x) | 0x4530000000000000ULL); }

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

}  // namespace fastclip
