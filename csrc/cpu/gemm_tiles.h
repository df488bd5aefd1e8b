// c [m, n] = alpha x y (+ c) for bf16 x and y, summed in fp32, by MKL on Intel's processors that multiply tiles of bf16 (AMX).
//
// Products of two bf16 are exact in fp32, and sums round as in any order of fp32 additions: the bounds of gemm_packed.h hold.
// Subnormal numbers count as zeros, as in gemm_bf16.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>

#include "gemm_packed.h"

#if defined(__x86_64__)
#include <cpuid.h>

// Not in every build of torch.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int x_turned, int y_turned, int m, int n, int k, float alpha,
                                                             const void* x, int ldx, const void* y, int ldy, float beta, float* c,
                                                             int ldc);

namespace fastclip::tiles {

using Half = c10::BFloat16;

inline bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16);
}

inline bool faster() {
  static const bool found = capability() == Capability::kAvx512 && __builtin_cpu_is("intel") && has_tiles() && cblas_gemm_bf16bf16f32;
  return found;
}

// Operands as MKL takes them: no conversion, no factors.
inline void multiply(int64_t m, int64_t n, int64_t k, const View<Half>& x, const View<Half>& y, float alpha, bool accumulate, float* c,
                     int64_t stride) {
  constexpr int row_major = 101, plain = 111, turned = 112;
  const bool x_turned = x.column != 1 || (x.row == 1 && k > 1), y_turned = y.column != 1 || (y.row == 1 && n > 1);
  const int64_t ldx = std::max(x_turned ? x.column : x.row, x_turned ? m : k);
  const int64_t ldy = std::max(y_turned ? y.column : y.row, y_turned ? k : n);
  cblas_gemm_bf16bf16f32(row_major, x_turned ? turned : plain, y_turned ? turned : plain, m, n, k, alpha, x.data, ldx, y.data, ldy,
                         accumulate ? 1.0f : 0.0f, c, stride);
}

}  // namespace fastclip::tiles
#endif
