// fp16 and bf16 as storage: widening to fp64, and one rounding from fp64, to the same bits as the CPU's kernels.
//
// Widening is exact. fp64 to 16 bits by way of fp32 would round twice; rounded to odd first (towards zero, last bit set if
// anything was lost), the second rounding is right (Boldo and Melquiond, IEEE Trans. Comp. 2008). Integer arithmetic instead of
// the device's instructions: what runs on the GPU is what is tested on the host, NaN included.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../inline.h"

namespace fastclip::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FASTCLIP_INLINE uint32_t word_of(float x) {
  uint32_t word;
  __builtin_memcpy(&word, &x, sizeof word);
  return word;
}
FASTCLIP_INLINE float from_word(uint32_t word) {
  float x;
  __builtin_memcpy(&x, &word, sizeof x);
  return x;
}

FASTCLIP_INLINE double widen(float x) { return x; }
FASTCLIP_INLINE double widen(BFloat16 x) { return from_word(static_cast<uint32_t>(x.bits) << 16); }
FASTCLIP_INLINE double widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // The exponent moves by a product, which is right for subnormals too; inf and NaN take fp32's exponent.
  const uint32_t word = rest < 0x7c00 ? word_of(from_word(rest << 13) * 0x1p112f) : rest << 13 | 0x7f800000;
  return from_word(word | sign);
}

FASTCLIP_INLINE float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  uint32_t word = word_of(nearest);
  word -= std::fabs(static_cast<double>(nearest)) > std::fabs(x);
  word |= static_cast<double>(nearest) != x;
  return from_word(word);
}

// To nearest, ties to even.
FASTCLIP_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t word = word_of(x);
  out.bits = (word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
FASTCLIP_INLINE void narrow(float x, Half& out) {
  const uint32_t word = word_of(x), sign = word >> 16 & 0x8000, rest = word & 0x7fffffff;
  uint32_t bits;
  if (rest > 0x7f800000)
    bits = 0x7e00;
  else if (rest >= 0x47800000)  // 2^16 and above
    bits = 0x7c00;
  else if (rest < 0x38800000)  // below 2^-14: the sum's last bit is 2^-24, as fp16's is there
    bits = word_of(from_word(rest) + 0.5f) - word_of(0.5f);
  else
    bits = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  out.bits = static_cast<uint16_t>(sign | bits);
}

template <class Out>
FASTCLIP_INLINE Out round_once(double x) {
  if constexpr (std::is_same_v<Out, float>) {
    return static_cast<float>(x);
  } else {
    Out out;
    narrow(round_to_odd(x), out);
    return out;
  }
}

}  // namespace fastclip::cuda
