// What the kernels that draw noise share: the stream's place, the one rounding, and how a vector is cut into tiles.
#pragma once

// Normals are long chains of operations: laid out in the order in which they can run, they are a third faster.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns")
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "../random/normals.h"
#include "../random/stream.h"
#include "dispatch.h"

namespace fastclip {

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

#if defined(__x86_64__)
// Where AVX-512 multiplies whole lanes the compiler does so: three times the work of the one instruction that is meant.
struct Multiply512 {
  FASTCLIP_INLINE void operator()(u64x8 x, uint32_t m, u64x8& high, u64x8& low) const {
    asm("vpmuludq %2, %1, %0" : "=v"(low) : "v"(x), "v"(u64x8{} + m));
    high = low >> 32;
  }
};
template <class Set>
using MultiplyOf = std::conditional_t<Set::value == Capability::kAvx512, Multiply512, Multiply>;
#else
template <class Set>
using MultiplyOf = Multiply;
#endif

// f(0) to f(n - 1), which do not touch each other's memory; n at most kTile, and most often that.
template <class F>
FASTCLIP_INLINE void each(int64_t n, const F& f) {
  if (n == kTile) {
#pragma GCC ivdep
    for (int64_t i = 0; i < kTile; ++i) f(i);
  } else {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
}

// Tiles of one noise, one after the other: what their blocks share is laid out once.
template <class Set>
class Drawer {
 public:
  FASTCLIP_INLINE explicit Drawer(const Noise& noise) : noise_(noise) {
    chacha20_state(noise.stream.key, noise.stream.nonce, start_);
  }

  // The normals of the tile that starts at block `block + 16 * tile`.
  FASTCLIP_INLINE void draw(int64_t tile) {
    const uint64_t first = noise_.block + 16 * tile;
    const u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const u32x16 low = lane + static_cast<uint32_t>(first);
    const u32x16 carry = low < static_cast<uint32_t>(first) ? u32x16{} + 1 : u32x16{};
    u32x16 words[16];
    stream_words(noise_.stream, start_, low, carry + static_cast<uint32_t>(first >> 32), words, MultiplyOf<Set>{});
    normals(words, z_);
  }

  // to[0:n] = round((sum(i) + std z) scale) with the tile's normals from `skip` on.
  template <class Out, class F>
  FASTCLIP_INLINE void noisy(int64_t skip, int64_t n, const F& sum, Out* to) const {
    const double *z = z_ + skip, std = noise_.std, scale = noise_.scale;
    each(n, [&](int64_t i) FASTCLIP_LAMBDA { to[i] = round_once<Out>((sum(i) + std * z[i]) * scale); });
  }

 private:
  const Noise noise_;
  u32x16 start_[16];
  alignas(64) double z_[kTile];
};

// Of n elements. A stream does not begin again behind its end, which a seeded one has at block 2^62.
inline Noise noise_of(const torch::stable::Tensor& key, int64_t nonce, int64_t block, int64_t skip, int64_t n, double std,
                      double scale) {
  STD_TORCH_CHECK(key.scalar_type() == torch::headeronly::ScalarType::Byte && key.is_contiguous() && key.numel() == 32,
                  "noise: key must be 32 contiguous bytes");
  STD_TORCH_CHECK(0 <= skip && skip < 8, "noise: skip must be in [0, 8), got ", skip);
  const uint64_t blocks = (skip + n + 7) / 8, end = nonce < 0 ? uint64_t{1} << 62 : 0;  // 0: 2^64
  STD_TORCH_CHECK(n == 0 || static_cast<uint64_t>(block) <= end - blocks, "noise: the stream ends before element ", n,
                  " from block ", static_cast<uint64_t>(block), "; lower the offset");
  Noise noise{{}, static_cast<uint64_t>(block), std, scale};
  std::memcpy(noise.stream.key, key.const_data_ptr(), 32);
  noise.stream.nonce = static_cast<uint64_t>(nonce);
  return noise;
}

// How many tiles cover n elements, `skip` of which lie before them in the first tile.
inline int64_t tiles_of(int64_t n, int64_t skip) { return (skip + n + kTile - 1) / kTile; }

// run(first, last) over those tiles.
template <class F>
void over_tiles(int64_t n, int64_t skip, const F& run) {
  torch::stable::parallel_for(0, tiles_of(n, skip), kGrain, run);
}

// run(k, first, last) over the tiles of vectors of these sizes, as if they were one: threads wait for each other once.
template <class F>
void over_tiles(const std::vector<int64_t>& sizes, const std::vector<int64_t>& skips, const F& run) {
  std::vector<int64_t> starts{0};
  for (size_t k = 0; k < sizes.size(); ++k) starts.push_back(starts[k] + tiles_of(sizes[k], skips[k]));
  torch::stable::parallel_for(0, starts.back(), kGrain, [&](int64_t first, int64_t last) {
    size_t k = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
    for (; first < last; first = starts[++k]) run(k, first - starts[k], std::min(last, starts[k + 1]) - starts[k]);
  });
}

}  // namespace fastclip
