// Scratch memory that grows and stays, at addresses that are multiples of 64: the BLAS may round otherwise where memory lies
// otherwise, and results must not depend on which thread's scratch a task gets.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastclip {

template <class T>
class Buffer {
 public:
  // Room for n; what it held is lost where it grows.
  T* get(int64_t n) {
    if (n > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = n;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace fastclip
