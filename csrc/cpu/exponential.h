// exp in fp32 on vectors, off by less than 1.2 units in the last place from -87.3 to 88; 0 below, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite), exp(r) by its series to the seventh power, 2^n by its
// bits.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace fastclip {

typedef int32_t i32x16 __attribute__((vector_size(64)));

FASTCLIP_INLINE f32x16 exponential(f32x16 x) {
  const f32x16 above = x > 88.0f ? f32x16{} + 88.0f : x;
  const f32x16 shifted = above * 1.44269504088896341f + 0x1.8p23f;  // the low bits hold n
  const f32x16 n = shifted - 0x1.8p23f;
  const f32x16 r = (above - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  f32x16 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const i32x16 power = (reinterpret_cast<i32x16>(shifted) << 23) + (127 << 23);
  return x < -87.3f ? f32x16{} : p * reinterpret_cast<f32x16>(power);
}

}  // namespace fastclip
