// The CUDA side of noise_adamw, noise_sgd and clip_accumulate_noise: arguments are checked, all before anything is launched.
//
// Semantics are those of csrc/cpu. Everything goes to torch's current stream of the tensors' device, and nothing waits.
#ifndef USE_CUDA
#define USE_CUDA  // torch declares the getter of its stream only then
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "launch.h"

namespace fastclip::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;

// Bytes [first, last), and whether they are written.
struct Range {
  uintptr_t first, last;
  bool written;
};

Range range_of(const Tensor& x, bool written) {
  const auto first = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return {first, first + x.numel() * x.element_size(), written};
}

void check_apart(const char* op, std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
  uintptr_t any = 0, written = 0;  // where those before end
  for (const Range& range : ranges) {
    if (range.first == range.last) continue;
    STD_TORCH_CHECK(range.first >= (range.written ? any : written), op, ": tensors share memory with one that is written");
    any = std::max(any, range.last);
    if (range.written) written = std::max(written, range.last);
  }
}

Noise noise_of(const char* op, const Tensor& key, int64_t nonce, double std, double scale) {
  STD_TORCH_CHECK(key.is_cpu() && key.scalar_type() == ScalarType::Byte && key.is_contiguous() && key.numel() == 32, op,
                  ": key must be 32 contiguous bytes on the CPU");
  Noise noise{{}, std, scale};
  std::memcpy(noise.stream.key, key.const_data_ptr(), 32);
  noise.stream.nonce = static_cast<uint64_t>(nonce);
  return noise;
}

// tensors[k].numel() elements from block blocks[k] on.
std::vector<Place> places_of(const char* op, const Tensors& tensors, const Integers& blocks, const Integers& skips) {
  STD_TORCH_CHECK(blocks.size() == tensors.size() && skips.size() == tensors.size(), op,
                  ": one block and one skip for each tensor");
  std::vector<Place> out;
  for (size_t k = 0; k < tensors.size(); ++k) {
    STD_TORCH_CHECK(0 <= skips[k] && skips[k] < kBlock, op, ": skip must be in [0, 8), got ", skips[k]);
    out.push_back({tensors[k].numel(), static_cast<uint64_t>(blocks[k]), static_cast<int32_t>(skips[k]), 0});
  }
  return out;
}

void check_device(const char* op, const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.device() == first.device(), op, ": tensors must be on one device");
}

// run(stream) on the device of x.
template <class F>
void on_device(const char* op, const Tensor& x, const F& run) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = run(stream);
  STD_TORCH_CHECK(!error, op, ": ", error);
}

// lists: of params, grads and state, in the order of Update's arrays. update(k): of parameter k.
template <class Update, class F>
void step(const char* op, std::initializer_list<const Tensors*> lists, const Noise& noise, const Integers& blocks,
          const Integers& skips, const F& update) {
  const Tensors& params = **lists.begin();
  const auto places = places_of(op, params, blocks, skips);
  std::vector<typename NoiseStep<Update>::Tensor> work(params.size());
  std::vector<Range> ranges;
  int array = 0;
  for (const Tensors* list : lists) {
    STD_TORCH_CHECK(list->size() == params.size(), op, ": params, grads and state must be lists of one length");
    for (size_t k = 0; k < params.size(); ++k) {
      const Tensor& x = (*list)[k];
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == params[k].numel(), op,
                      ": param, grad and state must be contiguous fp32 of one size");
      check_device(op, x, params[0]);
      ranges.push_back(range_of(x, true));
      work[k].at[array] = static_cast<float*>(x.mutable_data_ptr());
    }
    ++array;
  }
  check_apart(op, ranges);
  for (size_t k = 0; k < params.size(); ++k) {
    work[k].place = places[k];
    work[k].by = update(k);
  }
  if (!params.empty()) on_device(op, params[0], [&](void* stream) { return enqueue<NoiseStep<Update>>(noise, work, stream); });
}

void noise_adamw(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, double std, double scale, Tensor key,
                 int64_t nonce, Integers blocks, Integers skips, double lr, double beta1, double beta2, double eps,
                 double weight_decay, Integers steps) {
  const char* op = "noise_adamw";
  STD_TORCH_CHECK(steps.size() == params.size(), op, ": one step for each parameter");
  for (int64_t step : steps) STD_TORCH_CHECK(step >= 1, op, ": step counts from 1, got ", step);
  const auto update = [&](size_t k) {
    return AdamW{static_cast<float>(1 - lr * weight_decay),
                 static_cast<float>(1 - beta1),
                 static_cast<float>(beta2),
                 static_cast<float>(1 - beta2),
                 static_cast<float>(std::sqrt(1 - std::pow(beta2, steps[k]))),
                 static_cast<float>(eps),
                 static_cast<float>(lr / (1 - std::pow(beta1, steps[k])))};
  };
  step<AdamW>(op, {&params, &grads, &exp_avgs, &exp_avg_sqs}, noise_of(op, key, nonce, std, scale), blocks, skips, update);
}

void noise_sgd(Tensors params, Tensors grads, Tensors momentum_buffers, double std, double scale, Tensor key, int64_t nonce,
               Integers blocks, Integers skips, double lr, double momentum, double dampening, double weight_decay,
               bool nesterov, bool first) {
  const char* op = "noise_sgd";
  STD_TORCH_CHECK(momentum_buffers.size() == (momentum != 0 ? params.size() : 0), op,
                  ": momentum needs a buffer for each parameter, and only momentum does");
  const Noise noise = noise_of(op, key, nonce, std, scale);
  const float rate = lr, decay = weight_decay;
  const Momentum by{rate, decay, static_cast<float>(momentum), static_cast<float>(1 - dampening), nesterov, first};
  if (momentum != 0)
    step<Momentum>(op, {&params, &grads, &momentum_buffers}, noise, blocks, skips, [&](size_t) { return by; });
  else
    step<Sgd>(op, {&params, &grads}, noise, blocks, skips, [&](size_t) { return Sgd{rate, decay}; });
}

// f(type, T{}) with the C++ type of each dtype that the kernels take.
template <class F>
void by_each_dtype(const F& f) {
  f(ScalarType::Float, float{});
  f(ScalarType::BFloat16, BFloat16{});
  f(ScalarType::Half, Half{});
}

void check_dtype(const char* op, const Tensor& x) {
  bool known = false;
  by_each_dtype([&](ScalarType type, auto) { known = known || x.scalar_type() == type; });
  STD_TORCH_CHECK(known, op, ": grad_samples and outs must be fp32, bf16 or fp16");
}

void clip_accumulate_noise(Tensors grad_samples, Tensor factors_in, Tensors outs, double std, double scale, Tensor key,
                           int64_t nonce, Integers blocks, Integers skips) {
  const char* op = "clip_accumulate_noise";
  STD_TORCH_CHECK(scale == 1, op, ": scale must be 1, got ", scale);
  STD_TORCH_CHECK(outs.size() == grad_samples.size(), op, ": one out for each of grad_samples");
  STD_TORCH_CHECK(factors_in.dim() == 1, op, ": factors must be [U]");
  const Noise noise = noise_of(op, key, nonce, std, scale);
  const auto places = places_of(op, outs, blocks, skips);
  const int64_t units = factors_in.numel();
  for (size_t k = 0; k < outs.size(); ++k) {
    const Tensor& x = grad_samples[k];
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(0) == units && x.numel() == units * outs[k].numel(), op,
                    ": grad_samples must be [U, *out.shape], with U = ", units);
    STD_TORCH_CHECK(outs[k].is_contiguous(), op, ": outs must be contiguous");
    check_dtype(op, x);
    check_dtype(op, outs[k]);
    check_device(op, x, outs[0]);
    check_device(op, outs[k], outs[0]);
  }
  if (outs.empty()) return;
  check_device(op, factors_in, outs[0]);

  // What is not as the kernel reads it is copied; the copies outlive the launch on their own stream.
  const Tensor factors = torch::stable::contiguous(
      factors_in.scalar_type() == ScalarType::Double ? factors_in : torch::stable::to(factors_in, ScalarType::Double));
  std::vector<Range> ranges{range_of(factors, false)};
  for (size_t k = 0; k < outs.size(); ++k) {
    grad_samples[k] = torch::stable::contiguous(grad_samples[k]);
    ranges.push_back(range_of(grad_samples[k], false));
    ranges.push_back(range_of(outs[k], true));
  }
  check_apart(op, ranges);

  const Clipped shared{noise, static_cast<const double*>(factors.const_data_ptr()), units};
  by_each_dtype([&](ScalarType in_type, auto in) {
    by_each_dtype([&](ScalarType out_type, auto out) {
      using In = decltype(in);
      using Out = decltype(out);
      using Job = ClipAccumulateNoise<In, Out>;
      std::vector<typename Job::Tensor> work;
      for (size_t k = 0; k < outs.size(); ++k)
        if (grad_samples[k].scalar_type() == in_type && outs[k].scalar_type() == out_type)
          work.push_back({static_cast<const In*>(grad_samples[k].const_data_ptr()),
                          static_cast<Out*>(outs[k].mutable_data_ptr()), places[k]});
      if (!work.empty()) on_device(op, outs[0], [&](void* stream) { return enqueue<Job>(shared, work, stream); });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CUDA, m) {
  m.impl("noise_adamw", TORCH_BOX(&noise_adamw));
  m.impl("noise_sgd", TORCH_BOX(&noise_sgd));
  m.impl("clip_accumulate_noise", TORCH_BOX(&clip_accumulate_noise));
}

}  // namespace fastclip::cuda
