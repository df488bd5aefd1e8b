// W_u where one of a and g has few columns (LoRA): the other is read once, for W_u and for the norms of its rows.
#pragma once

#include <array>

#include "gemm_packed.h"
#include "lanes.h"
#include "rows.h"

namespace fastclip::narrow {

constexpr int64_t kMost = 32;                       // columns of the narrow side
constexpr int64_t kTogether = 8, kBlockRows = 256;  // of those columns, and rows, at a time
constexpr int64_t kElements = 3072;                 // of W_u that stay in the first cache
constexpr int64_t kAhead = 8;                       // rows

inline bool faster() { return capability() == Capability::kAvx512; }

// Columns of the wide side that one task takes.
inline int64_t columns_of(int64_t narrow) { return std::max<int64_t>(96, kElements / narrow / 96 * 96); }

struct Scratch {
  Buffer<float> product, few, lanes;
  Buffer<double> sums;
};

#if defined(__x86_64__)
template <class X>
FASTCLIP_KERNEL __m512 some(const X* x, __mmask16 here) {
  if constexpr (std::is_same_v<X, float>) {
    return _mm512_maskz_loadu_ps(here, x);
  } else if constexpr (std::is_same_v<X, c10::BFloat16>) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x)), 16));
  } else {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, x));
  }
}

// product [count, 16 strips of columns] (+)= few[:, :count]^T x over n rows, in registers down the rows, each sum in fp32 and in
// their order. few: [n, p]. lanes [n, 16], if any: what squares of x add up to; rows are then asked for ahead of time.
template <int count, int strips, class X>
FASTCLIP_KERNEL void strip(const float* few, int64_t p, const X* x, int64_t stride, int64_t n, int64_t columns, bool accumulate,
                           float* product, int64_t width, float* lanes) {
  __mmask16 here[strips];
  __m512 sums[count][strips];
#pragma GCC unroll 8
  for (int v = 0; v < strips; ++v) {
    const int64_t left = columns - 16 * v;
    here[v] = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      sums[i][v] = accumulate ? _mm512_maskz_loadu_ps(here[v], product + i * width + 16 * v) : _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < n; ++t) {
    const X* row = x + t * stride;
    __m512 part[strips];
#pragma GCC unroll 8
    for (int v = 0; v < strips; ++v) part[v] = some(row + 16 * v, here[v]);
    if (lanes) {
      __m512 squares = _mm512_loadu_ps(lanes + 16 * t);
#pragma GCC unroll 8
      for (int v = 0; v < strips; ++v) {
        squares = _mm512_fmadd_ps(part[v], part[v], squares);
        _mm_prefetch(reinterpret_cast<const char*>(row + kAhead * stride + 16 * v), _MM_HINT_T0);
      }
      _mm512_storeu_ps(lanes + 16 * t, squares);
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const __m512 value = _mm512_set1_ps(few[t * p + i]);
#pragma GCC unroll 8
      for (int v = 0; v < strips; ++v) sums[i][v] = _mm512_fmadd_ps(value, part[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < strips; ++v) _mm512_mask_storeu_ps(product + i * width + 16 * v, here[v], sums[i][v]);
}

// All columns of `count` rows of product.
template <int count, class X>
FASTCLIP_AVX512 void strip_by_strip(const float* few, int64_t p, const X* x, int64_t stride, int64_t n, int64_t columns,
                                    bool accumulate, float* product, float* lanes) {
  constexpr int strips = count > 4 ? 3 : 6;  // so that sums take 24 registers at most
  for (int64_t c = 0; c < columns; c += 16 * strips)
    strip<count, strips>(few, p, x + c, stride, n, columns - c, accumulate, product + c, columns, lanes);
}

// product [p, columns] (+)= W_u's part of rows start:stop, no more than kBlockRows; squares[t] += |wide[t, first:first + columns]|^2.
template <class X>
FASTCLIP_AVX512 void add_block(const Rows<X>& few, const Rows<X>& wide, int64_t start, int64_t stop, int64_t first, int64_t columns,
                               bool accumulate, float* copy, float* lanes, float* product, double* squares) {
  const int64_t p = few.columns, n = stop - start;
  for (int64_t t = start; t < stop; ++t)
    for (int64_t q = 0; q < p; ++q) copy[(t - start) * p + q] = static_cast<float>(few.row(t)[q]);
  std::fill(lanes, lanes + 16 * n, 0.0f);
  for (int64_t q = 0; q < p; q += kTogether) {
    constexpr auto kinds = std::array{strip_by_strip<1, X>, strip_by_strip<2, X>, strip_by_strip<3, X>, strip_by_strip<4, X>,
                                      strip_by_strip<5, X>, strip_by_strip<6, X>, strip_by_strip<7, X>, strip_by_strip<8, X>};
    kinds[std::min(kTogether, p - q) - 1](copy + q, p, wide.row(start) + first, wide.stride, n, columns, accumulate,
                                          product + q * columns, q == 0 ? lanes : nullptr);
  }
  for (int64_t t = 0; t < n; ++t) squares[start + t] += _mm512_reduce_add_ps(_mm512_loadu_ps(lanes + 16 * t));
}
#endif

// |W_u|^2 for rows start:stop and columns first:last of the wide side. It adds |wide[t, first:last]|^2 to squares [N], off by a
// relative (columns / 16 + 6) 2^-24. W_u: so many rows in fp32, a whole number of kBlockRows, and fp64 over such sums.
template <class X>
double square(const Rows<X>& few, const Rows<X>& wide, int64_t start, int64_t stop, int64_t first, int64_t last, int64_t rows,
              Scratch& s, double* squares) {
#if defined(__x86_64__)
  const int64_t columns = last - first, size = few.columns * columns;
  float *product = s.product.get(size), *copy = s.few.get(kBlockRows * few.columns), *lanes = s.lanes.get(16 * kBlockRows);
  const bool several = stop - start > rows;
  double* sums = several ? s.sums.get(size) : nullptr;
  if (several) std::fill(sums, sums + size, 0.0);
  for (int64_t t = start; t < stop; t += kBlockRows) {
    const int64_t end = std::min(t + kBlockRows, stop);
    add_block(few, wide, t, end, first, columns, (t - start) % rows != 0, copy, lanes, product, squares);
    if (several && (end == stop || (end - start) % rows == 0)) best([&]() FASTCLIP_LAMBDA { add_to(sums, product, size); });
  }
  return best([&](auto set) FASTCLIP_LAMBDA {
    return several ? fastclip::square(sums, size) : square_near<8, decltype(set)>(product, size) * (1 + 16 * 0x1p-24);
  });
#else
  return 0;
#endif
}

}  // namespace fastclip::narrow
