// box_muller: the normals of given words, [n, 8] int64 to [n, 8] fp64. Nothing draws with it: tests feed it extreme words.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../random/normals.h"
#include "dispatch.h"

namespace fastclip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

FASTCLIP_INLINE void body(const uint64_t* words, double* out, int64_t blocks) {
  for (int64_t first = 0; first < blocks; first += 16) {
    const int64_t count = std::min<int64_t>(16, blocks - first);
    u32x16 lanes[16] = {};
    for (int64_t b = 0; b < count; ++b)
      for (int i = 0; i < 8; ++i) {
        const uint64_t word = words[8 * (first + b) + i];
        lanes[2 * i][b] = static_cast<uint32_t>(word);
        lanes[2 * i + 1][b] = static_cast<uint32_t>(word >> 32);
      }
    alignas(64) double z[128];
    normals(lanes, z);
    std::copy(z, z + 8 * count, out + 8 * first);
  }
}

FASTCLIP_AVX512 void run_avx512(const uint64_t* words, double* out, int64_t blocks) { body(words, out, blocks); }
FASTCLIP_AVX2 void run_avx2(const uint64_t* words, double* out, int64_t blocks) { body(words, out, blocks); }
void run_default(const uint64_t* words, double* out, int64_t blocks) { body(words, out, blocks); }

Tensor box_muller(const Tensor& words) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Long && words.dim() == 2 && words.size(1) == 8 && words.is_contiguous(),
                  "box_muller: words must be contiguous int64 [n, 8]");
  Tensor out = torch::stable::new_empty(words, {words.size(0), 8}, ScalarType::Double);
  const Capability chosen = capability();
  const auto run = chosen == Capability::kAvx512 ? run_avx512 : chosen == Capability::kAvx2 ? run_avx2 : run_default;
  run(static_cast<const uint64_t*>(words.const_data_ptr()), static_cast<double*>(out.mutable_data_ptr()), words.size(0));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("box_muller", TORCH_BOX(&box_muller)); }

}  // namespace fastclip
