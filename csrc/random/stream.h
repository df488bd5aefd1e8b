// The words of a block of 8 elements, as fastclip/random.py defines the stream: ChaCha20's, or Philox's for a seeded nonce.
#pragma once

#include "chacha20.h"
#include "philox.h"

namespace fastclip {

struct Stream {
  uint32_t key[8];
  uint64_t nonce;
};

// out[4 j] to out[4 j + 3]: pair j's radius and angle, low halves first. low, high: the block number's halves.
template <class M = Multiply>
FASTCLIP_INLINE void stream_words(const Stream& stream, uint32_t low, uint32_t high, uint32_t (&out)[16], const M& multiply = {}) {
  if (!(stream.nonce >> 63)) {
    uint32_t start[16];
    chacha20_state(stream.key, stream.nonce, start);
    start[12] = low, start[13] = high;
    return chacha20(start, out);
  }
  for (int j = 0; j < 4; ++j) {
    uint32_t counter[4] = {(low << 2) | static_cast<uint32_t>(j), (high << 2) | (low >> 30), static_cast<uint32_t>(stream.nonce),
                           static_cast<uint32_t>(stream.nonce >> 32)};
    philox4x32(counter, stream.key[0], stream.key[1], multiply);
    for (int i = 0; i < 4; ++i) out[4 * j + i] = counter[i];
  }
}

#if !defined(__CUDACC__)
// Of 16 blocks. start: chacha20_state of the stream, which is the same for all of them.
template <class M = Multiply>
FASTCLIP_INLINE void stream_words(const Stream& stream, u32x16 (&start)[16], u32x16 low, u32x16 high, u32x16 (&out)[16],
                                  const M& multiply = {}) {
  if (!(stream.nonce >> 63)) {
    start[12] = low, start[13] = high;
    return chacha20(start, out);
  }
  const u64x8 nonce_low = u64x8{} + static_cast<uint32_t>(stream.nonce), nonce_high = u64x8{} + (stream.nonce >> 32);
  for (int j = 0; j < 4; ++j) {
    const u32x16 first = (low << 2) | static_cast<uint32_t>(j), second = (high << 2) | (low >> 30);
    u64x8 left[4] = {even(first), even(second), nonce_low, nonce_high}, right[4] = {odd(first), odd(second), nonce_low, nonce_high};
    philox4x32(left, stream.key[0], stream.key[1], multiply);
    philox4x32(right, stream.key[0], stream.key[1], multiply);
    for (int i = 0; i < 4; ++i) out[4 * j + i] = join(left[i], right[i]);
  }
}
#endif

}  // namespace fastclip
