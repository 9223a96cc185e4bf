// What every kernel on tensors does alike: choosing the build for this machine, checking, spreading over threads.
#pragma once
#include "group.h"

#include <ATen/Parallel.h>

template <typename K>
const K& pick(const K& best, const K& middle, const K& least) {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return best;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return middle;
  return least;
}

inline void require(bool holds, const char* what) {
  if (!holds)
    throw std::invalid_argument(what);
}

// Data of a contiguous CPU tensor of the expected format.
template <typename T>
T* data(void* p) {
  at::Tensor& t = tensor(p);
  require(t.device().is_cpu() && t.is_contiguous(), "a fused kernel needs contiguous CPU tensors");
  require(t.scalar_type() == c10::CppTypeToScalarType<T>::value, "a fused kernel got tensors of different formats");
  return t.data_ptr<T>();
}

// Data of a CPU tensor of the expected format whose last dimension is contiguous.
template <typename T>
T* rows_of(void* p) {
  at::Tensor& t = tensor(p);
  require(
      t.device().is_cpu() && t.dim() > 0 && (t.stride(-1) == 1 || t.size(-1) <= 1),
      "a fused kernel needs CPU tensors with contiguous columns");
  require(t.scalar_type() == c10::CppTypeToScalarType<T>::value, "a fused kernel got tensors of different formats");
  return t.data_ptr<T>();
}

// Runs `work(begin, end)` over rows, `width` elements each, on the threads there are.
template <typename F>
void over_rows(int64_t rows, int64_t width, const F& work) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1));
  at::parallel_for(0, rows, grain, work);
}

template <typename F>
char* dispatch(void* p, F&& f) {
  return guard([&] {
    switch (tensor(p).scalar_type()) {
      case at::kFloat: f(float()); break;
      case at::kDouble: f(double()); break;
      default: throw std::invalid_argument("a fused kernel takes f32 or f64");
    }
  });
}
