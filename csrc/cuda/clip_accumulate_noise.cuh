// clip_accumulate_noise: out = round(sum_u factors[u] grads[u] + std z) over a list of tensors, formed in fp64, rounded once.
//
// grads: [U, n] fp32, bf16 or fp16; factors: fp64 [U] on the device; out: fp32, bf16 or fp16 [n]. Reads U n elements once and
// writes n. Units are added in their order. A unit of factor 0 is read and left out of the sum: its inf and NaN stay with it,
// and no load waits for a factor.
#pragma once

#include "noise_block.cuh"
#include "rounding.cuh"

#if defined(__CUDACC__)
#define FASTCLIP_UNROLL4 _Pragma("unroll 4")
#else
#define FASTCLIP_UNROLL4
#endif

namespace fastclip::cuda {

struct Clipped {
  Noise noise;
  const double* factors;
  int64_t units;
};

template <class In, class Out>
struct ClipAccumulateNoise {
  using Shared = Clipped;
  struct Tensor {
    const In* grads;
    Out* out;
    Place place;
  };

  static FASTCLIP_INLINE double add(double sum, double factor, In x) {
    const double more = sum + factor * widen(x);
    return factor == 0 ? sum : more;
  }

  static FASTCLIP_INLINE void run(const Clipped& shared, const Tensor& tensor, int64_t block) {
    const Span span(tensor.place, block);
    double sums[kBlock] = {};
    const In* column = tensor.grads + span.begin;
    if (span.whole() && is_aligned(column) && span.n * int64_t{sizeof(In)} % 16 == 0) {
      constexpr int size = Pack<In>::kSize;
      FASTCLIP_UNROLL4
      for (int64_t u = 0; u < shared.units; ++u) {
        const double factor = shared.factors[u];
        for (int first = 0; first < kBlock; first += size) {
          const Pack<In> pack = load(column + u * span.n + first);
          for (int i = 0; i < size; ++i) sums[first + i] = add(sums[first + i], factor, pack.x[i]);
        }
      }
    } else {
      for (int64_t u = 0; u < shared.units; ++u) {
        const double factor = shared.factors[u];
        for (int i = 0; i < kBlock; ++i)
          if (span.has(i)) sums[i] = add(sums[i], factor, column[u * span.n + i]);
      }
    }

    double z[kBlock];
    draw(shared.noise, tensor.place.block + block, z);
    Out* to = tensor.out + span.begin;
    if (span.whole() && is_aligned(to)) {
      constexpr int size = Pack<Out>::kSize;
      for (int first = 0; first < kBlock; first += size) {
        Pack<Out> pack;
        for (int i = 0; i < size; ++i) pack.x[i] = round_once<Out>(sums[first + i] + shared.noise.std * z[first + i]);
        store(to + first, pack);
      }
    } else {
      for (int i = 0; i < kBlock; ++i)
        if (span.has(i)) to[i] = round_once<Out>(sums[i] + shared.noise.std * z[i]);
    }
  }
};

}  // namespace fastclip::cuda
