// Lists of tensors in one launch: their descriptions travel by value in the kernel's parameters, 4 KiB of them.
//
// No table in device memory, so nothing is allocated, copied or waited for. A list that does not fit is cut into several
// launches. Tensors are cut into tiles of 128 blocks of 8 elements, as the noise stream counts them: a CTA takes a tile, a
// thread a block, and writes to no other place, so that results depend on neither. 2^31 tiles are 2^41 elements, more than any
// memory holds.
//
// A job says what is done: Job::Shared is the same for all tensors, Job::Tensor describes one and holds its Place, and
// Job::run(shared, tensor, b) works on its block b. Without nvcc the same code runs in a loop, which is how values are tested.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../inline.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace fastclip::cuda {

constexpr int kBlock = 8;
constexpr int kThreads = 128;
constexpr size_t kParameterBytes = 4096;

// n elements, the first of which is element `skip` of the stream's block `block`; first_tile: among the tiles of a launch.
struct Place {
  int64_t n;
  uint64_t block;
  int32_t skip;
  int32_t first_tile;

  FASTCLIP_INLINE int64_t blocks() const { return (skip + n + kBlock - 1) / kBlock; }
};

template <class Job>
struct Batch {
  using Shared = typename Job::Shared;
  using Tensor = typename Job::Tensor;
  static constexpr int kCapacity = static_cast<int>((kParameterBytes - sizeof(Shared) - 8) / sizeof(Tensor));

  Shared shared;
  int32_t count;
  Tensor tensors[kCapacity];
};

template <class Job>
FASTCLIP_INLINE void run_thread(const Batch<Job>& batch, int tile, int thread) {
  static_assert(sizeof(Batch<Job>) <= kParameterBytes);
  int low = 0, high = batch.count;  // the last tensor that starts at this tile or before
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.tensors[middle].place.first_tile <= tile ? low : high) = middle;
  }
  const auto& tensor = batch.tensors[low];
  const int64_t block = int64_t{tile - tensor.place.first_tile} * kThreads + thread;
  if (block < tensor.place.blocks()) Job::run(batch.shared, tensor, block);
}

#if defined(__CUDACC__)
template <class Job>
__global__ void __launch_bounds__(kThreads) list_kernel(const __grid_constant__ Batch<Job> batch) {
  run_thread(batch, blockIdx.x, threadIdx.x);
}

// Key and nonce are parameters, so a graph would draw the same noise at every replay, and two results' difference has none.
inline const char* refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return status == cudaStreamCaptureStatusNone ? nullptr
                                               : "cannot be captured in a CUDA graph, which would draw the same noise again";
}

template <class Job>
const char* launch(const Batch<Job>& batch, int tiles, void* stream) {
  list_kernel<Job><<<tiles, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
template <class Job>
const char* launch(const Batch<Job>& batch, int tiles, void*) {
  for (int tile = 0; tile < tiles; ++tile)
    for (int thread = 0; thread < kThreads; ++thread) run_thread(batch, tile, thread);
  return nullptr;
}
#endif

// The work on all of the list, on this stream; what went wrong, or null.
template <class Job>
const char* run_list(const typename Job::Shared& shared, const std::vector<typename Job::Tensor>& list, void* stream) {
#if defined(__CUDACC__)
  if (const char* error = refuse_capture(static_cast<cudaStream_t>(stream))) return error;
#endif
  Batch<Job> batch{shared, 0, {}};
  int tiles = 0;
  for (size_t k = 0; k < list.size(); ++k) {
    if (list[k].place.n > 0) {
      auto& added = batch.tensors[batch.count++] = list[k];
      added.place.first_tile = tiles;
      tiles += static_cast<int>((added.place.blocks() + kThreads - 1) / kThreads);
    }
    if (batch.count == Batch<Job>::kCapacity || (k + 1 == list.size() && batch.count > 0)) {
      if (const char* error = launch(batch, tiles, stream)) return error;
      batch.count = tiles = 0;
    }
  }
  return nullptr;
}

}  // namespace fastclip::cuda
