// cross_entropy, cross_entropy_backward: softmax cross-entropy of rows of logits [R, V] and, in their place, its gradient.
//
// Two passes over a row forward (largest logit, sum of exponentials) and one backward; a row stays in the second cache. Exponentials in
// fp32, their sums in fp32 over 1024 terms and in fp64 beyond; fp64 logits in fp64 throughout.
#include <cmath>
#include <limits>

#include "exponential.h"
#include "rows.h"

namespace fastclip {
namespace {

constexpr int64_t kLanes = 16, kSegment = 1024, kRowsATask = 4;

struct Nothing {};

template <class T>
FASTCLIP_INLINE f32x16 read(const T* from, int64_t count) {
  f32x16 x = f32x16{} - std::numeric_limits<float>::infinity();
  if constexpr (std::is_same_v<T, float>)
    if (count == kLanes) {
      std::memcpy(&x, from, sizeof x);
      return x;
    }
  for (int64_t l = 0; l < count; ++l) x[l] = static_cast<float>(from[l]);
  return x;
}

template <class T>
FASTCLIP_INLINE void write(f32x16 x, T* to, int64_t count) {
  if constexpr (std::is_same_v<T, float>)
    if (count == kLanes) {
      std::memcpy(to, &x, sizeof x);
      return;
    }
  for (int64_t l = 0; l < count; ++l) to[l] = static_cast<T>(x[l]);
}

FASTCLIP_INLINE double total_of(f32x16 x) {
  double total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += x[l];
  return total;
}

// log sum exp of a row.
template <class T>
FASTCLIP_INLINE double log_sum_exp(const T* row, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    double largest = row[0], total = 0;
    for (int64_t c = 1; c < n; ++c) largest = row[c] > largest ? row[c] : largest;
    for (int64_t c = 0; c < n; ++c) total += std::exp(row[c] - largest);
    return largest + std::log(total);
  } else {
    f32x16 most = f32x16{} - std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < n; c += kLanes) {
      const f32x16 x = read(row + c, std::min(kLanes, n - c));
      most = x > most ? x : most;
    }
    float largest = most[0];
    for (int64_t l = 1; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
    double total = 0;
    for (int64_t start = 0; start < n; start += kSegment) {
      f32x16 lanes = {};
      for (int64_t c = start; c < std::min(start + kSegment, n); c += kLanes)
        lanes += exponential(read(row + c, std::min(kLanes, n - c)) - largest);
      total += total_of(lanes);
    }
    return largest + std::log(total);
  }
}

// row = factor * softmax(row), in place.
template <class T>
FASTCLIP_INLINE void scaled_softmax(T* row, int64_t n, double lse, double factor) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t c = 0; c < n; ++c) row[c] = factor * std::exp(row[c] - lse);
  } else {
    const float shift = static_cast<float>(lse), scale = static_cast<float>(factor);
    for (int64_t c = 0; c < n; c += kLanes) {
      const int64_t count = std::min(kLanes, n - c);
      write(exponential(read(row + c, count) - shift) * scale, row + c, count);
    }
  }
}

std::vector<int64_t> labels_of(const char* op, const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must be [R, V]");
  STD_TORCH_CHECK(logits.size(1) == 1 || logits.stride(1) == 1, op, ": logits must have dense rows");
  const auto type = labels.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": labels must be int32 or int64");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0), op, ": labels must be [R]");
  auto values = integers(labels);
  for (int64_t y : values) STD_TORCH_CHECK(y >= 0 && y < logits.size(1), op, ": label ", y, " is not in [0, ", logits.size(1), ")");
  return values;
}

template <class F>
void over_rows(int64_t rows, const F& work) {
  over_tasks<Nothing>((rows + kRowsATask - 1) / kRowsATask, [&](int64_t task, Nothing&) {
    for (int64_t r = task * kRowsATask; r < std::min(rows, (task + 1) * kRowsATask); ++r) work(r);
  });
}

// [2, R]: losses and log sum exps, fp32 (fp64 for fp64).
Tensor cross_entropy(const Tensor& logits, const Tensor& labels_in) {
  const auto labels = labels_of("cross_entropy", logits, labels_in);
  const int64_t rows = logits.size(0), n = logits.size(1), stride = rows > 1 ? logits.stride(0) : n;
  const bool wide = logits.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(logits, {2, rows}, wide ? ScalarType::Double : ScalarType::Float);
  by_dtype("cross_entropy", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Out = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* from = static_cast<const T*>(logits.const_data_ptr());
    Out* to = static_cast<Out*>(out.mutable_data_ptr());
    over_rows(rows, [&](int64_t r) {
      const T* row = from + r * stride;
      const double lse = best([&]() FASTCLIP_LAMBDA { return log_sum_exp(row, n); });
      to[rows + r] = static_cast<Out>(lse);
      to[r] = static_cast<Out>(lse - static_cast<double>(row[labels[r]]));
    });
  });
  return out;
}

// logits = g_r (softmax(logits) - onehot(label)). lse, g: [R].
void cross_entropy_backward(const Tensor& logits, const Tensor& labels_in, const Tensor& lse_in, const Tensor& g_in) {
  const char* op = "cross_entropy_backward";
  const auto labels = labels_of(op, logits, labels_in);
  const int64_t rows = logits.size(0), n = logits.size(1), stride = rows > 1 ? logits.stride(0) : n;
  STD_TORCH_CHECK(rows <= 1 || stride >= n, op, ": logits' rows overlap");
  const auto lse = factors_of(op, lse_in, rows), g = factors_of(op, g_in, rows);
  by_dtype(op, logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    T* to = static_cast<T*>(logits.mutable_data_ptr());
    over_rows(rows, [&](int64_t r) {
      T* row = to + r * stride;
      // The label's own column apart: softmax - 1 cancels in a narrower dtype.
      const Wide x = static_cast<Wide>(row[labels[r]]);
      best([&]() FASTCLIP_LAMBDA { scaled_softmax(row, n, lse[r], g[r]); });
      row[labels[r]] = static_cast<T>(static_cast<Wide>(g[r] * std::expm1(static_cast<double>(x) - lse[r])));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace fastclip
