// ChaCha20's block function (RFC 8439, section 2.3), 16 blocks at once, lane l holding block number `first + l`.
//
// State words 4-11 are the key, 12-13 a 64-bit block number and 14-15 a 64-bit nonce, low halves first: below block 2^32
// RFC 8439's own layout. fastclip/random.py defines the stream.
#pragma once

#include "vectors.h"

namespace fastclip {

struct Stream {
  uint32_t key[8];
  uint64_t nonce;
};

FASTCLIP_INLINE u32x16 rotate(u32x16 x, int bits) { return (x << bits) | (x >> (32 - bits)); }

FASTCLIP_INLINE void quarter_round(u32x16& a, u32x16& b, u32x16& c, u32x16& d) {
  a += b, d = rotate(d ^ a, 16);
  c += d, b = rotate(b ^ c, 12);
  a += b, d = rotate(d ^ a, 8);
  c += d, b = rotate(b ^ c, 7);
}

FASTCLIP_INLINE void chacha20(const Stream& stream, uint64_t first, u32x16 (&out)[16]) {
  const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  u32x16 start[16] = {};
  for (int i = 0; i < 4; ++i) start[i] = u32x16{} + constants[i];
  for (int i = 0; i < 8; ++i) start[4 + i] = u32x16{} + stream.key[i];
  for (int lane = 0; lane < 16; ++lane) {
    start[12][lane] = static_cast<uint32_t>(first + lane);
    start[13][lane] = static_cast<uint32_t>((first + lane) >> 32);
  }
  start[14] = u32x16{} + static_cast<uint32_t>(stream.nonce);
  start[15] = u32x16{} + static_cast<uint32_t>(stream.nonce >> 32);

  for (int i = 0; i < 16; ++i) out[i] = start[i];
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4; ++i) quarter_round(out[i], out[4 + i], out[8 + i], out[12 + i]);
    for (int i = 0; i < 4; ++i)
      quarter_round(out[i], out[4 + (i + 1) % 4], out[8 + (i + 2) % 4], out[12 + (i + 3) % 4]);
  }
  for (int i = 0; i < 16; ++i) out[i] += start[i];
}

}  // namespace fastclip
