// c [m, n] (+)= alpha x y for bf16 x and y, summed in fp32, on processors that multiply pairs of bf16 (AVX512_BF16).
//
// Products of two bf16 are exact in fp32 and each is added with one rounding, as in gemm_packed.h, whose blocks these are: the
// same bounds hold. alpha multiplies the fp32 sums.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "gemm_packed.h"

namespace fastclip::pairs {

#if defined(__x86_64__)
#define FASTCLIP_PAIRS __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512")))

using Half = c10::BFloat16;
using Pair = uint32_t;  // elements t and t + 1, the first in the lower half
constexpr int64_t kHeight = packed::kHeight, kWidth = packed::kWidth<float>, kDepth = packed::kDepth;

inline bool faster() {
  static const bool has = packed::faster() && __builtin_cpu_supports("avx512bf16");
  return has;
}

// Whether element (i, t) of [m, k] can be read in pairs along k: pairs lie side by side, or in two rows to be woven together.
inline bool readable(const View<Half>& x, int64_t k) { return x.row == 1 || (x.column == 1 && k % 2 == 0 && x.row % 2 == 0); }

// x [m, k] as panels [m / height, ceil(k / 2), height] of pairs, zeros beyond m and k.
template <int64_t height>
FASTCLIP_PAIRS void pack(const View<Half>& x, int64_t m, int64_t k, Pair* to) {
  const int64_t depth = (k + 1) / 2;
  if (x.row != 1) {
    const View<float> words{reinterpret_cast<const float*>(x.data), x.row / 2, 1};
    packed::pack<height>(words, m, depth, static_cast<const float*>(nullptr), reinterpret_cast<float*>(to));
    return;
  }
  constexpr int64_t together = std::max<int64_t>(1, 128 / height);
  for (int64_t i = 0; i < m; i += together * height)
    for (int64_t t = 0; t < depth; ++t) {
      const auto* first = reinterpret_cast<const uint16_t*>(x.data) + 2 * t * x.column;
      const uint16_t* second = 2 * t + 1 < k ? first + x.column : nullptr;
      for (int64_t q = i; q < std::min(i + together * height, m); q += height) {
        Pair* panel = to + q * depth + t * height;
        const int64_t rows = std::min(height, m - q);
        for (int64_t r = 0; r < height; ++r) {
          const Pair low = r < rows ? first[q + r] : 0, high = second && r < rows ? second[q + r] : 0;
          panel[r] = low | high << 16;
        }
      }
    }
}

// c [kHeight, kWidth] (+)= alpha x y; x: [depth, kHeight], y: [depth, kWidth], packed.
FASTCLIP_PAIRS inline void block(int64_t depth, const Pair* x, const Pair* y, float alpha, bool accumulate, float* c, int64_t stride) {
  __m512 sums[kHeight][2];
  for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t t = 0; t < depth; ++t) {
    const auto left = (__m512bh)_mm512_loadu_si512(y + t * kWidth), right = (__m512bh)_mm512_loadu_si512(y + t * kWidth + 16);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kHeight; ++i) {
      const auto value = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[t * kHeight + i]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], value, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], value, right);
    }
  }
  const __m512 factor = _mm512_set1_ps(alpha);
  for (int64_t i = 0; i < kHeight; ++i)
    for (int64_t half = 0; half < 2; ++half) {
      float* to = c + i * stride + half * 16;
      _mm512_storeu_ps(to, accumulate ? _mm512_fmadd_ps(factor, sums[i][half], _mm512_loadu_ps(to))
                                      : _mm512_mul_ps(factor, sums[i][half]));
    }
}

FASTCLIP_PAIRS inline void multiply(Packs<float>& packs, int64_t m, int64_t n, int64_t k, const View<Half>& x, const View<Half>& y,
                                    float alpha, bool accumulate, float* c, int64_t stride, bool upper) {
  constexpr int64_t kRows = packed::kRows, kColumns = packed::kColumns;
  const auto up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
  const int64_t most = (std::min(k, kDepth) + 1) / 2;
  auto* left = reinterpret_cast<Pair*>(packs.x.get(up(std::min(m, kRows), kHeight) * most));
  auto* right = reinterpret_cast<Pair*>(packs.y.get(up(std::min(n, kColumns), kWidth) * most));
  alignas(64) float edge[kHeight * kWidth];
  for (int64_t j = 0; j < n; j += kColumns)
    for (int64_t t = 0; t < k; t += kDepth) {
      const int64_t columns = std::min(kColumns, n - j), depth = (std::min(kDepth, k - t) + 1) / 2;
      const bool add = accumulate || t > 0;
      pack<kWidth>(y.at(t, j).transposed(), columns, std::min(kDepth, k - t), right);
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = std::min(kRows, m - i);
        pack<kHeight>(x.at(i, t), rows, std::min(kDepth, k - t), left);
        for (int64_t b = 0; b < columns; b += kWidth)
          for (int64_t a = 0; a < rows; a += kHeight) {
            if (upper && j + b + kWidth <= i + a) break;  // below the diagonal, and so is what follows
            float* to = c + (i + a) * stride + j + b;
            if (a + kHeight <= rows && b + kWidth <= columns) {
              block(depth, left + a * depth, right + b * depth, alpha, add, to, stride);
              continue;
            }
            block(depth, left + a * depth, right + b * depth, alpha, false, edge, kWidth);
            for (int64_t r = 0; r < std::min(kHeight, rows - a); ++r)
              for (int64_t q = 0; q < std::min(kWidth, columns - b); ++q)
                to[r * stride + q] = edge[r * kWidth + q] + (add ? to[r * stride + q] : 0.0f);
          }
      }
    }
}
#endif

}  // namespace fastclip::pairs
