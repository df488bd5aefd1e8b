// Into each instruction set's own copy of the code, not beside it.
#pragma once

#define FASTCLIP_INLINE inline __attribute__((always_inline))
