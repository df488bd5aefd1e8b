// noise_adamw, noise_sgd: noise and the optimizer's update in one pass over a list of parameters.
//
//   g = round((grad + std z) scale), formed in fp64 and rounded to fp32 once, then torch's update with g in fp32
//
// All fp32 [n]; grad holds g afterwards. AdamW reads param, grad, m and v and writes them, 32 bytes an element; SGD moves 16,
// with momentum 24. The order of operations is that of csrc/cpu/noise_step.cpp, and nothing is contracted (-fmad=false): the
// same bits.
#pragma once

#include <cmath>

#include "noise_block.cuh"

namespace fastclip::cuda {

// An update sees one element of each array, x[0] the parameter and x[1] the noisy gradient, and changes them in place.

struct AdamW {
  static constexpr int kArrays = 4;  // param, grad, m, v
  float keep, beta1_rest, beta2, beta2_rest, root_correction, eps, rate;

  FASTCLIP_INLINE void update(float (&x)[4]) const {
    const float g = x[1], p = x[0] * keep;
    x[2] = x[2] + beta1_rest * (g - x[2]);
    x[3] = x[3] * beta2 + beta2_rest * g * g;
    x[0] = p - rate * x[2] / (std::sqrt(x[3]) / root_correction + eps);
  }
};

struct Sgd {
  static constexpr int kArrays = 2;  // param, grad
  float rate, decay;

  FASTCLIP_INLINE void update(float (&x)[2]) const { x[0] = x[0] - rate * (x[1] + decay * x[0]); }
};

// first: the buffer holds nothing yet and becomes the gradient.
struct Momentum {
  static constexpr int kArrays = 3;  // param, grad, buffer
  float rate, decay, momentum, rest;
  bool nesterov, first;

  FASTCLIP_INLINE void update(float (&x)[3]) const {
    const float g = x[1] + decay * x[0];
    x[2] = first ? g : x[2] * momentum + rest * g;
    x[0] = x[0] - rate * (nesterov ? g + momentum * x[2] : x[2]);
  }
};

template <class Update>
struct NoiseStep {
  static constexpr int kArrays = Update::kArrays;
  using Shared = Noise;
  struct Tensor {
    float* at[kArrays];
    Place place;
    Update by;
  };

  static FASTCLIP_INLINE void element(const Noise& noise, const Update& by, double z, float (&x)[kArrays]) {
    x[1] = static_cast<float>((static_cast<double>(x[1]) + noise.std * z) * noise.scale);
    by.update(x);
  }

  static FASTCLIP_INLINE void run(const Noise& noise, const Tensor& tensor, int64_t block) {
    const Span span(tensor.place, block);
    double z[kBlock];
    draw(noise, tensor.place.block + block, z);
    float x[kArrays];
    bool fast = span.whole();
    for (int a = 0; a < kArrays; ++a) fast = fast && is_aligned(tensor.at[a] + span.begin);
    if (fast) {
      constexpr int size = Pack<float>::kSize;
      for (int first = 0; first < kBlock; first += size) {
        Pack<float> packs[kArrays];
        for (int a = 0; a < kArrays; ++a) packs[a] = load(tensor.at[a] + span.begin + first);
        for (int i = 0; i < size; ++i) {
          for (int a = 0; a < kArrays; ++a) x[a] = packs[a].x[i];
          element(noise, tensor.by, z[first + i], x);
          for (int a = 0; a < kArrays; ++a) packs[a].x[i] = x[a];
        }
        for (int a = 0; a < kArrays; ++a) store(tensor.at[a] + span.begin + first, packs[a]);
      }
    } else {
      for (int i = 0; i < kBlock; ++i) {
        if (!span.has(i)) continue;
        for (int a = 0; a < kArrays; ++a) x[a] = tensor.at[a][span.begin + i];
        element(noise, tensor.by, z[i], x);
        for (int a = 0; a < kArrays; ++a) tensor.at[a][span.begin + i] = x[a];
      }
    }
  }
};

}  // namespace fastclip::cuda
