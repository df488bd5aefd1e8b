// The noise of one block, and how a thread reads and writes 8 elements: 16 bytes at a time where they are whole and aligned.
#pragma once

#include "../random/normals.h"
#include "../random/stream.h"
#include "tensor_list.cuh"

namespace fastclip::cuda {

struct Noise {
  Stream stream;
  double std, scale;
};

FASTCLIP_INLINE void draw(const Noise& noise, uint64_t block, double (&z)[kBlock]) {
  uint32_t words[16];
  stream_words(noise.stream, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), words);
  normals(words, z);
}

#if defined(__CUDACC__)
using Words = uint4;
#else
struct __attribute__((may_alias, aligned(16))) Words {
  uint32_t x, y, z, w;
};
#endif

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

template <class T>
FASTCLIP_INLINE Pack<T> load(const T* from) {
  const Words words = *reinterpret_cast<const Words*>(from);
  Pack<T> pack;
  __builtin_memcpy(&pack, &words, sizeof pack);
  return pack;
}
template <class T>
FASTCLIP_INLINE void store(T* to, const Pack<T>& pack) {
  Words words;
  __builtin_memcpy(&words, &pack, sizeof pack);
#if defined(__CUDA_ARCH__)
  __stwb(reinterpret_cast<Words*>(to), words);  // nvcc would take a plain store apart and merge pieces with the other branch
#else
  *reinterpret_cast<Words*>(to) = words;
#endif
}

template <class T>
FASTCLIP_INLINE bool is_aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Elements [begin, begin + 8) of a tensor of n: a tensor may start and end within a block.
struct Span {
  int64_t begin, n;

  FASTCLIP_INLINE Span(const Place& place, int64_t block) : begin(kBlock * block - place.skip), n(place.n) {}
  FASTCLIP_INLINE bool whole() const { return begin >= 0 && begin + kBlock <= n; }
  FASTCLIP_INLINE bool has(int i) const { return begin + i >= 0 && begin + i < n; }
};

}  // namespace fastclip::cuda
