// add_noise: out = round((sum + std z) scale), z from ChaCha20 and Box-Muller, in one pass.
//
// sum: [n] fp32 or fp64, out: [n] fp32, bf16 or fp16, both contiguous. Per element 8 bytes of keystream, fp64 arithmetic and
// one rounding; reads 4 and writes 4 bytes. Element i belongs to block `block + (skip + i) / 8` whatever the threads.
#include "noise.h"

namespace fastclip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tiles [first, last) of a vector whose elements 0 to n - 1 stand `skip` elements after the first tile's start.
template <class Set, class In, class Out>
FASTCLIP_INLINE void body(Set, const Noise& noise, const In* sum, Out* out, int64_t n, int64_t skip, int64_t first, int64_t last) {
  Drawer<Set> drawer(noise);
  alignas(64) Out noisy[kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    drawer.draw(tile);
    const int64_t start = tile * kTile - skip, begin = std::max<int64_t>(start, 0), count = std::min(start + kTile, n) - begin;
    drawer.noisy(begin - start, count, [&](int64_t i) FASTCLIP_LAMBDA { return static_cast<double>(sum[begin + i]); }, noisy);
    std::copy_n(noisy, count, out + begin);  // out may be sum
  }
}

template <class In, class Out>
void launch(const Noise& noise, const Tensor& sum, Tensor& out, int64_t skip) {
  const int64_t n = sum.numel();
  const auto* from = static_cast<const In*>(sum.const_data_ptr());
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  over_tiles(n, skip, [&](int64_t first, int64_t last) {
    best([&](auto set) FASTCLIP_LAMBDA { body(set, noise, from, to, n, skip, first, last); });
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
  const auto from = reinterpret_cast<uintptr_t>(sum.const_data_ptr()), into = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const bool apart = from + sum.numel() * sum.element_size() <= into || into + out.numel() * out.element_size() <= from;
  STD_TORCH_CHECK(apart || (from == into && in == to), "add_noise: out must be grad_sum itself or share no memory with it");
  const Noise noise = noise_of(key, nonce, block, skip, sum.numel(), std, scale);
  if (in == ScalarType::Float)
    launch_to<float>(noise, sum, out, skip);
  else
    launch_to<double>(noise, sum, out, skip);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("add_noise", TORCH_BOX(&add_noise)); }

}  // namespace fastclip
