// clipped_gemm: out (+)= sum_u factors[u] g_u^T a_u.
//
// a: [N, d], g: [N, p], offsets: [U + 1], factors: [U], out: fp32 or fp64 [p, d]. The factor multiplies rows in out's dtype
// while a slice of the longer side is packed for the BLAS; each slice of out is one product of its own, on one thread, so that
// the number of threads shows nowhere. Rows of factor 0 are left out, so that their inf and NaN stay with them.
#include "rows.h"

namespace fastclip {
namespace {

// Columns of the longer side a task takes: few enough that two threads are both busy to the end.
constexpr int64_t kLeast = 96, kMost = 512, kTasks = 8;

struct Scratch {
  std::vector<float> narrow;
  std::vector<double> wide;
  std::vector<float>& of(float) { return narrow; }
  std::vector<double>& of(double) { return wide; }
};

// c [n, m] column-major of leading dimension ldc = x y^T + keep c; x: [n, k] and y: [m, k] column-major.
void gemm(int n, int m, int k, const float* x, int ldx, const float* y, int ldy, float keep, float* c, int ldc) {
  const float one = 1;
  sgemm_("N", "T", &n, &m, &k, &one, x, &ldx, y, &ldy, &keep, c, &ldc);
}
void gemm(int n, int m, int k, const double* x, int ldx, const double* y, int ldy, double keep, double* c, int ldc) {
  const double one = 1;
  dgemm_("N", "T", &n, &m, &k, &one, x, &ldx, y, &ldy, &keep, c, &ldc);
}

template <class T, class Out>
void pack(const Rows<T>& x, const std::vector<int64_t>& kept, const Out* factors, int64_t column, int64_t count, Out* to) {
  for (size_t i = 0; i < kept.size(); ++i) {
    const T* from = x.row(kept[i]) + column;
    const Out factor = factors ? factors[i] : Out{1};
    for (int64_t c = 0; c < count; ++c) *to++ = factor * static_cast<Out>(from[c]);
  }
}

template <class Out, class A, class G>
void products(const Rows<A>& a, const Rows<G>& g, const std::vector<int64_t>& kept, const std::vector<Out>& factors, Out keep,
              Out* out, int64_t stride) {
  const bool along_p = g.columns >= a.columns;
  const int64_t longer = std::max(a.columns, g.columns), shorter = std::min(a.columns, g.columns), k = kept.size();
  // The shorter side is used whole by every task: as it is where the BLAS can read it, else copied once.
  std::vector<Out> copy;
  const Out* whole = nullptr;
  int64_t whole_stride = shorter;
  const bool all = k && kept.back() == k - 1;  // no row left out
  const auto side = [&](const auto& x) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*x.data)>>;
    if constexpr (std::is_same_v<T, Out>) {
      if (all) {
        whole = x.data, whole_stride = x.stride;
        return;
      }
    }
    copy.resize(k * shorter);
    pack<T, Out>(x, kept, nullptr, 0, shorter, copy.data());
    whole = copy.data();
  };
  along_p ? side(a) : side(g);
  const int64_t step = std::clamp((longer / kTasks + 15) / 16 * 16, kLeast, kMost);
  over_tasks<Scratch>((longer + step - 1) / step, [&](int64_t task, Scratch& s) {
    const int64_t column = task * step, count = std::min(step, longer - column);
    auto& packed = s.of(Out{});
    packed.resize(std::max<size_t>(packed.size(), k * count));
    if (along_p) {
      pack(g, kept, factors.data(), column, count, packed.data());
      gemm(a.columns, count, k, whole, whole_stride, packed.data(), count, keep, out + column * stride, stride);
    } else {
      pack(a, kept, factors.data(), column, count, packed.data());
      gemm(count, g.columns, k, packed.data(), count, whole, whole_stride, keep, out + column, stride);
    }
  });
}

template <class Out>
void launch(const Tensor& a_in, const Tensor& g_in, const std::vector<int64_t>& bounds, const std::vector<double>& by_unit,
            const Tensor& out, bool accumulate) {
  std::vector<int64_t> kept;
  std::vector<Out> factors;
  for (size_t u = 0; u + 1 < bounds.size(); ++u)
    for (int64_t t = bounds[u]; t < bounds[u + 1] && static_cast<Out>(by_unit[u]) != 0; ++t)
      kept.push_back(t), factors.push_back(static_cast<Out>(by_unit[u]));
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t rows = out.size(0), columns = out.size(1), stride = rows > 1 ? out.stride(0) : columns;
  if (kept.empty()) {
    for (int64_t r = 0; r < rows && !accumulate; ++r) std::fill(to + r * stride, to + r * stride + columns, Out{0});
    return;
  }
  const Tensor a_dense = dense_rows(a_in, a_in.scalar_type()), g_dense = dense_rows(g_in, g_in.scalar_type());
  by_dtype("clipped_gemm", a_in.scalar_type(), [&](auto a_zero) {
    by_dtype("clipped_gemm", g_in.scalar_type(), [&](auto g_zero) {
      products<Out>(rows_of<decltype(a_zero)>(a_dense), rows_of<decltype(g_zero)>(g_dense), kept, factors,
                    accumulate ? Out{1} : Out{0}, to, stride);
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
