// What the binding calls: a job (NoiseStep<...>, ClipAccumulateNoise<...>) on a list of raw pointers, on a stream.
//
// No torch here and no CUDA header. Returns what went wrong, or null. kernels.cu has the definition and the jobs there are.
#pragma once

#include "clip_accumulate_noise.cuh"
#include "noise_step.cuh"

namespace fastclip::cuda {

template <class Job>
const char* enqueue(const typename Job::Shared& shared, const std::vector<typename Job::Tensor>& list, void* stream);

}  // namespace fastclip::cuda
