// Rows gathered by unit: what the kernels take from tensors a [N, d] and offsets [U + 1], and how they are checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "dispatch.h"

extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));  // where torch carries MKL

namespace fastclip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Rows {
  const T* data;
  int64_t stride, columns;
  const T* row(int64_t t) const { return data + t * stride; }
};

// x [N, d] in this dtype with rows the BLAS can walk: itself if it is so already.
inline Tensor dense_rows(const Tensor& x, ScalarType type) {
  const Tensor same = x.scalar_type() == type ? x : torch::stable::to(x, type);
  const bool walks = same.stride(1) == 1 && same.stride(0) >= same.size(1) && same.stride(0) < INT32_MAX;
  return walks ? same : torch::stable::contiguous(same);
}

template <class T>
Rows<T> rows_of(const Tensor& x) {
  // One row may have any stride, and the BLAS refuses one below the number of columns.
  return {static_cast<const T*>(x.const_data_ptr()), x.size(0) > 1 ? x.stride(0) : x.size(1), x.size(1)};
}

inline std::vector<int64_t> integers(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Int && x.is_contiguous()) {
    const auto* values = static_cast<const int32_t*>(x.const_data_ptr());
    return {values, values + x.numel()};
  }
  const Tensor wide = torch::stable::contiguous(x.scalar_type() == ScalarType::Long ? x : torch::stable::to(x, ScalarType::Long));
  const auto* values = static_cast<const int64_t*>(wide.const_data_ptr());
  return {values, values + wide.numel()};
}

inline std::vector<int64_t> bounds_of(const char* op, const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.numel() > 0, op, ": offsets must be [U + 1]");
  const auto type = offsets.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": offsets must be int32 or int64");
  std::vector<int64_t> bounds = integers(offsets);
  STD_TORCH_CHECK(bounds.front() == 0 && bounds.back() == rows && std::is_sorted(bounds.begin(), bounds.end()), op,
                  ": offsets must rise from 0 to the number of rows, ", rows);
  return bounds;
}

// [U] in fp64.
inline std::vector<double> factors_of(const char* op, const Tensor& factors, int64_t units) {
  STD_TORCH_CHECK(factors.dim() == 1 && factors.numel() == units, op, ": factors must be [U], with U = ", units);
  const Tensor wide = torch::stable::contiguous(
      factors.scalar_type() == ScalarType::Double ? factors : torch::stable::to(factors, ScalarType::Double));
  const auto* values = static_cast<const double*>(wide.const_data_ptr());
  return {values, values + units};
}

// f(T{}) with the C++ type of a floating dtype.
template <class F>
void by_dtype(const char* op, ScalarType type, const F& f) {
  if (type == ScalarType::Float)
    f(float{});
  else if (type == ScalarType::Double)
    f(double{});
  else if (type == ScalarType::BFloat16)
    f(c10::BFloat16{});
  else if (type == ScalarType::Half)
    f(c10::Half{});
  else
    STD_TORCH_CHECK(false, op, ": inputs must be floating point");
}

// The narrowest dtype that holds both.
inline ScalarType common(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// While it lasts, this thread's products by MKL are for one thread: MKL chooses by the number that it could have, also where it
// gets one, and bits would depend on it.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;

 private:
  const int before_;
};

// work(task, scratch) for each task in [0, count): a thread takes those of its own part in order, then what others have left.
// Neighbours stay on one thread, where earlier layers left their rows in cache. Each writes to a place of its own, so that
// neither order nor number of threads shows anywhere; and a task that were alone outside a parallel region would have its
// products split among threads by the BLAS.
template <class Scratch, class F>
void over_tasks(int64_t count, const F& work) {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  if (count == 0) return;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(count, 2));
  std::vector<Part> parts(threads);
  for (int64_t i = 0; i < threads; ++i) parts[i].next = i * count / threads, parts[i].end = (i + 1) * count / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;  // kept: buffers of a few MB that come and go would fragment the heap
    if (begin == end) return;
    const OneThread one;
    for (int64_t i = 0; i < threads; ++i) {
      Part& part = parts[(begin + i) % threads];
      for (int64_t t; (t = part.next++) < part.end;) work(t, scratch);
    }
  });
}

}  // namespace fastclip
