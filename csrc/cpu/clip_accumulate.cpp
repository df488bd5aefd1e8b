// clipped_sum, clip_accumulate_noise: out from per-unit gradients that stand there whole.
//
// grads: [U, P], factors: [U]. clipped_sum: out += sum_u factors[u] grads[u], in out's dtype. clip_accumulate_noise: out =
// round(sum_u factors[u] grads[u] + std z), formed in fp64 and rounded once. One pass over grads, in columns that stay in the
// first cache; units of factor 0 are left out, so that their inf and NaN stay with them.
#include "noise.h"
#include "rows.h"

namespace fastclip {
namespace {

template <class T>
FASTCLIP_INLINE void add(const Rows<T>& grads, const std::vector<double>& factors, int64_t column, int64_t count, double* sums) {
  for (int64_t c = 0; c < count; ++c) sums[c] = 0;
  for (size_t u = 0; u < factors.size(); ++u) {
    if (factors[u] == 0) continue;
    const T* row = grads.row(u) + column;
    each(count, [&](int64_t c) FASTCLIP_LAMBDA { sums[c] += factors[u] * static_cast<double>(row[c]); });
  }
}

// Tiles [first, last): the sum of kTile columns, and noise where there is any.
template <class Set, class T, class Out>
FASTCLIP_INLINE void body(Set, const Noise* noise, const Rows<T>& grads, const std::vector<double>& factors, Out* out, int64_t skip,
                          int64_t first, int64_t last) {
  Drawer<Set> drawer(noise ? *noise : Noise{});
  alignas(64) double sums[kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t begin = std::max<int64_t>(tile * kTile - skip, 0), stop = std::min((tile + 1) * kTile - skip, grads.columns);
    add(grads, factors, begin, stop - begin, sums);
    if (noise) {
      drawer.draw(tile);
      const int64_t own = begin - (tile * kTile - skip);
      drawer.noisy(own, stop - begin, [&](int64_t i) FASTCLIP_LAMBDA { return sums[i]; }, out + begin);
    } else {
      for (int64_t i = begin; i < stop; ++i) out[i] = static_cast<Out>(static_cast<double>(out[i]) + sums[i - begin]);
    }
  }
}

template <class Out>
void launch(const char* op, const Noise* noise, const Tensor& grads_in, const std::vector<double>& factors, const Tensor& out,
            int64_t skip) {
  const Tensor dense = torch::stable::contiguous(grads_in);
  by_dtype(op, grads_in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> grads{static_cast<const T*>(dense.const_data_ptr()), out.numel(), out.numel()};
    Out* to = static_cast<Out*>(out.mutable_data_ptr());
    over_tiles(out.numel(), skip, [&](int64_t first, int64_t last) {
      best([&](auto set) FASTCLIP_LAMBDA { body(set, noise, grads, factors, to, skip, first, last); });
    });
  });
}

std::vector<double> checked(const char* op, const Tensor& grads, const Tensor& factors, const Tensor& out) {
  STD_TORCH_CHECK(grads.dim() >= 1 && grads.numel() == grads.size(0) * out.numel(), op, ": grads must be [U, *out.shape]");
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  return factors_of(op, factors, grads.size(0));
}

void clipped_sum(const Tensor& grads, const Tensor& factors_in, const Tensor& out) {
  const auto factors = checked("clipped_sum", grads, factors_in, out);
  if (out.scalar_type() == ScalarType::Float)
    launch<float>("clipped_sum", nullptr, grads, factors, out, 0);
  else if (out.scalar_type() == ScalarType::Double)
    launch<double>("clipped_sum", nullptr, grads, factors, out, 0);
  else
    STD_TORCH_CHECK(false, "clipped_sum: out must be fp32 or fp64");
}

void clip_accumulate_noise(std::vector<Tensor> grads, Tensor factors_in, std::vector<Tensor> outs, double std, double scale,
                           Tensor key, int64_t nonce, std::vector<int64_t> blocks, std::vector<int64_t> skips) {
  const char* op = "clip_accumulate_noise";
  STD_TORCH_CHECK(scale == 1, op, ": scale must be 1, got ", scale);
  const size_t count = grads.size();
  STD_TORCH_CHECK(outs.size() == count && blocks.size() == count && skips.size() == count, op,
                  ": one out, one block and one skip for each of grad_samples");
  std::vector<double> factors;
  std::vector<Noise> noise;
  for (size_t k = 0; k < count; ++k) {
    factors = checked(op, grads[k], factors_in, outs[k]);
    const auto type = outs[k].scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                    ": out must be fp32, bf16 or fp16");
    noise.push_back(noise_of(key, nonce, blocks[k], skips[k], outs[k].numel(), std, scale));
  }
  for (size_t k = 0; k < count; ++k) {
    if (outs[k].scalar_type() == ScalarType::Float)
      launch<float>(op, &noise[k], grads[k], factors, outs[k], skips[k]);
    else if (outs[k].scalar_type() == ScalarType::BFloat16)
      launch<c10::BFloat16>(op, &noise[k], grads[k], factors, outs[k], skips[k]);
    else
      launch<c10::Half>(op, &noise[k], grads[k], factors, outs[k], skips[k]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("clipped_sum", TORCH_BOX(&clipped_sum));
  m.impl("clip_accumulate_noise", TORCH_BOX(&clip_accumulate_noise));
}

}  // namespace fastclip
