// c [m, n] (+)= alpha x y for bf16 x and y, summed in fp32, by Intel's tiles (AMX): 16 x 32 times 32 x 16 an instruction.
//
// An instruction (TDPBF16PS, Intel SDM volume 2) adds the sum of 32 products to each of 16 x 16 sums: products of two bf16 are
// exact in fp32, no more than 32 of them are added up before that sum is added in its turn, and each addition rounds once. So a
// sum over k is off by no more than 32 + k / 32 + k / kDepth roundings, whichever way the 32 are added.
// Subnormal numbers count as zeros, as in gemm_bf16.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>

#include "gemm_packed.h"

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define FASTCLIP_HAS_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define FASTCLIP_HAS_TILES 0
#endif

namespace fastclip::tiles {

using Half = c10::BFloat16;

#if FASTCLIP_HAS_TILES
#define FASTCLIP_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))

constexpr int64_t kSide = 16, kPairs = 16, kTile = kSide * kPairs;  // a tile: 16 x 16 pairs of bf16, or 16 x 16 fp32
constexpr int64_t kBlock = 2 * kSide;                                // rows and columns of c that are summed at a time
constexpr int64_t kRows = 256, kColumns = 512, kDepth = 1024;        // packed at a time

inline bool allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bf16) || !(d & tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // Linux saves tiles only of processes that ask for it
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not on the stack: the compiler does not know that the instruction reads it.
inline const Shapes kShapes;

// Tiles are configured while one of these lives.
class Configured {
 public:
  FASTCLIP_TILES Configured() { _tile_loadconfig(&kShapes); }
  FASTCLIP_TILES ~Configured() { _tile_release(); }
};

// Whether 32 products are added up before their sum is added: of sums one by one 2^24 + 32 would be 2^24.
FASTCLIP_TILES inline bool adds_sums() {
  alignas(64) float sums[kTile];
  alignas(64) static uint16_t ones[2 * kTile];
  std::fill(sums, sums + kTile, 0x1p24f);
  std::fill(ones, ones + 2 * kTile, 0x3f80);
  asm volatile("" ::: "memory");
  const Configured configured;
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, ones, 64);
  _tile_loadd(2, ones, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, sums, 64);
  return std::all_of(sums, sums + kTile, [](float sum) { return sum == 0x1p24f + 32; });
}

inline bool faster() {
  static const bool found = capability() == Capability::kAvx512 && allowed() && adds_sums();
  return found;
}

inline int64_t tiles_for(int64_t k) { return (k + 2 * kPairs - 1) / (2 * kPairs); }
// Floats that a packed operand of this many rows (of x) or columns (of y) takes.
inline int64_t packed_size(int64_t side, int64_t k) { return (side + kBlock - 1) / kBlock * kBlock / kSide * tiles_for(k) * kTile; }

// The 16 x 32 elements of x [m, k] from (i, t) on, zeros beyond m and k: for the left operand a row of pairs for each i, for the
// right one a row for each pair of t.
FASTCLIP_TILES inline void pack_tile(const View<Half>& x, int64_t i, int64_t t, int64_t m, int64_t k, bool left, float* to) {
  const int64_t rows = std::clamp<int64_t>(m - i, 0, kSide), depth = std::min(k - t, 2 * kPairs);
  const auto* from = reinterpret_cast<const uint16_t*>(x.data) + i * x.row + t * x.column;
  __m512 lines[16];
  const bool along_k = x.column == 1;
  if (along_k) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << depth) - 1);
    for (int64_t r = 0; r < kSide; ++r)
      lines[r] = _mm512_castsi512_ps(r < rows ? _mm512_maskz_loadu_epi16(mask, from + r * x.row) : _mm512_setzero_si512());
  } else {
    const auto mask = static_cast<__mmask16>((1u << rows) - 1);
    for (int64_t r = 0; r < kPairs; ++r) {
      const uint16_t* pair = from + 2 * r * x.column;
      __m512i low = _mm512_setzero_si512(), high = low;
      if (2 * r < depth) low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, pair));
      if (2 * r + 1 < depth) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, pair + x.column));
      lines[r] = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  if (along_k != left) packed::transpose(lines);
  for (int64_t r = 0; r < 16; ++r) _mm512_store_ps(to + 16 * r, lines[r]);
}

// x [m, k] as panels of 16 rows, [ceil(m / 32) * 2, tiles_for(k)] tiles. The right operand is packed as its transpose.
FASTCLIP_TILES inline void pack(const View<Half>& x, int64_t m, int64_t k, bool left, float* to) {
  const int64_t depth = tiles_for(k), together = 8 * kSide;  // panels of a whole number of cache lines
  for (int64_t i = 0; i < m; i += together)
    for (int64_t t = 0; t < depth; ++t)
      for (int64_t q = i; q < std::min(i + together, (m + kBlock - 1) / kBlock * kBlock); q += kSide)
        pack_tile(x, q, t * 2 * kPairs, m, k, left, to + (q / kSide * depth + t) * kTile);
}

// sums [32, 32] = x y, of two panels of each; `panel` leads from one to the next.
FASTCLIP_TILES inline void block(int64_t depth, const float* x, const float* y, int64_t panel, float* sums) {
  asm volatile("" ::: "memory");  // the compiler does not know either that tiles are read from what was packed
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t t = 0; t < depth; ++t, x += kTile, y += kTile) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, y, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, y + panel, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + panel, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kSide, 128);
  _tile_stored(2, sums + kSide * kBlock, 128);
  _tile_stored(3, sums + kSide * kBlock + kSide, 128);
}

// c [m, n] (+)= alpha x y of packed operands, `depth` tiles deep. Columns before i + first may be left out of row i.
FASTCLIP_TILES inline void multiply(int64_t m, int64_t n, int64_t depth, const float* x, const float* y, float alpha, bool accumulate,
                                    float* c, int64_t stride, int64_t first) {
  alignas(64) float sums[kBlock * kBlock];
  const __m512 factor = _mm512_set1_ps(alpha);
  const int64_t panel = depth * kTile;
  for (int64_t i = 0; i < m; i += kBlock)
    for (int64_t j = std::max<int64_t>(0, i + first) / kBlock * kBlock; j < n; j += kBlock) {
      block(depth, x + i / kSide * panel, y + j / kSide * panel, panel, sums);
      for (int64_t half = 0; half < 2 && j + half * kSide < n; ++half) {
        const auto mask = static_cast<__mmask16>((1u << std::min(kSide, n - j - half * kSide)) - 1);
        float* to = c + i * stride + j + half * kSide;
        const float* from = sums + half * kSide;
        for (int64_t r = 0; r < std::min(kBlock, m - i); ++r, to += stride, from += kBlock) {
          const __m512 sum = _mm512_mul_ps(factor, _mm512_load_ps(from));
          _mm512_mask_storeu_ps(to, mask, accumulate ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum) : sum);
        }
      }
    }
}

FASTCLIP_TILES inline void multiply(Packs<float>& packs, int64_t m, int64_t n, int64_t k, const View<Half>& x, const View<Half>& y,
                                    float alpha, bool accumulate, float* c, int64_t stride, bool upper) {
  const Configured configured;
  float* left = packs.x.get(packed_size(std::min(m, kRows), std::min(k, kDepth)));
  float* right = packs.y.get(packed_size(std::min(n, kColumns), std::min(k, kDepth)));
  for (int64_t j = 0; j < n; j += kColumns)
    for (int64_t t = 0; t < k; t += kDepth) {
      const int64_t columns = std::min(kColumns, n - j), depth = std::min(kDepth, k - t), tiles = tiles_for(depth);
      pack(y.at(t, j).transposed(), columns, depth, false, right);
      for (int64_t i = 0; i < m && !(upper && j + columns <= i); i += kRows) {
        const int64_t rows = std::min(kRows, m - i);
        pack(x.at(i, t), rows, depth, true, left);
        multiply(rows, columns, tiles, left, right, alpha, accumulate || t > 0, c + i * stride + j, stride, upper ? i - j : -m);
      }
    }
}
#else
inline bool faster() { return false; }
#endif

}  // namespace fastclip::tiles
