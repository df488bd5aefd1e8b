// add_noise: out = round((sum + std z) scale), z from ChaCha20 and Box-Muller, in one pass.
//
// sum: [n] fp32 or fp64, out: [n] fp32, bf16 or fp16, both contiguous. Per element 8 bytes of keystream, fp64 arithmetic and
// one rounding; reads 4 and writes 4 bytes. Element i belongs to block `block + (skip + i) / 8` whatever the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../random/chacha20.h"
#include "../random/normals.h"
#include "dispatch.h"

namespace fastclip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 128;  // elements of 16 blocks
constexpr int64_t kGrain = 256;  // tiles

struct Noise {
  Stream stream;
  uint64_t block;
  double std, scale;
};

// fp64 to 16 bits by way of fp32 would round twice. Rounded to odd first (towards zero, last bit set if anything was
// lost), the second rounding is right (Boldo and Melquiond, IEEE Trans. Comp. 2008).
FASTCLIP_INLINE float round_to_odd(double x) {
  float nearest = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &nearest, 4);
  bits -= std::abs(static_cast<double>(nearest)) > std::abs(x);
  bits |= static_cast<double>(nearest) != x;
  std::memcpy(&nearest, &bits, 4);
  return nearest;
}

template <class Out>
FASTCLIP_INLINE Out round_once(double x) {
  if constexpr (std::is_same_v<Out, float>)
    return static_cast<float>(x);
  else
    return static_cast<Out>(round_to_odd(x));
}

// Tiles [first, last) of a vector whose elements 0 to n - 1 stand `skip` elements after the first tile's start.
template <class In, class Out>
FASTCLIP_INLINE void body(const Noise& noise, const In* sum, Out* out, int64_t n, int64_t skip, int64_t first, int64_t last) {
  alignas(64) double z[kTile];
  u32x16 words[16];
  for (int64_t tile = first; tile < last; ++tile) {
    chacha20(noise.stream, noise.block + 16 * tile, words);
    normals(words, z);
    const int64_t start = tile * kTile - skip, stop = std::min(start + kTile, n);
    for (int64_t i = std::max<int64_t>(start, 0); i < stop; ++i)
      out[i] = round_once<Out>((static_cast<double>(sum[i]) + noise.std * z[i - start]) * noise.scale);
  }
}

template <class In, class Out>
FASTCLIP_AVX512 void run_avx512(const Noise& noise, const In* sum, Out* out, int64_t n, int64_t skip, int64_t i, int64_t j) {
  body(noise, sum, out, n, skip, i, j);
}

template <class In, class Out>
FASTCLIP_AVX2 void run_avx2(const Noise& noise, const In* sum, Out* out, int64_t n, int64_t skip, int64_t i, int64_t j) {
  body(noise, sum, out, n, skip, i, j);
}

template <class In, class Out>
void run_default(const Noise& noise, const In* sum, Out* out, int64_t n, int64_t skip, int64_t i, int64_t j) {
  body(noise, sum, out, n, skip, i, j);
}

template <class In, class Out>
void launch(const Noise& noise, const Tensor& sum, Tensor& out, int64_t skip) {
  static const Capability chosen = capability();
  const auto run = chosen == Capability::kAvx512 ? run_avx512<In, Out>
                   : chosen == Capability::kAvx2 ? run_avx2<In, Out>
                                                 : run_default<In, Out>;
  const int64_t n = sum.numel();
  const auto* from = static_cast<const In*>(sum.const_data_ptr());
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, (skip + n + kTile - 1) / kTile, kGrain, [&](int64_t first, int64_t last) {
    run(noise, from, to, n, skip, first, last);
  });
}

template <class In>
void launch_to(const Noise& noise, const Tensor& sum, Tensor& out, int64_t skip) {
  if (out.scalar_type() == ScalarType::Float)
    launch<In, float>(noise, sum, out, skip);
  else if (out.scalar_type() == ScalarType::BFloat16)
    launch<In, c10::BFloat16>(noise, sum, out, skip);
  else
    launch<In, c10::Half>(noise, sum, out, skip);
}

void add_noise(const Tensor& sum, Tensor& out, double std, double scale, const Tensor& key, int64_t nonce, int64_t block,
               int64_t skip) {
  const auto in = sum.scalar_type(), to = out.scalar_type();
  STD_TORCH_CHECK(in == ScalarType::Float || in == ScalarType::Double, "add_noise: grad_sum must be fp32 or fp64");
  STD_TORCH_CHECK(to == ScalarType::Float || to == ScalarType::BFloat16 || to == ScalarType::Half,
                  "add_noise: out must be fp32, bf16 or fp16");
  STD_TORCH_CHECK(sum.is_contiguous() && out.is_contiguous() && sum.numel() == out.numel(),
                  "add_noise: grad_sum and out must be contiguous and of one size");
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Byte && key.is_contiguous() && key.numel() == 32,
                  "add_noise: key must be 32 contiguous bytes");
  STD_TORCH_CHECK(0 <= skip && skip < 8, "add_noise: skip must be in [0, 8), got ", skip);
  Noise noise{{}, static_cast<uint64_t>(block), std, scale};
  std::memcpy(noise.stream.key, key.const_data_ptr(), 32);
  noise.stream.nonce = static_cast<uint64_t>(nonce);
  if (in == ScalarType::Float)
    launch_to<float>(noise, sum, out, skip);
  else
    launch_to<double>(noise, sum, out, skip);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("add_noise", TORCH_BOX(&add_noise)); }

}  // namespace fastclip
