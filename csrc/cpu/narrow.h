// W_u where one of a and g has few columns (LoRA): the other is read once, for W_u and for the norms of its rows.
#pragma once

#include "gemm_packed.h"
#include "lanes.h"
#include "rows.h"

namespace fastclip::narrow {

constexpr int64_t kMost = 32;                       // columns of the narrow side
constexpr int64_t kTogether = 8, kBlockRows = 256;  // rows at a time; of a sum in fp32
constexpr int64_t kElements = 3072;                 // of W_u that stay in the first cache

inline bool faster() { return capability() == Capability::kAvx512; }

// Columns of the wide side that one task takes.
inline int64_t columns_of(int64_t narrow) { return std::max<int64_t>(64, kElements / narrow / 64 * 64); }

struct Scratch {
  Buffer<float> product, few;
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

// product [count, 32 of columns] += few[:, :count]^T x: chains of additions side by side.
template <int rows, int count>
FASTCLIP_KERNEL void add_columns(const float* few, int64_t p, const __m512 (&x)[rows][2], __mmask16 low, __mmask16 high,
                                 int64_t columns, float* product) {
  __m512 to[count][2];
  for (int i = 0; i < count; ++i) {
    to[i][0] = _mm512_maskz_loadu_ps(low, product + i * columns);
    to[i][1] = _mm512_maskz_loadu_ps(high, product + i * columns + 16);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < count; ++i) {
      const __m512 value = _mm512_set1_ps(few[r * p + i]);
      to[i][0] = _mm512_fmadd_ps(value, x[r][0], to[i][0]);
      to[i][1] = _mm512_fmadd_ps(value, x[r][1], to[i][1]);
    }
  for (int i = 0; i < count; ++i) {
    _mm512_mask_storeu_ps(product + i * columns, low, to[i][0]);
    _mm512_mask_storeu_ps(product + i * columns + 16, high, to[i][1]);
  }
}

// product [p, columns] += sum over rows of few[t] (x) wide[t, :columns]; squares[t] += |wide[t, :columns]|^2, in fp32 over one call.
// few: [rows, p]. The rows that follow are asked for ahead of time.
template <int rows, class X>
FASTCLIP_KERNEL void add_rows(const float* few, int64_t p, const X* wide, int64_t stride, int64_t columns, float* product,
                              double* squares) {
  __m512 sums[rows];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 32) {
    const uint32_t here = columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1;
    const __mmask16 low = here, high = here >> 16;
    __m512 x[rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const X* from = wide + r * stride + c;
      x[r][0] = some(from, low), x[r][1] = some(from + 16, high);
      for (size_t line = 0; line < 32 * sizeof(X); line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(from + rows * stride) + line, _MM_HINT_T0);
      sums[r] = _mm512_fmadd_ps(x[r][0], x[r][0], sums[r]);
      sums[r] = _mm512_fmadd_ps(x[r][1], x[r][1], sums[r]);
    }
    int64_t q = 0;
    for (; q + 2 <= p; q += 2) add_columns<rows, 2>(few + q, p, x, low, high, columns, product + q * columns + c);
    if (q < p) add_columns<rows, 1>(few + q, p, x, low, high, columns, product + q * columns + c);
  }
  for (int r = 0; r < rows; ++r) squares[r] += _mm512_reduce_add_ps(sums[r]);
}

// product [p, columns] over rows start:stop, no more than kBlockRows: each element in fp32, row by row.
template <class X>
FASTCLIP_AVX512 void add_block(const Rows<X>& few, const Rows<X>& wide, int64_t start, int64_t stop, int64_t first, int64_t columns,
                               float* copy, float* product, double* squares) {
  const int64_t p = few.columns;
  std::fill(product, product + p * columns, 0.0f);
  for (int64_t t = start; t < stop; ++t)
    for (int64_t q = 0; q < p; ++q) copy[(t - start) * p + q] = static_cast<float>(few.row(t)[q]);
  int64_t t = start;
  for (; t + kTogether <= stop; t += kTogether)
    add_rows<kTogether>(copy + (t - start) * p, p, wide.row(t) + first, wide.stride, columns, product, squares + t);
  for (; t < stop; ++t) add_rows<1>(copy + (t - start) * p, p, wide.row(t) + first, wide.stride, columns, product, squares + t);
}
#endif

// |W_u|^2 for rows start:stop and columns first:last of the wide side. It adds |wide[t, first:last]|^2 to squares [N], off by a
// relative (columns / 16 + 6) 2^-24. W_u: kBlockRows rows in fp32, such blocks in fp64.
template <class X>
double square(const Rows<X>& few, const Rows<X>& wide, int64_t start, int64_t stop, int64_t first, int64_t last, Scratch& s,
              double* squares) {
#if defined(__x86_64__)
  const int64_t columns = last - first, size = few.columns * columns;
  float *product = s.product.get(size), *copy = s.few.get(kBlockRows * few.columns);
  const bool blocks = stop - start > kBlockRows;
  double* sums = blocks ? s.sums.get(size) : nullptr;
  if (blocks) std::fill(sums, sums + size, 0.0);
  for (int64_t t = start; t < stop; t += kBlockRows) {
    add_block(few, wide, t, std::min(t + kBlockRows, stop), first, columns, copy, product, squares);
    if (blocks) best([&]() FASTCLIP_LAMBDA { add_to(sums, product, size); });
  }
  return best([&](auto set) FASTCLIP_LAMBDA {
    return blocks ? fastclip::square(sums, size) : square_near<8, decltype(set)>(product, size) * (1 + 16 * 0x1p-24);
  });
#else
  return 0;
#endif
}

}  // namespace fastclip::narrow
