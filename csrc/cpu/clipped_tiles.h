// out [p, d] (+)= sum_s factor_s g_s^T a_s over segments of bf16 rows, by tiles: a factor multiplies its segment's fp32 sums.
//
// The narrower of a and g is packed once for all; each task packs its own slice of the other and keeps to so much of `out` that
// it stays in cache from segment to segment.
#pragma once

#include <vector>

#include "gemm.h"
#include "rows.h"

namespace fastclip {

// Rows of one unit: `wide` ones are multiplied in fp32.
struct Segment {
  int64_t start, rows;
  float factor;
  bool wide;
};
constexpr int64_t kSegmentRows = 512, kOutInCache = int64_t{1} << 18;  // elements of out that stay in cache from unit to unit

// x [N, columns]'s rows of a segment as the operand [columns, rows].
inline View<c10::BFloat16> turned(const Rows<c10::BFloat16>& x, const Segment& segment, int64_t column) {
  return {x.row(segment.start) + column, 1, x.stride};
}

#if FASTCLIP_HAS_TILES
constexpr int64_t kShared = int64_t{1} << 21;  // floats that are packed for all tasks

struct TilesScratch {
  Packs<float> packs;
  Buffer<float> slice;
};

inline void clipped_by_tiles(const Rows<c10::BFloat16>& a, const Rows<c10::BFloat16>& g, const std::vector<Segment>& segments,
                             bool accumulate, float* out, int64_t stride) {
  const bool along_p = g.columns >= a.columns;
  const Rows<c10::BFloat16>&longer = along_p ? g : a, &shorter = along_p ? a : g;
  const auto up = [](int64_t value) { return (value + tiles::kBlock - 1) / tiles::kBlock * tiles::kBlock; };
  const int64_t most = std::max(kOutInCache / up(shorter.columns) / tiles::kBlock, int64_t{1}) * tiles::kBlock;
  const int64_t step = std::clamp(up(longer.columns / 4), tiles::kBlock, most);
  size_t begin = 0;
  while (begin < segments.size()) {
    std::vector<int64_t> offsets{0};
    size_t end = begin;
    while (end < segments.size() && (end == begin || offsets.back() < kShared)) {
      offsets.push_back(offsets.back() + tiles::packed_size(shorter.columns, segments[end].rows));
      ++end;
    }
    Buffer<float> memory;
    float* shared = memory.get(offsets.back());
    torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s)
        tiles::pack(turned(shorter, segments[s], 0), shorter.columns, segments[s].rows, !along_p, shared + offsets[s - begin]);
    });
    over_tasks<TilesScratch>((longer.columns + step - 1) / step, [&](int64_t task, TilesScratch& scratch) {
      const int64_t column = task * step, count = std::min(step, longer.columns - column);
      const int64_t m = along_p ? count : g.columns, n = along_p ? a.columns : count;
      float* to = out + column * (along_p ? stride : 1);
      float* own = scratch.slice.get(tiles::packed_size(step, kSegmentRows));
      bool add = accumulate || begin > 0;
      for (size_t s = begin; s < end; ++s, add = true) {
        const Segment& segment = segments[s];
        if (segment.wide) {
          const std::vector<float> factors(segment.rows, segment.factor);
          const View<c10::BFloat16> left = turned(g, segment, along_p ? column : 0);
          const View<c10::BFloat16> right = turned(a, segment, along_p ? 0 : column).transposed();
          gemm<float>(scratch.packs, m, n, segment.rows, left, right, factors.data(), add, to, stride);
          continue;
        }
        const tiles::Configured configured;
        tiles::pack(turned(longer, segment, column), count, segment.rows, along_p, own);
        const float* others = shared + offsets[s - begin];
        tiles::multiply(m, n, tiles::tiles_for(segment.rows), along_p ? own : others, along_p ? others : own, segment.factor, add, to,
                        stride, -m);
      }
    });
    begin = end;
  }
}
#endif

}  // namespace fastclip
