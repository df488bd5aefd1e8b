// noise_adamw, noise_sgd: add_noise and the optimizer's update in one pass.
//
// All fp32, contiguous, of one size. Per element: 8 bytes of keystream, the noisy gradient formed in fp64 and rounded once
// (the same bits as add_noise), written over the sum, and torch's own update of it in fp32. AdamW reads param, grad, m and v
// and writes them, 32 bytes; two passes would take 40.
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "noise.h"

namespace fastclip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct AdamW {
  float keep, beta1_rest, beta2, beta2_rest, root_correction, eps, rate;
  float *m, *v;

  FASTCLIP_INLINE float update(int64_t i, float p, float g) const {
    p *= keep;
    const float mean = m[i] + beta1_rest * (g - m[i]), square = v[i] * beta2 + beta2_rest * g * g;
    m[i] = mean;
    v[i] = square;
    return p - rate * mean / (__builtin_sqrtf(square) / root_correction + eps);
  }
};

struct Sgd {
  float rate, decay;
  FASTCLIP_INLINE float update(int64_t, float p, float g) const { return p - rate * (g + decay * p); }
};

// first: the buffer holds nothing yet and becomes the gradient.
struct Momentum {
  float rate, decay, momentum, rest;
  bool nesterov, first;
  float* buffer;

  FASTCLIP_INLINE float update(int64_t i, float p, float g) const {
    g += decay * p;
    const float b = first ? g : buffer[i] * momentum + rest * g;
    buffer[i] = b;
    return p - rate * (nesterov ? g + momentum * b : b);
  }
};

template <class Update>
FASTCLIP_INLINE void body(const Noise& noise, const Update& by, float* param, float* grad, int64_t n, int64_t skip,
                          int64_t first, int64_t last) {
  alignas(64) double z[kTile];
  alignas(64) float noisy[kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    draw(noise, tile, z);
    const int64_t begin = std::max<int64_t>(tile * kTile - skip, 0), stop = std::min((tile + 1) * kTile - skip, n);
    const double* own = z + (begin - (tile * kTile - skip));
    for (int64_t i = begin; i < stop; ++i)
      noisy[i - begin] = static_cast<float>((static_cast<double>(grad[i]) + noise.std * own[i - begin]) * noise.scale);
    // Nothing overlaps (checked), which the compiler cannot know.
#pragma GCC ivdep
    for (int64_t i = begin; i < stop; ++i) {
      grad[i] = noisy[i - begin];
      param[i] = by.update(i, param[i], noisy[i - begin]);
    }
  }
}

template <class Update>
void launch(const Noise& noise, const Update& by, float* param, float* grad, int64_t n, int64_t skip) {
  over_tiles(n, skip, [&](int64_t first, int64_t last) {
    best([&]() FASTCLIP_LAMBDA { body(noise, by, param, grad, n, skip, first, last); });
  });
}

// Their memory, once it is clear that nothing else is meant and nothing overlaps.
std::vector<float*> buffers(const char* op, std::initializer_list<const Tensor*> tensors) {
  std::vector<float*> out;
  const int64_t n = (*tensors.begin())->numel();
  for (const Tensor* x : tensors) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == n, op,
                    ": param, grad and state must be contiguous fp32 of one size");
    out.push_back(static_cast<float*>(x->mutable_data_ptr()));
  }
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      STD_TORCH_CHECK(n == 0 || out[i] + n <= out[j] || out[j] + n <= out[i], op, ": param, grad and state share memory");
  return out;
}

void noise_adamw(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, double std,
                 double scale, const Tensor& key, int64_t nonce, int64_t block, int64_t skip, double lr, double beta1,
                 double beta2, double eps, double weight_decay, int64_t step) {
  STD_TORCH_CHECK(step >= 1, "noise_adamw: step counts from 1, got ", step);
  const auto to = buffers("noise_adamw", {&param, &grad, &exp_avg, &exp_avg_sq});
  const Noise noise = noise_of(key, nonce, block, skip, std, scale);
  const AdamW by{static_cast<float>(1 - lr * weight_decay),
                 static_cast<float>(1 - beta1),
                 static_cast<float>(beta2),
                 static_cast<float>(1 - beta2),
                 static_cast<float>(std::sqrt(1 - std::pow(beta2, step))),
                 static_cast<float>(eps),
                 static_cast<float>(lr / (1 - std::pow(beta1, step))),
                 to[2],
                 to[3]};
  launch(noise, by, to[0], to[1], param.numel(), skip);
}

void noise_sgd(const Tensor& param, const Tensor& grad, const std::optional<Tensor>& buffer, double std, double scale,
               const Tensor& key, int64_t nonce, int64_t block, int64_t skip, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool first) {
  const auto to =
      buffer ? buffers("noise_sgd", {&param, &grad, &*buffer}) : buffers("noise_sgd", {&param, &grad});
  STD_TORCH_CHECK(buffer.has_value() == (momentum != 0), "noise_sgd: momentum needs a buffer, and only momentum does");
  const Noise noise = noise_of(key, nonce, block, skip, std, scale);
  const float rate = lr, decay = weight_decay;
  if (buffer)
    launch(noise, Momentum{rate, decay, float(momentum), float(1 - dampening), nesterov, first, to[2]}, to[0], to[1],
           param.numel(), skip);
  else
    launch(noise, Sgd{rate, decay}, to[0], to[1], param.numel(), skip);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("noise_adamw", TORCH_BOX(&noise_adamw));
  m.impl("noise_sgd", TORCH_BOX(&noise_sgd));
}

}  // namespace fastclip
