// One body of code compiled for several instruction sets, and the choice between them when the library is loaded.
//
// Nothing is contracted to fused multiply-adds (setup.py), so that every set gives the same bits.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../inline.h"

namespace fastclip {

enum class Capability { kDefault, kAvx2, kAvx512 };

// Honours ATEN_CPU_CAPABILITY, torch's own switch: default, avx2 or avx512.
inline Capability find_capability() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const bool not_avx512 = wanted && std::strcmp(wanted, "avx512") != 0;
  const bool not_avx2 = not_avx512 && std::strcmp(wanted, "avx2") != 0;
  __builtin_cpu_init();
  if (!not_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Capability::kAvx512;
  if (!not_avx2 && __builtin_cpu_supports("avx2")) return Capability::kAvx2;
#endif
  return Capability::kDefault;
}

inline Capability capability() {
  static const Capability found = find_capability();
  return found;
}

}  // namespace fastclip

#define FASTCLIP_LAMBDA __attribute__((always_inline))
#if defined(__x86_64__)
#define FASTCLIP_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#define FASTCLIP_AVX2 __attribute__((target("avx2")))
#else
#define FASTCLIP_AVX512
#define FASTCLIP_AVX2
#endif

namespace fastclip {

template <Capability set>
using Set = std::integral_constant<Capability, set>;

template <class Set, class F>
FASTCLIP_INLINE auto call(const F& f) {
  if constexpr (std::is_invocable_v<const F&, Set>)
    return f(Set{});
  else
    return f();
}
template <class F>
FASTCLIP_AVX512 auto as_avx512(const F& f) { return call<Set<Capability::kAvx512>>(f); }
template <class F>
FASTCLIP_AVX2 auto as_avx2(const F& f) { return call<Set<Capability::kAvx2>>(f); }

// f(), or f(set) of one that asks for it, compiled for each instruction set: a lambda marked FASTCLIP_LAMBDA, which calls
// FASTCLIP_INLINE code only.
template <class F>
auto best(const F& f) {
  const Capability chosen = capability();
  if (chosen == Capability::kAvx512) return as_avx512(f);
  return chosen == Capability::kAvx2 ? as_avx2(f) : call<Set<Capability::kDefault>>(f);
}

}  // namespace fastclip
