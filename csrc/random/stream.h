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
template <class W>
FASTCLIP_INLINE void stream_words(const Stream& stream, W low, W high, W (&out)[16]) {
  if (!(stream.nonce >> 63)) return chacha20(stream.key, stream.nonce, low, high, out);
  for (int j = 0; j < 4; ++j) {
    W counter[4] = {(low << 2) | static_cast<uint32_t>(j), (high << 2) | (low >> 30),
                    W{} + static_cast<uint32_t>(stream.nonce), W{} + static_cast<uint32_t>(stream.nonce >> 32)};
    philox4x32(counter, stream.key[0], stream.key[1]);
    for (int i = 0; i < 4; ++i) out[4 * j + i] = counter[i];
  }
}

}  // namespace fastclip
