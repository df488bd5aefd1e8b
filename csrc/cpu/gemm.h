// c [m, n] (+)= x y, on one thread: by the BLAS that torch carries, or by the kernels of gemm_packed.h and gemm_bf16.h where those
// are faster. Two bf16 operands stay bf16 where the processor multiplies them as they are.
#pragma once

#include "gemm_bf16.h"
#include "gemm_packed.h"
#include "gemm_tiles.h"

extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
            const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace fastclip {

// Two bf16 operands as they are, into fp32; alpha multiplies the sums.
namespace halves {

using Half = c10::BFloat16;

inline bool faster() {
#if defined(__x86_64__)
  return tiles::faster() || pairs::faster();
#else
  return false;
#endif
}

// For operands that readable() allows, where faster() says so.
inline void multiply(Packs<float>& packs, int64_t m, int64_t n, int64_t k, const View<Half>& x, const View<Half>& y, float alpha,
                     bool accumulate, float* c, int64_t stride, bool upper) {
#if defined(__x86_64__)
#if FASTCLIP_HAS_TILES
  if (tiles::faster()) return tiles::multiply(packs, m, n, k, x, y, alpha, accumulate, c, stride, upper);
#endif
  pairs::multiply(packs, m, n, k, x, y, alpha, accumulate, c, stride, upper);
#endif
}

inline bool readable(const View<Half>& x, const View<Half>& y, int64_t k) {
#if defined(__x86_64__)
  return tiles::faster() || (pairs::readable(x, k) && pairs::readable(y.transposed(), k));
#else
  return false;
#endif
}

}  // namespace halves

namespace blas {

inline void call(const char* x_turned, const char* y_turned, int m, int n, int k, const float* x, int ldx, const float* y, int ldy,
                 float keep, float* c, int ldc) {
  const float one = 1;
  sgemm_(y_turned, x_turned, &n, &m, &k, &one, y, &ldy, x, &ldx, &keep, c, &ldc);
}
inline void call(const char* x_turned, const char* y_turned, int m, int n, int k, const double* x, int ldx, const double* y,
                 int ldy, double keep, double* c, int ldc) {
  const double one = 1;
  dgemm_(y_turned, x_turned, &n, &m, &k, &one, y, &ldy, x, &ldx, &keep, c, &ldc);
}

// Itself where the BLAS can read it, else a converted and scaled copy. x: [m, k], factors: [k].
template <class To, class X>
View<To> readable(const View<X>& x, int64_t m, int64_t k, const To* factors, Buffer<To>& into) {
  if constexpr (std::is_same_v<X, To>)
    if (!factors) return x;
  To* to = into.get(m * k);
  if (x.row == 1) {
    for (int64_t t = 0; t < k; ++t)
      for (int64_t i = 0; i < m; ++i)
        to[t * m + i] = (factors ? factors[t] : To{1}) * static_cast<To>(x.data[t * x.column + i]);
    return {to, 1, m};
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t t = 0; t < k; ++t)
      to[i * k + t] = (factors ? factors[t] : To{1}) * static_cast<To>(x.data[i * x.row + t]);
  return {to, k, 1};
}

}  // namespace blas

// c [m, n] = x y (+ c), row-major of this stride. x: element (i, t) of [m, k], y: (t, j) of [k, n]; x's is multiplied by
// factors[t], in To, if there are any. m, n and k below 2^31. upper: what lies below the diagonal may be left unwritten.
template <class To, class X, class Y>
void gemm(Packs<To>& packs, int64_t m, int64_t n, int64_t k, const View<X>& x, const View<Y>& y, const To* factors,
          bool accumulate, To* c, int64_t stride, bool upper = false) {
  if constexpr (std::is_same_v<X, c10::BFloat16> && std::is_same_v<Y, c10::BFloat16> && std::is_same_v<To, float>)
    if (!factors && halves::faster() && halves::readable(x, y, k))
      return halves::multiply(packs, m, n, k, x, y, 1.0f, accumulate, c, stride, upper);
#if defined(__x86_64__)
  if (packed::faster()) return packed::multiply(packs, m, n, k, x, y, factors, accumulate, c, stride, upper);
#endif
  const View<To> left = blas::readable(x, m, k, factors, packs.x);
  const View<To> right = blas::readable(y.transposed(), n, k, static_cast<const To*>(nullptr), packs.y);  // [n, k]
  // A single row may have any distance to the next, and the BLAS refuses one below the number of columns.
  const bool x_turned = left.column != 1 || (left.row == 1 && k > 1), y_turned = right.column == 1 && !(right.row == 1 && k > 1);
  const int64_t ldx = std::max(x_turned ? left.column : left.row, x_turned ? m : k);
  const int64_t ldy = std::max(y_turned ? right.row : right.column, y_turned ? k : n);
  blas::call(x_turned ? "T" : "N", y_turned ? "T" : "N", m, n, k, left.data, ldx, right.data, ldy, accumulate ? To{1} : To{0}, c,
             stride);
}

}  // namespace fastclip
