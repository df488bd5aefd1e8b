// The discrete Gaussian N_Z(0, sigma^2) by rejection from a discrete Laplace (Canonne, Kamath and Steinke, NeurIPS 2020,
// algorithms 1 to 3, with t = sigma). Integers only: each probability is compared digit by digit, so that it is exact.
//
// Element e draws from blocks e, e + 2^48, e + 2 2^48, ... of the stream, as many as it needs: what it gets depends on no other
// element, on no thread and on no order. About nine 64-bit words each.
#pragma once

#include "stream.h"

namespace fastclip {

constexpr uint64_t kMostSigma = uint64_t{1} << 31;  // 2 sigma^2 fits 64 bits
constexpr uint64_t kMostElements = uint64_t{1} << 48;

class ElementWords {
 public:
  // first: the words of block `element`.
  ElementWords(const Stream& stream, uint64_t element, const uint64_t (&first)[8]) : stream_(stream), block_(element) {
    for (int i = 0; i < 8; ++i) words_[i] = first[i];
  }

  uint64_t next() {
    if (used_ == 8) refill();
    return words_[used_++];
  }

 private:
  void refill() {
    block_ += kMostElements;  // 65,535 refills: nobody lives to see the last
    uint32_t halves[16];
    stream_words(stream_, static_cast<uint32_t>(block_), static_cast<uint32_t>(block_ >> 32), halves);
    for (int i = 0; i < 8; ++i) words_[i] = halves[2 * i] | uint64_t{halves[2 * i + 1]} << 32;
    used_ = 0;
  }

  const Stream& stream_;
  uint64_t block_, words_[8];
  int used_ = 0;
};

// True with probability n / d, 0 <= n <= d.
inline bool bernoulli(ElementWords& words, uint64_t n, uint64_t d) {
  while (n < d) {
    const unsigned __int128 shifted = static_cast<unsigned __int128>(n) << 64;
    const uint64_t digits = static_cast<uint64_t>(shifted / d), word = words.next();
    if (word != digits) return word < digits;
    n = static_cast<uint64_t>(shifted % d);
  }
  return true;
}

// True with probability 1/e: its first 192 binary digits decide but once in 2^192.
inline bool bernoulli_inverse_e(ElementWords& words) {
  const uint64_t digits[3] = {0x5e2d58d8b3bcdf1aULL, 0xbadec7829054f90dULL, 0xda9805aab56c7733ULL};
  for (uint64_t digit : digits) {
    const uint64_t word = words.next();
    if (word != digit) return word < digit;
  }
  return false;
}

// True with probability exp(-n / d).
inline bool bernoulli_exp(ElementWords& words, unsigned __int128 n, uint64_t d) {
  for (unsigned __int128 i = n / d; i > 0; --i)
    if (!bernoulli_inverse_e(words)) return false;
  const uint64_t rest = static_cast<uint64_t>(n % d);
  uint64_t k = 1;
  while (bernoulli(words, rest, d) && bernoulli(words, 1, k)) ++k;
  return k % 2 == 1;
}

// Uniform in [0, n): the high half of a product, words of the short last interval rejected (Lemire, ACM TOMACS 2019).
inline uint64_t uniform(ElementWords& words, uint64_t n) {
  for (;;) {
    const unsigned __int128 product = static_cast<unsigned __int128>(words.next()) * n;
    if (static_cast<uint64_t>(product) >= -n % n) return static_cast<uint64_t>(product >> 64);
  }
}

// sigma: a whole number in [1, kMostSigma].
inline int64_t discrete_gaussian(ElementWords& words, uint64_t sigma) {
  for (;;) {
    const uint64_t u = uniform(words, sigma);
    if (!bernoulli_exp(words, u, sigma)) continue;
    uint64_t v = 0;
    while (bernoulli_inverse_e(words)) ++v;
    const uint64_t size = u + sigma * v;
    const bool negative = words.next() & 1;
    if (negative && size == 0) continue;
    const unsigned __int128 off = size > sigma ? size - sigma : sigma - size;
    if (bernoulli_exp(words, off * off, 2 * sigma * sigma)) return negative ? -static_cast<int64_t>(size) : static_cast<int64_t>(size);
  }
}

}  // namespace fastclip
