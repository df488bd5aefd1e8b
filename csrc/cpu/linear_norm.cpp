// linear_norm_parts, row_norm_products: per unit u, |W_u|^2 for W_u = sum_t g_t a_t^T, and sum_t |a_t||g_t|.
//
// a: [N, d], g: [N, p] fp32, fp64, bf16 or fp16, offsets: int32 or int64 [U + 1] -> fp64 [2, U].
// Gram route: sum over pairs of rows of (a_s . a_t)(g_s . g_t), L^2 (d + p) FLOPs by symmetry, in tiles of 128 rows that
// are squared and dropped. Direct route: W_u in slices, 2 L d p FLOPs, fp64. Products go to the BLAS that torch carries, one
// thread a tile. fastclip/reference.py says which precision suffices when, and why; the rule here is the same.
#include <cmath>
#include <string>

#include "rows.h"

namespace fastclip {
namespace {

constexpr double kRoundoff32 = 0x1p-24, kRoundoff64 = 0x1p-53, kNormSlack = 0x1p-8, kSmallestRow = 1e-15;
constexpr int64_t kRows = 128;      // of a tile
constexpr int64_t kWideColumns = 256;  // converted to fp64 at a time

// c [m, n] = x y^T + keep c, all row-major. x: [m, k], y: [n, k].
void gemm(int m, int n, int k, const float* x, int ldx, const float* y, int ldy, float keep, float* c) {
  const float one = 1;
  sgemm_("T", "N", &n, &m, &k, &one, y, &ldy, x, &ldx, &keep, c, &n);
}
void gemm(int m, int n, int k, const double* x, int ldx, const double* y, int ldy, double keep, double* c) {
  const double one = 1;
  dgemm_("T", "N", &n, &m, &k, &one, y, &ldy, x, &ldx, &keep, c, &n);
}

// Columns whose products are summed in fp32, and how many such blocks before fp64 takes over.
struct Blocks {
  int64_t columns, group;
  double terms;
};

Blocks blocks_for(int64_t d, int64_t p, int64_t length) {
  if ((d + p + 2) * kRoundoff32 * length <= 2 * kNormSlack) return {std::max(d, p), 1, double(d + p + 2)};
  if (length <= 256) return {128, 16, 2 * (128 + 16 + 1)};
  if (length <= 512) return {64, 16, 2 * (64 + 16 + 1)};
  return {32, 4, 2 * (32 + 4 + 1)};
}

struct Scratch {
  std::vector<float> tile, block;
  std::vector<double> left, right, wide;
};

template <class T, class To>
const To* load(const Rows<T>& x, int64_t first, int64_t last, int64_t column, int64_t columns, std::vector<To>& into) {
  into.resize(std::max<size_t>(into.size(), (last - first) * columns));
  To* to = into.data();
  for (int64_t t = first; t < last; ++t)
    for (const T *from = x.row(t) + column, *end = from + columns; from < end;) *to++ = static_cast<To>(*from++);
  return into.data();
}

// out [j - i, stop - i] = products of rows i:j with rows i:stop, fp32 in blocks of columns, blocks added as `how` says.
template <class T>
void products(const Rows<T>& x, int64_t i, int64_t j, int64_t stop, const Blocks& how, Scratch& s, std::vector<double>& out) {
  const int64_t m = j - i, n = stop - i;
  out.assign(m * n, 0.0);
  s.tile.resize(std::max<size_t>(s.tile.size(), m * n));
  int64_t pending = 0;
  for (int64_t column = 0; column < x.columns; column += how.columns) {
    const int64_t k = std::min(how.columns, x.columns - column);
    const float* rows;
    int64_t stride;
    if constexpr (std::is_same_v<T, float>)
      rows = x.row(i) + column, stride = x.stride;
    else
      rows = load(x, i, stop, column, k, s.block), stride = k;
    gemm(m, n, k, rows, stride, rows, stride, pending ? 1.0f : 0.0f, s.tile.data());
    if (++pending == how.group || column + k == x.columns) {
      for (int64_t e = 0; e < m * n; ++e) out[e] += s.tile[e];
      pending = 0;
    }
  }
}

// The same with fp64 products.
template <class T>
void products_fp64(const Rows<T>& x, int64_t i, int64_t j, int64_t stop, Scratch& s, std::vector<double>& out) {
  const int64_t m = j - i, n = stop - i;
  out.assign(m * n, 0.0);
  for (int64_t column = 0; column < x.columns; column += kWideColumns) {
    const int64_t k = std::min(kWideColumns, x.columns - column);
    const double* rows = load(x, i, stop, column, k, s.wide);
    gemm(m, n, k, rows, k, rows, k, 1.0, out.data());
  }
}

template <class T>
double gram_tile(const Rows<T>& a, const Rows<T>& g, int64_t i, int64_t j, int64_t stop, const Blocks* how, Scratch& s) {
  if (how) {
    products(a, i, j, stop, *how, s, s.left);
    products(g, i, j, stop, *how, s, s.right);
  } else {
    products_fp64(a, i, j, stop, s, s.left);
    products_fp64(g, i, j, stop, s, s.right);
  }
  const int64_t m = j - i, n = stop - i;
  double square = 0, above = 0;
  for (int64_t r = 0; r < m; ++r) {
    const double *x = &s.left[r * n], *y = &s.right[r * n];
    for (int64_t c = 0; c < m; ++c) square += x[c] * y[c];
    for (int64_t c = m; c < n; ++c) above += x[c] * y[c];
  }
  return square + 2 * above;
}

// Columns first:last of g against all of a: a slice of W_u, squared and dropped.
template <class T>
double direct_slice(const Rows<T>& a, const Rows<T>& g, int64_t start, int64_t stop, int64_t first, int64_t last, Scratch& s) {
  const int length = stop - start, m = last - first, d = a.columns;
  const double* x = load(g, start, stop, first, m, s.left);    // [L, m]
  const double* y = load(a, start, stop, 0, a.columns, s.right);  // [L, d]
  s.wide.resize(std::max<size_t>(s.wide.size(), int64_t{m} * d));
  const double one = 1, zero = 0;
  dgemm_("N", "T", &d, &m, &length, &one, y, &d, x, &m, &zero, s.wide.data(), &d);
  double total = 0;
  for (int64_t e = 0; e < int64_t{m} * d; ++e) total += s.wide[e] * s.wide[e];
  return total;
}

template <class T>
double row_norm(const Rows<T>& x, int64_t t) {
  const T* row = x.row(t);
  double lanes[8] = {}, rest = 0;
  int64_t c = 0;
  for (; c + 8 <= x.columns; c += 8)
    for (int l = 0; l < 8; ++l) {
      const double value = static_cast<double>(row[c + l]);
      lanes[l] += value * value;
    }
  for (; c < x.columns; ++c) rest += static_cast<double>(row[c]) * static_cast<double>(row[c]);
  for (double lane : lanes) rest += lane;
  return std::sqrt(rest) * (1 + 1e-9);  // above its rounding
}

template <class T>
std::vector<double> row_norms(const Rows<T>& x, int64_t rows) {
  std::vector<double> norms(rows);
  torch::stable::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) norms[t] = row_norm(x, t);
  });
  return norms;
}

struct Task {
  int64_t unit, first, last;
};

template <class F>
std::vector<double> run(const std::vector<Task>& tasks, const F& work) {
  std::vector<double> results(tasks.size());
  over_tasks<Scratch>(tasks.size(), [&](int64_t t, Scratch& scratch) { results[t] = work(tasks[t], scratch); });
  return results;
}

template <class T>
void parts(const Rows<T>& a, const Rows<T>& g, const std::vector<int64_t>& bounds, const std::string& route, double* squares,
           double* spreads) {
  const int64_t units = bounds.size() - 1, rows = bounds.back(), d = a.columns, p = g.columns;
  const std::vector<double> a_norms = row_norms(a, rows), g_norms = row_norms(g, rows);
  std::vector<double> lost(units, 0.0);
  std::vector<Task> narrow, wide, direct;
  const auto tiles = [&](int64_t u, std::vector<Task>& list) {
    for (int64_t i = bounds[u]; i < bounds[u + 1]; i += kRows) list.push_back({u, i, std::min(i + kRows, bounds[u + 1])});
  };
  const auto blocks = [&](int64_t u) { return blocks_for(d, p, bounds[u + 1] - bounds[u]); };
  for (int64_t u = 0; u < units; ++u) {
    squares[u] = spreads[u] = 0;
    for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t) {
      const double product = a_norms[t] * g_norms[t];
      spreads[u] += product;
      if (a_norms[t] < kSmallestRow || g_norms[t] < kSmallestRow) lost[u] += product;
    }
    const int64_t length = bounds[u + 1] - bounds[u];
    if (length == 0 || (spreads[u] == 0 && !std::is_same_v<T, double>)) continue;  // all products of rows are exactly 0
    if (route == "direct" || (route == "auto" && length * (d + p) > 2 * d * p)) {
      const int64_t step = std::max<int64_t>(1, (int64_t{1} << 20) / d);
      for (int64_t c = 0; c < p; c += step) direct.push_back({u, c, std::min(c + step, p)});
    } else if (std::is_same_v<T, double> || blocks(u).terms * kRoundoff32 * length > 2 * kNormSlack) {
      tiles(u, wide);
    } else {
      tiles(u, narrow);
    }
  }

  const auto totals = run(narrow, [&](const Task& t, Scratch& s) {
    const Blocks how = blocks(t.unit);
    return gram_tile(a, g, t.first, t.last, bounds[t.unit + 1], &how, s);
  });
  for (size_t t = 0; t < narrow.size(); ++t) squares[narrow[t].unit] += totals[t];
  for (size_t t = 0; t < narrow.size(); ++t) {
    const int64_t u = narrow[t].unit;
    if (t && narrow[t - 1].unit == u) continue;
    const double spread = spreads[u] * spreads[u], error = blocks(u).terms * kRoundoff32 * spread;
    if (std::isfinite(squares[u]) && error <= 2 * kNormSlack * squares[u] && lost[u] * lost[u] <= 1e-9 * squares[u] && squares[u] > 1e-30) continue;
    squares[u] = 0;
    tiles(u, wide);
  }

  const auto exact = run(wide, [&](const Task& t, Scratch& s) {
    return gram_tile(a, g, t.first, t.last, bounds[t.unit + 1], nullptr, s);
  });
  for (size_t t = 0; t < wide.size(); ++t) {
    const int64_t u = wide[t].unit;
    squares[u] += exact[t];
    if (t + 1 == wide.size() || wide[t + 1].unit != u) {
      const double terms = d + p + 2 * (bounds[u + 1] - bounds[u]) + 4;
      squares[u] += 4 * terms * kRoundoff64 * spreads[u] * spreads[u];
    }
  }

  const auto slices = run(direct, [&](const Task& t, Scratch& s) {
    return direct_slice(a, g, bounds[t.unit], bounds[t.unit + 1], t.first, t.last, s);
  });
  for (size_t t = 0; t < direct.size(); ++t) squares[direct[t].unit] += slices[t];
}

Tensor linear_norm_parts(const Tensor& a_in, const Tensor& g_in, const Tensor& offsets_in, std::string route) {
  STD_TORCH_CHECK(a_in.dim() == 2 && g_in.dim() == 2 && a_in.size(0) == g_in.size(0),
                  "linear_norm: a must be [N, d] and g [N, p] with the same N");
  STD_TORCH_CHECK(a_in.size(1) > 0 && g_in.size(1) > 0, "linear_norm: a and g must have columns");
  STD_TORCH_CHECK(a_in.size(1) < INT32_MAX && g_in.size(1) < INT32_MAX, "linear_norm: more than 2^31 columns");
  STD_TORCH_CHECK(route == "auto" || route == "gram" || route == "direct", "linear_norm: unknown route ", route);
  const auto bounds = bounds_of("linear_norm", offsets_in, a_in.size(0));
  const int64_t units = bounds.size() - 1;
  Tensor out = torch::stable::new_empty(a_in, {2, units}, ScalarType::Double);
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  const ScalarType type = common(a_in.scalar_type(), g_in.scalar_type());
  const Tensor a = dense_rows(a_in, type), g = dense_rows(g_in, type);
  by_dtype("linear_norm", type, [&](auto zero) {
    using T = decltype(zero);
    parts(rows_of<T>(a), rows_of<T>(g), bounds, route, to, to + units);
  });
  return out;
}

// sum_t |a_t||g_t| a unit: the second of the parts alone.
Tensor row_norm_products(const Tensor& a, const Tensor& g, const Tensor& offsets) {
  const char* op = "row_norm_products";
  STD_TORCH_CHECK(a.dim() == 2 && g.dim() == 2 && a.size(0) == g.size(0), op, ": a must be [N, d] and g [N, p] with the same N");
  const auto bounds = bounds_of(op, offsets, a.size(0));
  const int64_t units = bounds.size() - 1, rows = bounds.back();
  const auto norms = [&](const Tensor& x) {
    std::vector<double> out;
    const Tensor dense = dense_rows(x, x.scalar_type());
    by_dtype(op, x.scalar_type(), [&](auto zero) { out = row_norms(rows_of<decltype(zero)>(dense), rows); });
    return out;
  };
  const std::vector<double> a_norms = norms(a), g_norms = norms(g);
  Tensor out = torch::stable::new_empty(a, {units}, ScalarType::Double);
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t u = 0; u < units; ++u) {
    to[u] = 0;
    for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t) to[u] += a_norms[t] * g_norms[t];
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("linear_norm_parts", TORCH_BOX(&linear_norm_parts));
  m.impl("row_norm_products", TORCH_BOX(&row_norm_products));
}

}  // namespace fastclip
