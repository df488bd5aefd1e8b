// embedding_norm, clipped_embedding, tied_cross: gradients of a table [V, d] whose rows are picked by ids.
//
// ids: int [N], g: [N, d], offsets: [U + 1]. Rows are sorted by (unit, id), or by id; runs of one id are summed, in fp64 for
// norms and in the order of the rows for the clipped sum. What is read is g, once; rows whose id no other has, in their own order.
#include <numeric>

#include "gemm.h"
#include "lanes.h"
#include "rows.h"

namespace fastclip {
namespace {

struct Scratch {
  std::vector<int64_t> order;
  std::vector<char> alone;
  Buffer<double> left, right, wide;
};

// Places of [first, last) without padding rows, by id and then by place.
void sort_rows(const std::vector<int64_t>& ids, int64_t first, int64_t last, std::optional<int64_t> padding,
               std::vector<int64_t>& order) {
  order.clear();
  for (int64_t t = first; t < last; ++t)
    if (!padding || ids[t] != *padding) order.push_back(t);
  std::sort(order.begin(), order.end(), [&](int64_t s, int64_t t) { return ids[s] != ids[t] ? ids[s] < ids[t] : s < t; });
}

template <class T>
FASTCLIP_INLINE double run_square(const Rows<T>& g, const int64_t* rows, int64_t count, double* sum) {
  for (int64_t c = 0; c < g.columns; ++c) sum[c] = static_cast<double>(g.row(rows[0])[c]);
  for (int64_t i = 1; i < count; ++i) {
    add_to(sum, g.row(rows[i]), g.columns);
  }
  return square(sum, g.columns);
}

std::vector<int64_t> ids_of(const char* op, const Tensor& ids, const Tensor& g) {
  STD_TORCH_CHECK(ids.dim() == 1 && g.dim() == 2 && ids.size(0) == g.size(0), op, ": ids must be [N] and g [N, d]");
  const auto type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ids must be int32 or int64");
  return integers(ids);
}

Tensor embedding_norm(const Tensor& ids_in, const Tensor& g_in, const Tensor& offsets, std::optional<int64_t> padding) {
  const auto ids = ids_of("embedding_norm", ids_in, g_in);
  const auto bounds = bounds_of("embedding_norm", offsets, g_in.size(0));
  const int64_t units = bounds.size() - 1;
  Tensor out = torch::stable::new_empty(g_in, {units}, ScalarType::Double);
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  const Tensor dense = dense_rows(g_in, g_in.scalar_type());
  by_dtype("embedding_norm", g_in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> g = rows_of<T>(dense);
    over_tasks<Scratch>(units, [&](int64_t u, Scratch& s) {
      sort_rows(ids, bounds[u], bounds[u + 1], padding, s.order);
      s.alone.assign(bounds[u + 1] - bounds[u], false);
      double* sum = s.wide.get(g.columns);
      to[u] = best([&]() FASTCLIP_LAMBDA {
        double total = 0;
        for (size_t i = 0, j; i < s.order.size(); i = j) {
          for (j = i + 1; j < s.order.size() && ids[s.order[j]] == ids[s.order[i]];) ++j;
          if (j - i == 1)
            s.alone[s.order[i] - bounds[u]] = true;
          else
            total += run_square(g, &s.order[i], j - i, sum);
        }
        for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t)
          if (s.alone[t - bounds[u]]) total += square(g.row(t), g.columns);
        return total;
      });
    });
  });
  return out;
}

template <class T, class Out>
void add_rows(const Rows<T>& g, const std::vector<int64_t>& ids, const std::vector<double>& row_factors,
              const std::vector<int64_t>& order, Out* out, int64_t stride) {
  std::vector<int64_t> starts;
  for (size_t i = 0; i < order.size(); ++i)
    if (i == 0 || ids[order[i]] != ids[order[i - 1]]) starts.push_back(i);
  starts.push_back(order.size());
  torch::stable::parallel_for(0, starts.size() - 1, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = starts[first]; i < starts[last]; ++i) {
      const T* row = g.row(order[i]);
      Out* to = out + ids[order[i]] * stride;
      const Out factor = static_cast<Out>(row_factors[order[i]]);
      for (int64_t c = 0; c < g.columns; ++c) to[c] += factor * static_cast<Out>(row[c]);
    }
  });
}

void clipped_embedding(const Tensor& ids_in, const Tensor& g_in, const Tensor& offsets, const Tensor& factors_in,
                       const Tensor& out, std::optional<int64_t> padding) {
  const char* op = "clipped_embedding";
  const auto ids = ids_of(op, ids_in, g_in);
  const auto bounds = bounds_of(op, offsets, g_in.size(0));
  const auto factors = factors_of(op, factors_in, bounds.size() - 1);
  const bool wide = out.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || out.scalar_type() == ScalarType::Float, op, ": out must be fp32 or fp64");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == g_in.size(1) && (out.size(1) <= 1 || out.stride(1) == 1), op,
                  ": out must be [V, d] with dense rows");
  std::vector<double> row_factors(ids.size());
  for (size_t u = 0; u + 1 < bounds.size(); ++u)
    for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t) row_factors[t] = wide ? factors[u] : static_cast<float>(factors[u]);
  std::vector<int64_t> order;
  sort_rows(ids, 0, ids.size(), padding, order);
  // Rows of factor 0 are left out, so that their inf and NaN stay with them.
  order.erase(std::remove_if(order.begin(), order.end(), [&](int64_t t) { return row_factors[t] == 0; }), order.end());
  for (int64_t t : order)
    STD_TORCH_CHECK(0 <= ids[t] && ids[t] < out.size(0), op, ": id ", ids[t], " is not in [0, ", out.size(0), ")");
  const Tensor dense = dense_rows(g_in, g_in.scalar_type());
  by_dtype(op, g_in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> g = rows_of<T>(dense);
    if (wide)
      add_rows(g, ids, row_factors, order, static_cast<double*>(out.mutable_data_ptr()), out.stride(0));
    else
      add_rows(g, ids, row_factors, order, static_cast<float*>(out.mutable_data_ptr()), out.stride(0));
  });
}

constexpr int64_t kHeadRows = 64;

// sum_{s, t} z_s[id_t] (h_s . e_t) a unit, in fp64: the product of a few rows of h with all of e, times what ids pick of z.
Tensor tied_cross(const Tensor& h_in, const Tensor& z_in, const Tensor& head_offsets, const Tensor& ids_in, const Tensor& e_in,
                  const Tensor& offsets, std::optional<int64_t> padding) {
  const char* op = "tied_cross";
  STD_TORCH_CHECK(h_in.dim() == 2 && z_in.dim() == 2 && h_in.size(0) == z_in.size(0), op, ": h must be [S, d], z [S, V]");
  const auto ids = ids_of(op, ids_in, e_in);
  STD_TORCH_CHECK(e_in.size(1) == h_in.size(1), op, ": h and e must have the same columns");
  const auto head = bounds_of(op, head_offsets, h_in.size(0)), tail = bounds_of(op, offsets, e_in.size(0));
  STD_TORCH_CHECK(head.size() == tail.size(), op, ": head_offsets and offsets must have the same units");
  for (int64_t id : ids)
    STD_TORCH_CHECK((0 <= id && id < z_in.size(1)) || (padding && id == *padding), op, ": id ", id, " is not in [0, ",
                    z_in.size(1), ")");
  const int64_t units = head.size() - 1;
  const int d = h_in.size(1);
  Tensor out = torch::stable::new_empty(h_in, {units}, ScalarType::Double);
  std::vector<std::pair<int64_t, int64_t>> tasks;  // (unit, first row of the head)
  for (int64_t u = 0; u < units; ++u)
    for (int64_t s = head[u]; s < head[u + 1] && tail[u] < tail[u + 1]; s += kHeadRows) tasks.push_back({u, s});
  std::vector<double> parts(tasks.size());
  const ScalarType type = common(h_in.scalar_type(), e_in.scalar_type());
  const Tensor h_dense = dense_rows(h_in, type), e_dense = dense_rows(e_in, type);
  const Tensor z_dense = dense_rows(z_in, z_in.scalar_type());  // by far the largest of them: not in another dtype
  by_dtype(op, type, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> h = rows_of<T>(h_dense), e = rows_of<T>(e_dense);
    over_tasks<Scratch>(tasks.size(), [&](int64_t task, Scratch& s) {
      const auto [u, first] = tasks[task];
      const int m = std::min(kHeadRows, head[u + 1] - first);
      s.order.clear();
      for (int64_t t = tail[u]; t < tail[u + 1]; ++t)
        if (!padding || ids[t] != *padding) s.order.push_back(t);
      const int n = s.order.size();
      parts[task] = 0;
      if (n == 0 || d == 0) return;
      double *left = s.left.get(int64_t{m} * d), *right = s.right.get(int64_t{n} * d), *product = s.wide.get(int64_t{m} * n);
      for (int i = 0; i < m; ++i) std::copy(h.row(first + i), h.row(first + i) + d, left + int64_t{i} * d);
      for (int j = 0; j < n; ++j) std::copy(e.row(s.order[j]), e.row(s.order[j]) + d, right + int64_t{j} * d);
      const double one = 1, none = 0;
      dgemm_("T", "N", &n, &m, &d, &one, right, &d, left, &d, &none, product, &n);
      double total = 0;
      by_dtype(op, z_in.scalar_type(), [&](auto of_z) {
        const auto z = rows_of<decltype(of_z)>(z_dense);
        for (int i = 0; i < m; ++i)
          for (int j = 0; j < n; ++j) total += static_cast<double>(z.row(first + i)[ids[s.order[j]]]) * product[int64_t{i} * n + j];
      });
      parts[task] = total;
    });
  });
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  std::fill(to, to + units, 0.0);
  for (size_t i = 0; i < tasks.size(); ++i) to[tasks[i].first] += parts[i];
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("embedding_norm", TORCH_BOX(&embedding_norm));
  m.impl("clipped_embedding", TORCH_BOX(&clipped_embedding));
  m.impl("tied_cross", TORCH_BOX(&tied_cross));
}

}  // namespace fastclip
