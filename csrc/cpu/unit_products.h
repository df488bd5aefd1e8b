// What a norm is made of: products of a unit's rows with each other in tiles (Gram route), and slices of W_u (direct route).
//
// Each is squared or weighed and dropped. Which precision suffices when is decided by whoever calls; here stands what each way of
// summing is good for.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "lanes.h"
#include "rows.h"

namespace fastclip {

constexpr double kRoundoff32 = 0x1p-24, kNormSlack = 0x1p-8;
constexpr int64_t kRows = 128, kFewRows = 64;          // of a tile; the fewer, the less of a short unit the BLAS does twice
constexpr int64_t kFew = 48, kFewChunk = 512;          // rows of a unit that are multiplied where they are, columns at a time
constexpr int64_t kSliceRows = 256, kSliceGroup = 16;  // of the direct route, summed in fp32; of such blocks before fp64
constexpr int64_t kSlice = int64_t{1} << 18;           // elements of W_u

// Columns whose products are summed in fp32, and how many such blocks before fp64 takes over.
struct Blocks {
  int64_t columns, group;
  double terms;
};

inline Blocks blocks_for(int64_t d, int64_t p, int64_t length) {
  if ((d + p + 2) * kRoundoff32 * length <= 2 * kNormSlack) return {std::max(d, p), 1, double(d + p + 2)};
  if (length <= 256) return {128, 16, 2 * (128 + 16 + 1)};
  if (length <= 512) return {64, 16, 2 * (64 + 16 + 1)};
  return {32, 4, 2 * (32 + 4 + 1)};
}

struct Scratch {
  Packs<float> packs;
  Packs<double> wide_packs;
  Buffer<float> tile, other, copy;
  Buffer<double> left, right;
  Packs<float>& of(float) { return packs; }
  Packs<double>& of(double) { return wide_packs; }
  Buffer<float>& product(float) { return tile; }
  Buffer<double>& product(double) { return right; }
};

template <class T>
View<T> view(const Rows<T>& x) {
  return {x.data, x.stride, 1};
}

// The rows i:j of a unit that ends at stop, with all from i on.
struct Tile {
  int64_t unit, i, j, stop;
};

// [j - i, stop - i]: products of rows i:j with rows i:stop, over all columns in one sum; from the diagonal on.
template <class To, class T>
const To* products(const Rows<T>& x, const Tile& tile, Scratch& s, Buffer<To>& into) {
  const int64_t m = tile.j - tile.i, n = tile.stop - tile.i;
  To* out = into.get(m * n);
  const View<T> rows = view(x).at(tile.i, 0);
  gemm<To>(s.of(To{}), m, n, x.columns, rows, rows.transposed(), nullptr, false, out, n, true);
  return out;
}

// Whether products of rows are sums of 32 by tiles. Of a group of blocks of c columns such sums take 32 + group c / 32 roundings
// and one each kDepth, no more than the c + group of blocks for each c of blocks_for: a group is summed as one.
template <class T>
bool by_tiles() {
  return std::is_same_v<T, c10::BFloat16> && tiles::faster();
}

// The same in fp64, from fp32 sums over blocks of columns, blocks added as `how` says.
template <class T>
const double* blocked_products(const Rows<T>& x, const Tile& tile, const Blocks& how, Scratch& s, Buffer<double>& into) {
  const int64_t m = tile.j - tile.i, n = tile.stop - tile.i;
  double* out = into.get(m * n);
  float* sums = s.tile.get(m * n);
  std::fill(out, out + m * n, 0.0);
  const int64_t step = by_tiles<T>() ? how.columns * how.group : how.columns, group = by_tiles<T>() ? 1 : how.group;
  int64_t pending = 0;
  for (int64_t column = 0; column < x.columns; column += step) {
    const int64_t k = std::min(step, x.columns - column);
    const View<T> rows = view(x).at(tile.i, column);
    gemm<float>(s.packs, m, n, k, rows, rows.transposed(), nullptr, pending > 0, sums, n, true);
    if (++pending == group || column + k == x.columns) {
      best([&]() FASTCLIP_LAMBDA { add_to(out, sums, m * n); });
      pending = 0;
    }
  }
  return out;
}

// [n, n]: the same for all n rows of a short unit, which are not worth packing; four by four, in columns that stay in cache.
template <class T>
const float* few_products(const Rows<T>& x, const Tile& tile, Buffer<float>& copy, Buffer<float>& into) {
  const int64_t n = tile.stop - tile.i;
  const float* rows[kFew + 3] = {};
  for (int64_t r = 0; r < n; ++r) {
    if constexpr (std::is_same_v<T, float>) {
      rows[r] = x.row(tile.i + r);
    } else {
      float* to = copy.get(n * x.columns) + r * x.columns;
      for (int64_t c = 0; c < x.columns; ++c) to[c] = static_cast<float>(x.row(tile.i + r)[c]);
      rows[r] = to;
    }
  }
  for (int64_t r = n; r < n + 3; ++r) rows[r] = rows[n - 1];
  float* out = into.get(n * n);
  best([&]() FASTCLIP_LAMBDA {
    for (int64_t column = 0; column < x.columns; column += kFewChunk) {
      const float* part[kFew + 3];
      for (int64_t r = 0; r < n + 3; ++r) part[r] = rows[r] + column;
      const int64_t count = std::min(kFewChunk, x.columns - column);
      for (int64_t r = 0; r < n; r += 4)
        for (int64_t c = r; c < n; c += 4) {
          float found[16];
          const int64_t height = std::min<int64_t>(4, n - r), width = std::min<int64_t>(4, n - c);
          dots(part + r, part + c, count, false, found);
          for (int64_t i = 0; i < height; ++i)
            for (int64_t q = 0; q < width; ++q) {
              float& to = out[(r + i) * n + c + q];
              to = column ? to + found[4 * i + q] : found[4 * i + q];
            }
        }
    }
  });
  return out;
}

// A tile's part of the Gram sum from products of a and of g: what lies above the diagonal counts twice.
template <class To>
double weigh(const Tile& tile, const To* left, const To* right) {
  const int64_t m = tile.j - tile.i, n = tile.stop - tile.i;
  return best([&]() FASTCLIP_LAMBDA {
    double diagonal = 0, above = 0;
    for (int64_t r = 0; r < m; ++r) {
      const To *x = left + r * n + r, *y = right + r * n + r;
      diagonal += static_cast<double>(*x) * static_cast<double>(*y);
      above += dot(x + 1, y + 1, n - r - 1);
    }
    return diagonal + 2 * above;
  });
}

// A slice of W_u: columns first:last of the wider one of a and g, against all of the other.
struct Slice {
  int64_t unit, first, last;
};

// It squared, in To = fp32 (rows in blocks that are added in fp64) or fp64.
template <class To, class T>
double square_slice(const Rows<T>& a, const Rows<T>& g, int64_t start, int64_t stop, const Slice& slice, Scratch& s) {
  const bool along_g = g.columns >= a.columns;
  const Rows<T>&cut = along_g ? g : a, &whole = along_g ? a : g;
  const int64_t m = whole.columns, n = slice.last - slice.first, size = m * n;
  constexpr bool narrow = std::is_same_v<To, float>;
  const int64_t step = narrow ? kSliceRows : stop - start;
  To* product = s.product(To{}).get(size);
  const bool groups = narrow && stop - start > kSliceRows * kSliceGroup;
  double* sums = groups ? s.left.get(size) : nullptr;
  if (groups) std::fill(sums, sums + size, 0.0);
  int64_t pending = 0;
  for (int64_t t = start; t < stop; t += step) {
    const View<T> x = view(whole).at(t, 0).transposed(), y = view(cut).at(t, slice.first);
    gemm<To>(s.of(To{}), m, n, std::min(step, stop - t), x, y, nullptr, pending > 0, product, n);
    if (groups && (++pending == kSliceGroup || t + step >= stop)) {
      best([&]() FASTCLIP_LAMBDA { add_to(sums, product, size); });
      pending = 0;
    } else if (!groups) {
      pending = 1;
    }
  }
  return best([&]() FASTCLIP_LAMBDA { return groups ? square(sums, size) : square(product, size); });
}

}  // namespace fastclip
