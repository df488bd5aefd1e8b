// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3).
//
// For seeded streams, which are not private: it is no cipher. counter: 128 bits, low words first, replaced by the output.
#pragma once

#include "lanes.h"

namespace fastclip {

template <class W, class M = Multiply>
FASTCLIP_INLINE void philox4x32(W (&counter)[4], uint32_t key0, uint32_t key1, const M& multiply = {}) {
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    multiply(counter[0], 0xD2511F53u, high0, low0);
    multiply(counter[2], 0xCD9E8D57u, high1, low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace fastclip
