// noise_adamw, noise_sgd: add_noise and the optimizer's update in one pass, over lists of parameters.
//
// All fp32, contiguous, each parameter's of one size. Per element: 8 bytes of keystream, the noisy gradient formed in fp64 and rounded once
// (the same bits as add_noise), written over the sum, and torch's own update of it in fp32. AdamW reads param, grad, m and v
// and writes them, 32 bytes; two passes would take 40.
#include <cmath>
#include <initializer_list>
#include <utility>
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

template <class Set, class Update>
FASTCLIP_INLINE void body(Set, const Noise& noise, const Update& by, float* param, float* grad, int64_t n, int64_t skip,
                          int64_t first, int64_t last) {
  Drawer<Set> drawer(noise);
  alignas(64) float noisy[kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    drawer.draw(tile);
    const int64_t start = tile * kTile - skip, begin = std::max<int64_t>(start, 0), count = std::min(start + kTile, n) - begin;
    drawer.noisy(begin - start, count, [&](int64_t i) FASTCLIP_LAMBDA { return static_cast<double>(grad[begin + i]); }, noisy);
    each(count, [&](int64_t i) FASTCLIP_LAMBDA {
      grad[begin + i] = noisy[i];
      param[begin + i] = by.update(begin + i, param[begin + i], noisy[i]);
    });
  }
}

using Tensors = std::vector<Tensor>;

// to: [k][param, grad, ...]. update(k): of tensor k.
template <class F>
void launch(const Tensors& params, const std::vector<Noise>& noise, const std::vector<std::vector<float*>>& to,
            const std::vector<int64_t>& skips, const F& update) {
  std::vector<int64_t> sizes;
  for (const Tensor& p : params) sizes.push_back(p.numel());
  over_tiles(sizes, skips, [&](size_t k, int64_t first, int64_t last) {
    const auto by = update(k);
    best([&](auto set) FASTCLIP_LAMBDA { body(set, noise[k], by, to[k][0], to[k][1], sizes[k], skips[k], first, last); });
  });
}

// Tensor k's buffers, [k][which], once it is clear that nothing else is meant and nothing overlaps.
std::vector<std::vector<float*>> buffers(const char* op, std::initializer_list<const Tensors*> lists) {
  const Tensors& params = **lists.begin();
  std::vector<std::vector<float*>> out(params.size());
  std::vector<std::pair<uintptr_t, uintptr_t>> taken;
  for (const Tensors* list : lists) {
    STD_TORCH_CHECK(list->size() == params.size(), op, ": params, grads and state must be lists of one length");
    for (size_t k = 0; k < list->size(); ++k) {
      const Tensor& x = (*list)[k];
      const int64_t n = params[k].numel();
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == n, op,
                      ": param, grad and state must be contiguous fp32 of one size");
      auto* data = static_cast<float*>(x.mutable_data_ptr());
      out[k].push_back(data);
      if (n) taken.push_back({reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data + n)});
    }
  }
  std::sort(taken.begin(), taken.end());
  for (size_t i = 1; i < taken.size(); ++i)
    STD_TORCH_CHECK(taken[i - 1].second <= taken[i].first, op, ": params, grads or state share memory");
  return out;
}

// What tensor k draws, for all of them before any is written.
std::vector<Noise> noises(const char* op, const Tensors& params, const Tensor& key, int64_t nonce, const std::vector<int64_t>& blocks,
                          const std::vector<int64_t>& skips, double std, double scale) {
  const size_t count = params.size();
  STD_TORCH_CHECK(blocks.size() == count && skips.size() == count, op, ": one block and one skip for each parameter");
  std::vector<Noise> out;
  for (size_t k = 0; k < count; ++k) out.push_back(noise_of(key, nonce, blocks[k], skips[k], params[k].numel(), std, scale));
  return out;
}

void noise_adamw(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, double std, double scale, Tensor key,
                 int64_t nonce, std::vector<int64_t> blocks, std::vector<int64_t> skips, double lr, double beta1, double beta2,
                 double eps, double weight_decay, std::vector<int64_t> steps) {
  const char* op = "noise_adamw";
  STD_TORCH_CHECK(steps.size() == params.size(), op, ": one step for each parameter");
  for (int64_t step : steps) STD_TORCH_CHECK(step >= 1, op, ": step counts from 1, got ", step);
  const auto to = buffers(op, {&params, &grads, &exp_avgs, &exp_avg_sqs});
  const auto noise = noises(op, params, key, nonce, blocks, skips, std, scale);
  launch(params, noise, to, skips, [&](size_t k) {
    return AdamW{static_cast<float>(1 - lr * weight_decay),
                 static_cast<float>(1 - beta1),
                 static_cast<float>(beta2),
                 static_cast<float>(1 - beta2),
                 static_cast<float>(std::sqrt(1 - std::pow(beta2, steps[k]))),
                 static_cast<float>(eps),
                 static_cast<float>(lr / (1 - std::pow(beta1, steps[k]))),
                 to[k][2],
                 to[k][3]};
  });
}

void noise_sgd(Tensors params, Tensors grads, Tensors momentum_buffers, double std, double scale, Tensor key, int64_t nonce,
               std::vector<int64_t> blocks, std::vector<int64_t> skips, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool first) {
  const char* op = "noise_sgd";
  STD_TORCH_CHECK(momentum_buffers.size() == (momentum != 0 ? params.size() : 0), op,
                  ": momentum needs a buffer for each parameter, and only momentum does");
  const auto to = momentum != 0 ? buffers(op, {&params, &grads, &momentum_buffers}) : buffers(op, {&params, &grads});
  const auto noise = noises(op, params, key, nonce, blocks, skips, std, scale);
  const float rate = lr, decay = weight_decay;
  if (momentum != 0)
    launch(params, noise, to, skips, [&](size_t k) {
      return Momentum{rate, decay, float(momentum), float(1 - dampening), nesterov, first, to[k][2]};
    });
  else
    launch(params, noise, to, skips, [&](size_t) { return Sgd{rate, decay}; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("noise_adamw", TORCH_BOX(&noise_adamw));
  m.impl("noise_sgd", TORCH_BOX(&noise_sgd));
}

}  // namespace fastclip
