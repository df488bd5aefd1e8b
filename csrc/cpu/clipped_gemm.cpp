// clipped_gemm: out (+)= sum_u factors[u] g_u^T a_u.
//
// a: [N, d], g: [N, p], offsets: [U + 1], factors: [U], out: fp32 or fp64 [p, d]. The factor multiplies rows in out's dtype,
// while they are packed or, for the BLAS, in one copy of the narrower side, or sums of products of bf16; each slice of out is one
// product of its own, on one thread, so that the number of threads shows nowhere. Rows of factor 0 are left out, so that their
// inf and NaN stay with them.
#include "clipped_tiles.h"
#include "gemm.h"
#include "rows.h"

namespace fastclip {
namespace {

// Columns of the longer side a task takes: few enough that two threads are both busy to the end.
constexpr int64_t kLeast = 96, kMost = 768, kTasks = 4;
constexpr int64_t kScaled = int64_t{1} << 22;  // elements of a copy

struct Scratch {
  Packs<float> narrow;
  Packs<double> wide;
  Packs<float>& of(float) { return narrow; }
  Packs<double>& of(double) { return wide; }
};

// The rows that count, without the others: themselves, or a copy.
template <class T>
Rows<T> gathered(const Rows<T>& x, const std::vector<int64_t>& kept, Buffer<T>& into) {
  if (kept.back() == static_cast<int64_t>(kept.size()) - 1) return x;
  T* to = into.get(kept.size() * x.columns);
  for (size_t i = 0; i < kept.size(); ++i) std::copy(x.row(kept[i]), x.row(kept[i]) + x.columns, to + i * x.columns);
  return {to, x.columns, x.columns};
}

// bf16 rows of units that are not short: the unit's factor multiplies fp32 sums, and rows stay as they are.
constexpr int64_t kLongUnit = 32;

// Whether any element is subnormal: products of halves take it for zero, and beside what cancels it would be missed.
bool subnormal(const Rows<c10::BFloat16>& x, int64_t start, int64_t stop) {
  return best([&]() FASTCLIP_LAMBDA {
    uint32_t found = 0;
    for (int64_t t = start; t < stop; ++t) {
      const auto* row = reinterpret_cast<const uint16_t*>(x.row(t));
      for (int64_t c = 0; c < x.columns; ++c) found |= (row[c] & 0x7f80) == 0 && (row[c] & 0x7f) != 0;
    }
    return found != 0;
  });
}

// The rows that count, in pieces of units.
std::vector<Segment> segments_of(const Rows<c10::BFloat16>& a, const Rows<c10::BFloat16>& g, const std::vector<int64_t>& bounds,
                                 const std::vector<double>& factors) {
  std::vector<Segment> segments;
  for (size_t u = 0; u + 1 < bounds.size(); ++u) {
    const auto factor = static_cast<float>(factors[u]);
    for (int64_t t = bounds[u]; t < bounds[u + 1] && factor != 0; t += kSegmentRows)
      segments.push_back({t, std::min(kSegmentRows, bounds[u + 1] - t), factor, false});
  }
  torch::stable::parallel_for(0, segments.size(), 1, [&](int64_t begin, int64_t end) {
    for (Segment* s = segments.data() + begin; s != segments.data() + end; ++s)
      s->wide = subnormal(a, s->start, s->start + s->rows) || subnormal(g, s->start, s->start + s->rows);
  });
  return segments;
}

void products_of_halves(const Rows<c10::BFloat16>& a, const Rows<c10::BFloat16>& g, const std::vector<Segment>& segments,
                        bool accumulate, float* out, int64_t stride) {
#if FASTCLIP_HAS_TILES
  if (tiles::faster()) return clipped_by_tiles(a, g, segments, accumulate, out, stride);
#endif
  const bool along_p = g.columns >= a.columns;
  const int64_t longer = std::max(a.columns, g.columns);
  const int64_t most = std::clamp(kOutInCache / std::min(a.columns, g.columns) / 16 * 16, kLeast, kMost);
  const int64_t step = std::clamp((longer / kTasks + 15) / 16 * 16, kLeast, most);
  over_tasks<Scratch>((longer + step - 1) / step, [&](int64_t task, Scratch& s) {
    const int64_t first = task * step, count = std::min(step, longer - first);
    const int64_t m = along_p ? count : g.columns, n = along_p ? a.columns : count;
    float* to = out + (along_p ? first * stride : first);
    bool add = accumulate;
    for (const Segment& segment : segments) {
      const View<c10::BFloat16> left = turned(g, segment, along_p ? first : 0);
      const View<c10::BFloat16> right = turned(a, segment, along_p ? 0 : first).transposed();
      const std::vector<float> rows(segment.wide ? segment.rows : 0, segment.factor);
      if (segment.wide)
        gemm<float>(s.narrow, m, n, segment.rows, left, right, rows.data(), add, to, stride);
      else
        halves::multiply(s.narrow, m, n, segment.rows, left, right, segment.factor, add, to, stride, false);
      add = true;
    }
  });
}

// out (+)= sum_t factors[t] g_t^T a_t; without factors the sum alone.
template <class Out, class A, class G>
void slices(const Rows<A>& a, const Rows<G>& g, int64_t k, const Out* factors, bool accumulate, Out* out, int64_t stride) {
  const View<G> left{g.data, 1, g.stride};
  const View<A> right{a.data, a.stride, 1};
  const bool along_p = g.columns >= a.columns;
  const int64_t longer = std::max(a.columns, g.columns);
  const int64_t step = std::clamp((longer / kTasks + 15) / 16 * 16, kLeast, kMost);
  over_tasks<Scratch>((longer + step - 1) / step, [&](int64_t task, Scratch& s) {
    const int64_t first = task * step, count = std::min(step, longer - first);
    if (along_p)
      gemm<Out>(s.of(Out{}), count, a.columns, k, left.at(first, 0), right, factors, accumulate, out + first * stride, stride);
    else
      gemm<Out>(s.of(Out{}), g.columns, count, k, left, right.at(0, first), factors, accumulate, out + first, stride);
  });
}

// Rows of x times their factors.
template <class Out, class X>
Rows<Out> scaled(const Rows<X>& x, int64_t rows, const Out* factors, Buffer<Out>& into) {
  Out* to = into.get(rows * x.columns);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / x.columns), [&](int64_t first, int64_t last) {
    best([&]() FASTCLIP_LAMBDA {
      for (int64_t t = first; t < last; ++t)
        for (int64_t c = 0; c < x.columns; ++c) to[t * x.columns + c] = factors[t] * static_cast<Out>(x.row(t)[c]);
    });
  });
  return {to, x.columns, x.columns};
}

template <class Out, class A, class G>
void products(const Rows<A>& all_a, const Rows<G>& all_g, const std::vector<int64_t>& kept, const std::vector<Out>& factors,
              bool accumulate, Out* out, int64_t stride) {
  Buffer<A> a_copy;
  Buffer<G> g_copy;
  const Rows<A> a = gathered(all_a, kept, a_copy);
  const Rows<G> g = gathered(all_g, kept, g_copy);
  const int64_t rows = kept.size();
  if (packed::faster()) return slices(a, g, rows, factors.data(), accumulate, out, stride);
  // The BLAS scales nothing: one copy of the narrower side for all slices, so many rows at a time that it stays small.
  thread_local Buffer<Out> copy;
  const int64_t step = std::max<int64_t>(256, kScaled / std::min(a.columns, g.columns));
  for (int64_t t = 0; t < rows; t += step) {
    const int64_t count = std::min(step, rows - t);
    const Rows<A> own_a{a.row(t), a.stride, a.columns};
    const Rows<G> own_g{g.row(t), g.stride, g.columns};
    const bool add = accumulate || t > 0;
    const Out* none = nullptr;
    if (a.columns <= g.columns)
      slices(scaled(own_a, count, factors.data() + t, copy), own_g, count, none, add, out, stride);
    else
      slices(own_a, scaled(own_g, count, factors.data() + t, copy), count, none, add, out, stride);
  }
}

template <class Out>
void launch(const Tensor& a_in, const Tensor& g_in, const std::vector<int64_t>& bounds, const std::vector<double>& by_unit,
            const Tensor& out, bool accumulate) {
  std::vector<int64_t> kept;
  std::vector<Out> factors;
  int64_t units_with_rows = 0;
  for (size_t u = 0; u + 1 < bounds.size(); ++u) {
    const bool counts = bounds[u] < bounds[u + 1] && static_cast<Out>(by_unit[u]) != 0;
    units_with_rows += counts;
    for (int64_t t = bounds[u]; t < bounds[u + 1] && counts; ++t)
      kept.push_back(t), factors.push_back(static_cast<Out>(by_unit[u]));
  }
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t rows = out.size(0), columns = out.size(1), stride = rows > 1 ? out.stride(0) : columns;
  if (kept.empty()) {
    for (int64_t r = 0; r < rows && !accumulate; ++r) std::fill(to + r * stride, to + r * stride + columns, Out{0});
    return;
  }
  const Tensor a_dense = dense_rows(a_in, a_in.scalar_type()), g_dense = dense_rows(g_in, g_in.scalar_type());
  by_dtype("clipped_gemm", a_in.scalar_type(), [&](auto a_zero) {
    by_dtype("clipped_gemm", g_in.scalar_type(), [&](auto g_zero) {
      using A = decltype(a_zero);
      using G = decltype(g_zero);
      const Rows<A> left = rows_of<A>(a_dense);
      const Rows<G> right = rows_of<G>(g_dense);
      if constexpr (std::is_same_v<A, c10::BFloat16> && std::is_same_v<G, c10::BFloat16> && std::is_same_v<Out, float>)
        if (halves::faster() && static_cast<int64_t>(kept.size()) >= kLongUnit * units_with_rows)
          return products_of_halves(left, right, segments_of(left, right, bounds, by_unit), accumulate, to, stride);
      products<Out>(left, right, kept, factors, accumulate, to, stride);
    });
  });
}

void clipped_gemm(const Tensor& a, const Tensor& g, const Tensor& offsets, const Tensor& factors, const Tensor& out,
                  bool accumulate) {
  const char* op = "clipped_gemm";
  STD_TORCH_CHECK(a.dim() == 2 && g.dim() == 2 && a.size(0) == g.size(0), op, ": a must be [N, d] and g [N, p]");
  STD_TORCH_CHECK(a.size(0) < INT32_MAX && a.size(1) < INT32_MAX && g.size(1) < INT32_MAX, op, ": more than 2^31 rows or columns");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == g.size(1) && out.size(1) == a.size(1), op, ": out must be [p, d]");
  STD_TORCH_CHECK(out.numel() > 0, op, ": a and g must have columns");
  STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == 1, op, ": out must have dense rows");
  STD_TORCH_CHECK(out.size(0) <= 1 || (out.stride(0) >= out.size(1) && out.stride(0) < INT32_MAX), op, ": out's rows overlap");
  const auto bounds = bounds_of(op, offsets, a.size(0));
  const auto by_unit = factors_of(op, factors, bounds.size() - 1);
  if (out.scalar_type() == ScalarType::Float)
    launch<float>(a, g, bounds, by_unit, out, accumulate);
  else if (out.scalar_type() == ScalarType::Double)
    launch<double>(a, g, bounds, by_unit, out, accumulate);
  else
    STD_TORCH_CHECK(false, op, ": out must be fp32 or fp64");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("clipped_gemm", TORCH_BOX(&clipped_gemm)); }

}  // namespace fastclip
