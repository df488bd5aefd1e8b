// The kernels that there are, and no torch: nvcc alone compiles this file, and g++ compiles it to loops.
#include "launch.h"

namespace fastclip::cuda {

template <class Job>
const char* enqueue(const typename Job::Shared& shared, const std::vector<typename Job::Tensor>& list, void* stream) {
  return run_list<Job>(shared, list, stream);
}

#define FASTCLIP_JOB(...) \
  template const char* enqueue<__VA_ARGS__>(const __VA_ARGS__::Shared&, const std::vector<__VA_ARGS__::Tensor>&, void*);
FASTCLIP_JOB(NoiseStep<AdamW>)
FASTCLIP_JOB(NoiseStep<Sgd>)
FASTCLIP_JOB(NoiseStep<Momentum>)
FASTCLIP_JOB(ClipAccumulateNoise<float, float>)
FASTCLIP_JOB(ClipAccumulateNoise<float, BFloat16>)
FASTCLIP_JOB(ClipAccumulateNoise<float, Half>)
FASTCLIP_JOB(ClipAccumulateNoise<BFloat16, float>)
FASTCLIP_JOB(ClipAccumulateNoise<BFloat16, BFloat16>)
FASTCLIP_JOB(ClipAccumulateNoise<BFloat16, Half>)
FASTCLIP_JOB(ClipAccumulateNoise<Half, float>)
FASTCLIP_JOB(ClipAccumulateNoise<Half, BFloat16>)
FASTCLIP_JOB(ClipAccumulateNoise<Half, Half>)

}  // namespace fastclip::cuda
