// c [m, n] (+)= x y with AVX-512, on one thread: MKL keeps that for Intel's processors.
//
// Panels of x and y are packed in the order in which they are read, converted to To and, for x, scaled; sums are over kDepth
// products in registers, then over such blocks in c, so that rounding grows with kDepth + k / kDepth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "buffer.h"
#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastclip {

// Element (i, j) is data[i * row + j * column]; one of the distances is 1.
template <class T>
struct View {
  const T* data;
  int64_t row, column;
  View at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  View transposed() const { return {data, column, row}; }
};

template <class To>
struct Packs {
  Buffer<To> x, y;
};

namespace packed {

constexpr int64_t kHeight = 8, kDepth = 256, kRows = 192, kColumns = 512;
template <class To>
constexpr int64_t kLanes = 64 / sizeof(To);
template <class To>
constexpr int64_t kWidth = 2 * kLanes<To>;

#if defined(__x86_64__)
#define FASTCLIP_KERNEL __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512"), always_inline)) inline

template <class To>
using Lanes = std::conditional_t<std::is_same_v<To, float>, __m512, __m512d>;

FASTCLIP_KERNEL __m512 read(const float* x) { return _mm512_loadu_ps(x); }
FASTCLIP_KERNEL __m512d read(const double* x) { return _mm512_loadu_pd(x); }
FASTCLIP_KERNEL void write(float* x, __m512 v) { _mm512_storeu_ps(x, v); }
FASTCLIP_KERNEL void write(double* x, __m512d v) { _mm512_storeu_pd(x, v); }
FASTCLIP_KERNEL __m512 all(float x) { return _mm512_set1_ps(x); }
FASTCLIP_KERNEL __m512d all(double x) { return _mm512_set1_pd(x); }
FASTCLIP_KERNEL __m512 fma(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
FASTCLIP_KERNEL __m512d fma(__m512d x, __m512d y, __m512d z) { return _mm512_fmadd_pd(x, y, z); }

// c [kHeight, kWidth] (+)= x y; x: [k, kHeight] and y: [k, kWidth], packed or with these distances of rows.
template <class To>
FASTCLIP_KERNEL void block(int64_t k, const To* x, int64_t x_row, const To* y, int64_t row, bool accumulate, To* c,
                           int64_t stride) {
  Lanes<To> sums[kHeight][2];
  for (auto& row : sums) row[0] = row[1] = all(To{0});
  for (int64_t t = 0; t < k; ++t) {
    const Lanes<To> left = read(y + t * row), right = read(y + t * row + kLanes<To>);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kHeight; ++i) {
      const Lanes<To> value = all(x[t * x_row + i]);
      sums[i][0] = fma(value, left, sums[i][0]);
      sums[i][1] = fma(value, right, sums[i][1]);
    }
  }
  for (int64_t i = 0; i < kHeight; ++i)
    for (int64_t half = 0; half < 2; ++half) {
      To* to = c + i * stride + half * kLanes<To>;
      write(to, accumulate ? sums[i][half] + read(to) : sums[i][half]);
    }
}

// 16 rows of 16 to their transpose.
FASTCLIP_KERNEL void transpose(__m512 (&x)[16]) {
  __m512 y[16];
  for (int i = 0; i < 16; i += 2) y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_f32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_f32x4(y[j], y[j + 8], 0xdd);
  }
}
FASTCLIP_KERNEL void transpose(__m512d (&x)[8]) {
  __m512d y[8];
  for (int i = 0; i < 8; i += 2) y[i] = _mm512_unpacklo_pd(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + j] = _mm512_shuffle_f64x2(y[i + j], y[i + j + 2], 0x88);
      x[i + j + 2] = _mm512_shuffle_f64x2(y[i + j], y[i + j + 2], 0xdd);
    }
  for (int j = 0; j < 4; ++j) {
    y[j] = _mm512_shuffle_f64x2(x[j], x[j + 4], 0x88);
    y[j + 4] = _mm512_shuffle_f64x2(x[j], x[j + 4], 0xdd);
  }
  for (int j = 0; j < 8; ++j) x[j] = y[j];
}

// x [m, k] as panels [m / height, k, height], To, rows beyond m as zeros; element (i, t) times factors[t].
template <int64_t height, class To, class X>
FASTCLIP_KERNEL void pack(const View<X>& x, int64_t m, int64_t k, const To* factors, To* to) {
  constexpr int64_t lanes = kLanes<To>, together = std::max<int64_t>(1, 128 / height);  // panels: whole cache lines are read
  if (x.row == 1) {
    for (int64_t i = 0; i < m; i += together * height)
      for (int64_t t = 0; t < k; ++t) {
        const To factor = factors ? factors[t] : To{1};
        for (int64_t q = i; q < std::min(i + together * height, m); q += height) {
          const X* from = x.data + t * x.column + q;
          To* panel = to + q * k + t * height;
          if (q + height <= m)
            for (int64_t r = 0; r < height; ++r) panel[r] = factor * static_cast<To>(from[r]);
          else
            for (int64_t r = 0; r < height; ++r) panel[r] = q + r < m ? factor * static_cast<To>(from[r]) : To{0};
        }
      }
    return;
  }
  for (int64_t i = 0; i < m; i += height) {
    const int64_t rows = std::min(height, m - i);
    To* panel = to + i * k;
    // Squares of lanes x lanes are turned in registers.
    for (int64_t part = 0; part < height; part += lanes)
      for (int64_t t = 0; t < k; t += lanes) {
        const int64_t depth = std::min(lanes, k - t);
        alignas(64) To square[lanes][lanes];
        Lanes<To> turned[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          const int64_t row = part + r;
          const X* from = x.data + (i + row) * x.row + t;
          if (row >= rows || row >= height) {
            turned[r] = all(To{0});
          } else if (std::is_same_v<X, To> && depth == lanes) {
            turned[r] = read(reinterpret_cast<const To*>(from));
          } else {
            for (int64_t c = 0; c < lanes; ++c) square[r][c] = c < depth ? static_cast<To>(from[c]) : To{0};
            turned[r] = read(square[r]);
          }
        }
        transpose(turned);
        for (int64_t c = 0; c < depth; ++c) {
          const Lanes<To> column = factors ? turned[c] * all(factors[t + c]) : turned[c];
          To* here = panel + (t + c) * height + part;
          if constexpr (height >= lanes)
            write(here, column);
          else if constexpr (std::is_same_v<To, float>)
            _mm256_storeu_ps(here, _mm512_castps512_ps256(column));
        }
      }
  }
}

template <class To, class X, class Y>
FASTCLIP_AVX512 void multiply(Packs<To>& packs, int64_t m, int64_t n, int64_t k, const View<X>& x, const View<Y>& y,
                              const To* factors, bool accumulate, To* c, int64_t stride, bool upper) {
  constexpr int64_t width = kWidth<To>;
  const auto up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
  To* left = packs.x.get(up(std::min(m, kRows), kHeight) * std::min(k, kDepth));
  To* right = packs.y.get(up(std::min(n, kColumns), width) * std::min(k, kDepth));
  // For few rows packing y would cost more than it saves.
  const bool in_place = std::is_same_v<Y, To> && y.column == 1 && m <= 2 * kHeight;
  alignas(64) To edge[kHeight * width];
  for (int64_t j = 0; j < n; j += kColumns)
    for (int64_t t = 0; t < k; t += kDepth) {
      const int64_t columns = std::min(kColumns, n - j), depth = std::min(kDepth, k - t);
      const bool add = accumulate || t > 0;
      const int64_t from = in_place ? columns / width * width : 0;
      pack<width>(y.at(t, j + from).transposed(), columns - from, depth, static_cast<const To*>(nullptr), right + from * depth);
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = std::min(kRows, m - i);
        pack<kHeight>(x.at(i, t), rows, depth, factors ? factors + t : nullptr, left);
        for (int64_t b = 0; b < columns; b += width)
          for (int64_t a = 0; a < rows; a += kHeight) {
            if (upper && j + b + width <= i + a) break;  // below the diagonal, and so is what follows
            To* to = c + (i + a) * stride + j + b;
            const To* panel = left + a * depth;
            const bool placed = b < from;
            const To* other = placed ? reinterpret_cast<const To*>(y.data + t * y.row) + j + b : right + b * depth;
            const int64_t row = placed ? y.row : width;
            if (a + kHeight <= rows && b + width <= columns) {
              block(depth, panel, kHeight, other, row, add, to, stride);
              continue;
            }
            block(depth, panel, kHeight, other, row, false, edge, width);
            for (int64_t r = 0; r < std::min(kHeight, rows - a); ++r)
              for (int64_t q = 0; q < std::min(width, columns - b); ++q)
                to[r * stride + q] = edge[r * width + q] + (add ? to[r * stride + q] : To{0});
          }
      }
    }
}
#endif

inline bool faster() {
#if defined(__x86_64__)
  return capability() == Capability::kAvx512 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace packed

}  // namespace fastclip
