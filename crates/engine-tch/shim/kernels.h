// Element-wise loops over row-major data, without libtorch. Compiled once for each x86-64 level (see build.rs); the
// best one that the machine has is taken at start. Every function works on rows [begin, end).
#pragma once
#include <cstdint>

template <typename T>
struct Kernels {
  // rstd = 1 / sqrt(mean(x^2) + eps), y = x * rstd * weight
  void (*rms_norm)(const T* x, const T* weight, T eps, T* rstd, T* y, int64_t width, int64_t begin, int64_t end);
  // y = x * rstd * weight
  void (*rms_norm_apply)(const T* x, const T* rstd, const T* weight, T* y, int64_t width, int64_t begin, int64_t end);
  // grad_x += rstd * (e - xhat * mean(e * xhat)), e = grad_y * weight, xhat = x * rstd
  void (*rms_norm_backward_add)(
      T* grad_x, const T* grad_y, const T* x, const T* rstd, const T* weight, int64_t width, int64_t begin, int64_t end);
  // Rotates pairs (j, j + half) of every head by sign * angle; row n has position n % tokens.
  void (*rotate)(
      const T* x, int64_t x_stride, T* y, int64_t y_stride, const T* cos, const T* sin, T sign, int64_t tokens,
      int64_t heads, int64_t half, int64_t begin, int64_t end);
  // act = silu(gate) * up, gate_up holding [gate | up]
  void (*swiglu)(const T* gate_up, T* act, int64_t width, int64_t begin, int64_t end);
  void (*swiglu_backward)(
      const T* grad_act, const T* gate_up, T* grad_gate_up, int64_t width, int64_t begin, int64_t end);
  void (*row_max)(const T* x, T* highest, int64_t width, int64_t begin, int64_t end);
  // x = exp(x - highest), sum = row sums of it
  void (*exp_sum)(T* x, const T* highest, T* sum, int64_t width, int64_t begin, int64_t end);
  // x *= scale / sum
  void (*scale_rows)(T* x, const T* sum, T scale, int64_t width, int64_t begin, int64_t end);
  // y = x * keep(row, column) * scale: keep is a hash of row key and feature not below the threshold
  void (*dropout)(
      const T* x, T* y, const int64_t* features, uint32_t key, uint32_t first_token, uint64_t threshold, T scale,
      int64_t width, int64_t begin, int64_t end);
};

namespace baseline {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
} // namespace baseline
namespace avx2 {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
} // namespace avx2
namespace avx512 {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
} // namespace avx512
