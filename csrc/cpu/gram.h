// Products of a unit's rows with each other with AVX-512, in fp32: rows are packed once, in panels of 32, and both operands are
// read there; what lies below the diagonal is left out.
#pragma once

#include "gemm_packed.h"

namespace fastclip::gram {

constexpr int64_t kPanel = packed::kWidth<float>, kDepth = 128;  // rows; columns of a panel

// Rows of sums that are a whole number of panels.
inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

#if defined(__x86_64__)
// Asks for columns of rows 0:n before they are packed, a few lines at a time: rows of a wide layer lie pages apart, where the
// processor foresees nothing.
template <class X>
class Ahead {
 public:
  Ahead(const View<X>& x, int64_t n, int64_t columns, int64_t calls)
      : x(x), lines((columns * sizeof(X) + 63) / 64), left(n * lines), each(left / calls + 1) {}
  FASTCLIP_KERNEL void some() {
    for (int64_t i = 0; i < each && left > 0; ++i) {
      --left;
      _mm_prefetch(reinterpret_cast<const char*>(x.data + left / lines * x.row) + left % lines * 64, _MM_HINT_T1);
    }
  }

 private:
  const View<X> x;
  const int64_t lines;
  int64_t left;
  const int64_t each;
};

// sums [padded(m), padded(n)] (+)= rows 0:m of x with its rows 0:n, over k columns: `columns` products in registers, then such
// blocks. m is n, or whole panels.
template <class X>
FASTCLIP_AVX512 void multiply(Packs<float>& packs, int64_t m, int64_t n, int64_t k, int64_t columns, const View<X>& x,
                              bool accumulate, float* sums) {
  const int64_t stride = padded(n), rows = padded(m);
  float* panels = packs.y.get(stride * std::min(k, kDepth));
  for (int64_t t = 0; t < k; t += kDepth) {
    const int64_t depth = std::min(kDepth, k - t);
    packed::pack<kPanel>(x.at(0, t), n, depth, static_cast<const float*>(nullptr), panels);
    Ahead<X> ahead(x.at(0, t + depth), n, std::min(kDepth, k - t - depth), rows / packed::kHeight * (stride / kPanel));
    for (int64_t q = 0; q < n; q += kPanel)
      for (int64_t p = 0; p < std::min(q + kPanel, rows); p += packed::kHeight) {
        ahead.some();
        const float *left = panels + p / kPanel * kPanel * depth + p % kPanel, *right = panels + q * depth;
        for (int64_t c = 0; c < depth; c += columns)
          packed::block(std::min(columns, depth - c), left + c * kPanel, kPanel, right + c * kPanel, kPanel,
                        accumulate || t + c > 0, sums + p * stride + q, stride);
      }
  }
}
#endif

inline bool faster() { return capability() == Capability::kAvx512; }

}  // namespace fastclip::gram
