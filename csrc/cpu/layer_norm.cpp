// layer_norm_backward: input gradients of LayerNorm and RMSNorm, and gradients of gain and bias, a unit, in one pass.
//
//   x_hat = (x - mean) rstd    v = g w    dx = rstd (v - mean_p(v) - x_hat mean_p(v x_hat))
//
// RMSNorm has no mean, and no mean_p(v). g, x: [N, p], mean, rstd: [N], w: [p], offsets: [U + 1] -> dx [N, p] and sums
// [1 or 2, U, p]: sum_t g_t x_hat_t, and sum_t g_t. Rows are read twice, the second time from the first cache. Sums over
// eight rows in fp32 (fp64 for fp64), beyond in fp64; units of many rows are split at places that depend on nothing else.
#include "buffer.h"
#include "lanes.h"
#include "rows.h"

namespace fastclip {
namespace {

constexpr int64_t kChunk = 256, kTogether = 8;

typedef double f64x8 __attribute__((vector_size(64)));

template <class T>
using Narrow = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Scratch {
  Buffer<double> sums, narrow;  // narrow holds fp32 where inputs do
};

template <class N>
struct Norm {
  const N *mean, *rstd, *weight;  // mean, weight: null where there is none
  bool bias;
};

template <class N>
using Lanes = std::conditional_t<std::is_same_v<N, double>, f64x8, f32x16>;

template <class N, class T>
FASTCLIP_INLINE Lanes<N> read(const T* from) {
  Lanes<N> x;
  if constexpr (std::is_same_v<T, N>)
    std::memcpy(&x, from, sizeof x);
  else
    for (size_t l = 0; l < sizeof x / sizeof(N); ++l) x[l] = static_cast<N>(from[l]);
  return x;
}

// The sums over a row of v, and of v x_hat.
template <class T, class N, bool kMean, bool kWeight>
FASTCLIP_INLINE void row_sums(const T* g, const T* x, int64_t p, N mean, N rstd, const N* weight, double (&out)[2]) {
  constexpr int64_t kLanes = sizeof(Lanes<N>) / sizeof(N);
  Lanes<N> plain = {}, products = {};
  int64_t c = 0;
  for (; c + kLanes <= p; c += kLanes) {
    const Lanes<N> from = read<N>(g + c), v = kWeight ? from * read<N>(weight + c) : from;
    if constexpr (kMean) plain += v;
    products += v * ((read<N>(x + c) - mean) * rstd);
  }
  for (int64_t l = 0; c + l < p; ++l) {
    const N v = static_cast<N>(g[c + l]) * (kWeight ? weight[c + l] : N{1});
    if constexpr (kMean) plain[l] += v;
    products[l] += v * ((static_cast<N>(x[c + l]) - mean) * rstd);
  }
  out[0] = out[1] = 0;
  for (int64_t l = 0; l < kLanes; ++l) {
    out[0] += plain[l];
    out[1] += products[l];
  }
}

template <class T, class N, bool kMean, bool kWeight>
FASTCLIP_INLINE void row_gradient(const T* __restrict__ g, const T* __restrict__ x, int64_t p, N mean, N rstd,
                                  const N* __restrict__ weight, N of_v, N of_products, bool bias, T* __restrict__ dx,
                                  N* __restrict__ gains, N* __restrict__ shifts) {
  for (int64_t c = 0; c < p; ++c) {
    const N from = static_cast<N>(g[c]);
    const N hat = (kMean ? static_cast<N>(x[c]) - mean : static_cast<N>(x[c])) * rstd;
    const N v = kWeight ? from * weight[c] : from;
    dx[c] = static_cast<T>((v - of_v - hat * of_products) * rstd);
    gains[c] += from * hat;
  }
  if (bias)
    for (int64_t c = 0; c < p; ++c) shifts[c] += static_cast<N>(g[c]);
}

// Rows [first, last): dx, and their sums in fp64 [2, p].
template <class T, class N, bool kMean, bool kWeight>
FASTCLIP_INLINE void rows(const Rows<T>& g, const Rows<T>& x, const Norm<N>& norm, int64_t first, int64_t last, T* dx, N* narrow,
                          double* sums) {
  const int64_t p = g.columns, wide = norm.bias ? 2 * p : p;
  for (int64_t c = 0; c < wide; ++c) sums[c] = 0;
  for (int64_t start = first; start < last; start += kTogether) {
    for (int64_t c = 0; c < wide; ++c) narrow[c] = 0;
    for (int64_t t = start; t < std::min(last, start + kTogether); ++t) {
      const N mean = kMean ? norm.mean[t] : N{0};
      double over[2];
      row_sums<T, N, kMean, kWeight>(g.row(t), x.row(t), p, mean, norm.rstd[t], norm.weight, over);
      row_gradient<T, N, kMean, kWeight>(g.row(t), x.row(t), p, mean, norm.rstd[t], norm.weight, static_cast<N>(over[0] / p),
                                         static_cast<N>(over[1] / p), norm.bias, dx + t * p, narrow, narrow + p);
    }
    for (int64_t c = 0; c < wide; ++c) sums[c] += narrow[c];
  }
}

struct Place {
  int64_t first, last, partial;  // partial: -1 where the rows are a whole unit
  int64_t unit;
};

template <class T>
void run(const Tensor& g_in, const Tensor& x_in, const Norm<Narrow<T>>& norm, const std::vector<int64_t>& bounds, Tensor& dx_out,
         Tensor& sums_out) {
  using N = Narrow<T>;
  const Rows<T> g = rows_of<T>(g_in), x = rows_of<T>(x_in);
  const int64_t p = g.columns, units = bounds.size() - 1, wide = norm.bias ? 2 * p : p;
  T* dx = static_cast<T*>(dx_out.mutable_data_ptr());
  N* out = static_cast<N*>(sums_out.mutable_data_ptr());
  std::vector<Place> places;
  int64_t partials = 0;
  for (int64_t u = 0; u < units; ++u) {
    const bool whole = bounds[u + 1] - bounds[u] <= kChunk;
    for (int64_t t = bounds[u]; t < bounds[u + 1] || (whole && t == bounds[u]); t += kChunk)
      places.push_back({t, std::min(bounds[u + 1], t + kChunk), whole ? -1 : partials++, u});
  }
  std::vector<double> kept(partials * wide);
  const auto put = [&](int64_t u, const double* sums) {
    for (int64_t c = 0; c < p; ++c) out[u * p + c] = static_cast<N>(sums[c]);
    for (int64_t c = p; c < wide; ++c) out[(units + u) * p + c - p] = static_cast<N>(sums[c]);
  };
  over_tasks<Scratch>(places.size(), [&](int64_t task, Scratch& s) {
    const Place& place = places[task];
    double* sums = place.partial < 0 ? s.sums.get(wide) : kept.data() + place.partial * wide;
    N* narrow = reinterpret_cast<N*>(s.narrow.get(2 * p));
    best([&]() FASTCLIP_LAMBDA {
      if (norm.mean && norm.weight)
        rows<T, N, true, true>(g, x, norm, place.first, place.last, dx, narrow, sums);
      else if (norm.mean)
        rows<T, N, true, false>(g, x, norm, place.first, place.last, dx, narrow, sums);
      else if (norm.weight)
        rows<T, N, false, true>(g, x, norm, place.first, place.last, dx, narrow, sums);
      else
        rows<T, N, false, false>(g, x, norm, place.first, place.last, dx, narrow, sums);
    });
    if (place.partial < 0) put(place.unit, sums);
  });
  for (size_t i = 0; i < places.size();) {
    if (places[i].partial < 0) {
      ++i;
      continue;
    }
    double* total = kept.data() + places[i].partial * wide;
    const int64_t unit = places[i].unit;
    for (++i; i < places.size() && places[i].unit == unit; ++i)
      for (int64_t c = 0; c < wide; ++c) total[c] += kept[places[i].partial * wide + c];
    put(unit, total);
  }
}

// x in this dtype and dense, or nothing.
std::optional<Tensor> dense(const std::optional<Tensor>& x, ScalarType type, int64_t count, const char* name) {
  if (!x) return std::nullopt;
  STD_TORCH_CHECK(x->numel() == count, "layer_norm_backward: ", name, " must have ", count, " values");
  return torch::stable::contiguous(x->scalar_type() == type ? *x : torch::stable::to(*x, type));
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& g_in, const Tensor& x_in, const std::optional<Tensor>& mean_in,
                                               const Tensor& rstd_in, const std::optional<Tensor>& weight_in,
                                               const Tensor& offsets, bool bias) {
  const char* op = "layer_norm_backward";
  STD_TORCH_CHECK(g_in.dim() == 2 && x_in.dim() == 2, op, ": g and x must be [N, p]");
  const int64_t n = x_in.size(0), p = x_in.size(1);
  STD_TORCH_CHECK(g_in.size(0) == n && g_in.size(1) == p, op, ": g must have x's shape");
  const auto bounds = bounds_of(op, offsets, n);
  const ScalarType type = common(g_in.scalar_type(), x_in.scalar_type());
  const auto narrow = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor g = dense_rows(g_in, type), x = dense_rows(x_in, type);
  const auto mean = dense(mean_in, narrow, n, "mean"), rstd = dense(rstd_in, narrow, n, "rstd");
  const auto weight = dense(weight_in, narrow, p, "weight");
  const auto sums_type = x_in.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor dx = torch::stable::new_empty(x_in, {n, p}, type);
  Tensor sums = torch::stable::new_empty(x_in, {1 + bias, static_cast<int64_t>(bounds.size()) - 1, p}, narrow);
  by_dtype(op, type, [&](auto zero) {
    using N = Narrow<decltype(zero)>;
    const auto data = [](const std::optional<Tensor>& y) { return y ? static_cast<const N*>(y->const_data_ptr()) : nullptr; };
    run<decltype(zero)>(g, x, Norm<N>{data(mean), data(rstd), data(weight), bias}, bounds, dx, sums);
  });
  return {type == x_in.scalar_type() ? dx : torch::stable::to(dx, x_in.scalar_type()),
          narrow == sums_type ? sums : torch::stable::to(sums, sums_type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastclip
