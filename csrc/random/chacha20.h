// ChaCha20's block function (RFC 8439, section 2.3): a block of 16 words for each lane of W.
//
// State words 4-11 are the key, 12-13 a 64-bit block number and 14-15 a 64-bit nonce, low halves first: below block 2^32
// RFC 8439's own layout. fastclip/random.py defines the stream.
#pragma once

#include "lanes.h"

namespace fastclip {

template <class W>
FASTCLIP_INLINE W rotate(W x, int bits) {
  return (x << bits) | (x >> (32 - bits));
}

template <class W>
FASTCLIP_INLINE void quarter_round(W& a, W& b, W& c, W& d) {
  a += b, d = rotate(d ^ a, 16);
  c += d, b = rotate(b ^ c, 12);
  a += b, d = rotate(d ^ a, 8);
  c += d, b = rotate(b ^ c, 7);
}

// Words 12 and 13, the block number, are left to the caller.
template <class W>
FASTCLIP_INLINE void chacha20_state(const uint32_t (&key)[8], uint64_t nonce, W (&start)[16]) {
  const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  for (int i = 0; i < 4; ++i) start[i] = W{} + constants[i];
  for (int i = 0; i < 8; ++i) start[4 + i] = W{} + key[i];
  start[14] = W{} + static_cast<uint32_t>(nonce);
  start[15] = W{} + static_cast<uint32_t>(nonce >> 32);
}

template <class W>
FASTCLIP_INLINE void chacha20(const W (&start)[16], W (&out)[16]) {
  W x[16];
  for (int i = 0; i < 16; ++i) x[i] = start[i];
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + i], x[8 + i], x[12 + i]);
    for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
  }
  for (int i = 0; i < 16; ++i) out[i] = x[i] + start[i];
}

}  // namespace fastclip
