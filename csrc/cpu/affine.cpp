// segment_sum, affine_norm: gradients of biases (sum_t g_t) and gains (sum_t g_t x_hat_t), a unit.
//
// g, x_hat: [N, p], offsets: [U + 1] -> [U, p] in fp32 (fp64 for fp64), or fp64 [U] squared norms of the same numbers. One
// pass over g and x_hat, in columns that stay in the first cache; norm and sum are of the same rounded numbers.
#include "lanes.h"
#include "rows.h"

namespace fastclip {
namespace {

constexpr int64_t kColumns = 512;

struct Sums {
  double columns[kColumns];
};

// Products and sums of eight rows in the inputs' own fp32 (fp64 for fp64), of eights in fp64.
template <class T>
using Narrow = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kTogether = 8;  // rows

// x[0] + ... + x[n - 1] of term(i), halves first.
template <int64_t n, class F>
FASTCLIP_INLINE auto tree(const F& term, int64_t i = 0) {
  if constexpr (n == 1)
    return term(i);
  else
    return tree<n / 2>(term, i) + tree<n / 2>(term, i + n / 2);
}

template <class T, bool kGain>
FASTCLIP_INLINE void add_rows(const Rows<T>& g, const Rows<T>& x, int64_t first, int64_t last, int64_t column, int64_t count,
                              double* __restrict__ sums) {
  const auto term = [&](int64_t t, int64_t c) FASTCLIP_LAMBDA {
    const auto value = static_cast<Narrow<T>>(g.row(t)[column + c]);
    if constexpr (kGain)
      return value * static_cast<Narrow<T>>(x.row(t)[column + c]);
    else
      return value;
  };
  for (int64_t c = 0; c < count; ++c) sums[c] = 0;
  int64_t t = first;
  for (; t + kTogether <= last; t += kTogether)
    for (int64_t c = 0; c < count; ++c)
      sums[c] += tree<kTogether>([&](int64_t i) FASTCLIP_LAMBDA { return term(t + i, c); });
  for (; t < last; ++t) {
    const T *from = g.row(t) + column, *other = kGain ? x.row(t) + column : nullptr;
    for (int64_t c = 0; c < count; ++c) {
      const auto value = static_cast<Narrow<T>>(from[c]);
      sums[c] += kGain ? value * static_cast<Narrow<T>>(other[c]) : value;
    }
  }
}

// put(unit, column, count, sums) for every block of columns of every unit.
template <class T, class Put>
void over_blocks(const Tensor& g_in, const std::optional<Tensor>& x_in, const std::vector<int64_t>& bounds, const Put& put) {
  const Rows<T> g = rows_of<T>(g_in);
  const Rows<T> x = x_in ? rows_of<T>(*x_in) : Rows<T>{};
  const int64_t units = bounds.size() - 1, blocks = (g.columns + kColumns - 1) / kColumns;
  over_tasks<Sums>(units * blocks, [&](int64_t task, Sums& s) {
    const int64_t u = task / blocks, column = task % blocks * kColumns, count = std::min(kColumns, g.columns - column);
    best([&]() FASTCLIP_LAMBDA {
      if (x_in)
        add_rows<T, true>(g, x, bounds[u], bounds[u + 1], column, count, s.columns);
      else
        add_rows<T, false>(g, x, bounds[u], bounds[u + 1], column, count, s.columns);
      put(u, column, count, s.columns);
    });
  });
}

struct Inputs {
  std::vector<int64_t> bounds;
  Tensor g;
  std::optional<Tensor> x;
};

Inputs inputs(const char* op, const Tensor& g, const std::optional<Tensor>& x_hat, const Tensor& offsets) {
  STD_TORCH_CHECK(g.dim() == 2, op, ": g must be [N, p]");
  STD_TORCH_CHECK(!x_hat || (x_hat->dim() == 2 && x_hat->size(0) == g.size(0) && x_hat->size(1) == g.size(1)), op,
                  ": x_hat must have g's shape");
  const ScalarType type = x_hat ? common(g.scalar_type(), x_hat->scalar_type()) : g.scalar_type();
  return {bounds_of(op, offsets, g.size(0)), dense_rows(g, type),
          x_hat ? std::optional<Tensor>(dense_rows(*x_hat, type)) : std::nullopt};
}

Tensor segment_sum(const Tensor& g, const std::optional<Tensor>& x_hat, const Tensor& offsets) {
  const Inputs in = inputs("segment_sum", g, x_hat, offsets);
  const auto type = g.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t columns = g.size(1);
  Tensor out = torch::stable::new_empty(g, {static_cast<int64_t>(in.bounds.size()) - 1, columns}, type);
  by_dtype("segment_sum", in.g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto fill = [&](auto* to) {
      over_blocks<T>(in.g, in.x, in.bounds, [&](int64_t u, int64_t column, int64_t count, const double* sums) FASTCLIP_LAMBDA {
        auto* here = to + u * columns + column;
        for (int64_t c = 0; c < count; ++c) here[c] = sums[c];
      });
    };
    if (type == ScalarType::Double)
      fill(static_cast<double*>(out.mutable_data_ptr()));
    else
      fill(static_cast<float*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor affine_norm(const Tensor& g, const std::optional<Tensor>& x_hat, const Tensor& offsets) {
  const Inputs in = inputs("affine_norm", g, x_hat, offsets);
  const int64_t units = in.bounds.size() - 1, blocks = (g.size(1) + kColumns - 1) / kColumns;
  Tensor out = torch::stable::new_empty(g, {units}, ScalarType::Double);
  std::vector<double> squares(units * blocks);
  const bool wide = g.scalar_type() == ScalarType::Double;  // as segment_sum's
  by_dtype("affine_norm", in.g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    over_blocks<T>(in.g, in.x, in.bounds, [&](int64_t u, int64_t column, int64_t count, double* sums) FASTCLIP_LAMBDA {
      for (int64_t c = 0; c < count && !wide; ++c) sums[c] = static_cast<float>(sums[c]);
      squares[u * blocks + column / kColumns] = square(sums, count);
    });
  });
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t u = 0; u < units; ++u) {
    to[u] = 0;
    for (int64_t b = 0; b < blocks; ++b) to[u] += squares[u * blocks + b];
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&segment_sum));
  m.impl("affine_norm", TORCH_BOX(&affine_norm));
}

}  // namespace fastclip
