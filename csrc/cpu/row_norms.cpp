// row_norm_products: sum_t |a_t||g_t| a unit, the second of linear_norms' parts alone.
//
// a: [N, d], g: [N, p], offsets: [U + 1] -> fp64 [U].
#include "row_norms.h"

namespace fastclip {
namespace {

Tensor row_norm_products(const Tensor& a, const Tensor& g, const Tensor& offsets) {
  const char* op = "row_norm_products";
  STD_TORCH_CHECK(a.dim() == 2 && g.dim() == 2 && a.size(0) == g.size(0), op, ": a must be [N, d] and g [N, p] with the same N");
  const auto bounds = bounds_of(op, offsets, a.size(0));
  const int64_t units = bounds.size() - 1, rows = bounds.back();
  const auto norms = [&](const Tensor& x) {
    std::vector<double> out(rows);
    const Tensor dense = dense_rows(x, x.scalar_type());
    by_dtype(op, x.scalar_type(), [&](auto zero) {
      const auto all = rows_of<decltype(zero)>(dense);
      torch::stable::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) { row_norms(all, first, last, out.data()); });
    });
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

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("row_norm_products", TORCH_BOX(&row_norm_products)); }

}  // namespace fastclip
