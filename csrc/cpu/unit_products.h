// What a norm is made of: products of a unit's rows with each other in tiles (Gram route), and slices of W_u (direct route).
//
// Each is squared or weighed and dropped. Which precision suffices when is decided by whoever calls; here stands what each way of
// summing is good for.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "gram.h"
#include "lanes.h"
#include "narrow.h"
#include "rows.h"

namespace fastclip {

constexpr double kRoundoff32 = 0x1p-24, kRoundoff64 = 0x1p-53, kNormSlack = 0x1p-8;
constexpr int64_t kRows = 128, kFewRows = 64;          // of a tile; the fewer, the less of a short unit the BLAS does twice
constexpr int64_t kFew = 48, kFewChunk = 1024;         // rows of a unit that are multiplied where they are, columns at a time
constexpr int64_t kSliceGroup = 16;                    // blocks of the direct route that fp32 adds up before fp64
constexpr int64_t kSlice = int64_t{1} << 19;           // elements of W_u; two slices at least

// Columns whose products are summed in fp32, and how many such blocks before fp64 takes over.
struct Blocks {
  int64_t columns, group;
  double terms;
};

inline Blocks blocks_for(int64_t d, int64_t p, int64_t length) {
  if ((d + p + 2) * kRoundoff32 * length <= 2 * kNormSlack) return {std::max(d, p), 1, double(d + p + 2)};
  if (length <= 256) return {128, 16, 2 * (128 + 16 + 1)};
  if (length <= 512) return {64, 16, 2 * (64 + 16 + 1)};
  if (length <= 1024) return {32, 8, 2 * (32 + 8 + 1)};
  return {32, 4, 2 * (32 + 4 + 1)};
}

struct Scratch {
  Packs<float> packs;
  Packs<double> wide_packs;
  Buffer<float> tile, other, copy;
  Buffer<double> left, right;
  narrow::Scratch narrow;
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

// Products of rows i:j with rows i:stop; each row is this far from the next. Those below the diagonal may be missing.
template <class To>
struct Products {
  const To* data;
  int64_t stride;
  double off;  // relative error of a product of a row with itself
};

// Whether products of rows are sums of 32 by tiles. Of a group of blocks of c columns such sums take 32 + group c / 32 roundings
// and one each kDepth, no more than the c + group of blocks for each c of blocks_for: a group is summed as one.
template <class T>
bool by_tiles() {
  return std::is_same_v<T, c10::BFloat16> && tiles::faster();
}

// Whether sums over a group of blocks come from one call.
template <class T>
bool packs_once() {
  return gram::faster() && !std::is_same_v<T, double> && !(std::is_same_v<T, c10::BFloat16> && halves::faster());
}

// sums [padded(j - i), padded(stop - i)] (+)= products over k columns from this one on; packs_once: sums over so many, then of such.
template <class To, class T>
void add_products(const Rows<T>& x, const Tile& tile, int64_t column, int64_t k, int64_t block, bool accumulate, Packs<To>& packs,
                  To* sums) {
  const int64_t m = tile.j - tile.i, n = tile.stop - tile.i;
  const View<T> rows = view(x).at(tile.i, column);
#if defined(__x86_64__)
  if constexpr (std::is_same_v<To, float> && !std::is_same_v<T, double>)
    if (packs_once<T>()) return gram::multiply(packs, m, n, k, block, rows, accumulate, sums);
#endif
  gemm<To>(packs, m, n, k, rows, rows.transposed(), nullptr, accumulate, sums, gram::padded(n), true);
}

// Over all columns in one sum.
template <class To, class T>
Products<To> products(const Rows<T>& x, const Tile& tile, Scratch& s, Buffer<To>& into) {
  const int64_t stride = gram::padded(tile.stop - tile.i);
  To* out = into.get(gram::padded(tile.j - tile.i) * stride);
  add_products(x, tile, 0, x.columns, gram::kDepth, false, s.of(To{}), out);
  return {out, stride, (x.columns + 1) * (std::is_same_v<To, float> ? kRoundoff32 : kRoundoff64)};
}

// The same in fp64, from fp32 sums over blocks of columns, blocks added as `how` says.
template <class T>
Products<double> blocked_products(const Rows<T>& x, const Tile& tile, const Blocks& how, Scratch& s, Buffer<double>& into) {
  const int64_t stride = gram::padded(tile.stop - tile.i), size = gram::padded(tile.j - tile.i) * stride;
  double* out = into.get(size);
  float* sums = s.tile.get(size);
  std::fill(out, out + size, 0.0);
  const bool whole = by_tiles<T>() || packs_once<T>();
  const int64_t step = whole ? how.columns * how.group : how.columns, group = whole ? 1 : how.group;
  int64_t pending = 0;
  for (int64_t column = 0; column < x.columns; column += step) {
    const int64_t k = std::min(step, x.columns - column);
    add_products(x, tile, column, k, how.columns, pending > 0, s.packs, sums);
    if (++pending == group || column + k == x.columns) {
      best([&]() FASTCLIP_LAMBDA { add_to(out, sums, size); });
      pending = 0;
    }
  }
  return {out, stride, how.terms * kRoundoff32};
}

// Additions on the way of a product of few_products: in a lane, above the lanes, and of chunks.
inline int64_t few_terms(int64_t columns) { return kFewChunk / 16 + 1 + 4 + (columns + kFewChunk - 1) / kFewChunk; }

// The same for all n rows of a short unit, which are not worth packing; four by four, in columns that stay in cache.
template <class T>
Products<float> few_products(const Rows<T>& x, const Tile& tile, Buffer<float>& copy, Buffer<float>& into) {
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
  best([&](auto set) FASTCLIP_LAMBDA {
    for (int64_t column = 0; column < x.columns; column += kFewChunk) {
      const float* part[kFew + 3];
      for (int64_t r = 0; r < n + 3; ++r) part[r] = rows[r] + column;
      const int64_t count = std::min(kFewChunk, x.columns - column);
      for (int64_t r = 0; r < n; r += 4)
        for (int64_t c = r; c < n; c += 4) {
          float found[16];
          const int64_t height = std::min<int64_t>(4, n - r), width = std::min<int64_t>(4, n - c);
          dots<decltype(set)>(part + r, part + c, count, found);
          for (int64_t i = 0; i < height; ++i)
            for (int64_t q = 0; q < width; ++q) {
              float& to = out[(r + i) * n + c + q];
              to = column ? to + found[4 * i + q] : found[4 * i + q];
            }
        }
    }
  });
  return {out, n, std::min(few_terms(x.columns), x.columns) * kRoundoff32};
}

// A tile's part of the Gram sum from products of a and of g: what lies above the diagonal counts twice.
template <class To>
double weigh(const Tile& tile, const Products<To>& left, const Products<To>& right) {
  const int64_t m = tile.j - tile.i, n = tile.stop - tile.i;
  return best([&]() FASTCLIP_LAMBDA {
    double diagonal = 0, above = 0;
    for (int64_t r = 0; r < m; ++r) {
      const To *x = left.data + r * left.stride + r, *y = right.data + r * right.stride + r;
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

// Rows that are summed in fp32 at once: the longer a unit, the fewer, so that ordinary ones need no second look.
inline int64_t slice_rows(int64_t length) { return length <= 1024 ? 1024 : length <= 8192 ? 512 : 256; }

// It squared, in To = fp32 (rows in blocks that are added in fp64) or fp64.
template <class To, class T>
double square_slice(const Rows<T>& a, const Rows<T>& g, int64_t start, int64_t stop, const Slice& slice, Scratch& s) {
  const bool along_g = g.columns >= a.columns;
  const Rows<T>&cut = along_g ? g : a, &whole = along_g ? a : g;
  const int64_t m = whole.columns, n = slice.last - slice.first, size = m * n;
  constexpr bool narrow = std::is_same_v<To, float>;
  const int64_t step = narrow ? slice_rows(stop - start) : stop - start;
  To* product = s.product(To{}).get(size);
  const bool groups = narrow && stop - start > step * kSliceGroup;
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
  return best([&](auto set) FASTCLIP_LAMBDA {
    if constexpr (narrow)
      if (!groups) return square_near<8, decltype(set)>(product, size) * (1 + 16 * 0x1p-24);
    return groups ? square(sums, size) : square(product, size);
  });
}

}  // namespace fastclip
