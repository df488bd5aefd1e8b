// Into each instruction set's own copy of the code, not beside it; on the host and on the device where nvcc compiles.
#pragma once

#if defined(__CUDACC__)
#define FASTCLIP_INLINE __host__ __device__ __forceinline__
#else
#define FASTCLIP_INLINE inline __attribute__((always_inline))
#endif
