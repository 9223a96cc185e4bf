#include "exponential.h"
#include "kernels.h"

#include <cmath>

namespace LEVEL {
namespace {

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

template <typename T>
void rms_norm(const T* x, const T* weight, T eps, T* rstd, T* y, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* in = x + row * width;
    T* out = y + row * width;
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++)
      squares += in[i] * in[i];
    const T scale = T(1) / std::sqrt(squares / T(width) + eps);
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      out[i] = in[i] * scale * weight[i];
  }
}

template <typename T>
void rms_norm_apply(const T* x, const T* rstd, const T* weight, T* y, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* in = x + row * width;
    T* out = y + row * width;
    const T scale = rstd[row];
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      out[i] = in[i] * scale * weight[i];
  }
}

template <typename T>
void rms_norm_backward_add(
    T* grad_x, const T* grad_y, const T* x, const T* rstd, const T* weight, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* in = x + row * width;
    const T* grad = grad_y + row * width;
    T* out = grad_x + row * width;
    T along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < width; i++)
      along += grad[i] * weight[i] * in[i];
    const T scale = rstd[row];
    const T slope = along * scale * scale / T(width);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      out[i] += scale * (grad[i] * weight[i] - in[i] * slope);
  }
}

template <typename T>
void rotate(
    const T* x, int64_t x_stride, T* y, int64_t y_stride, const T* cos, const T* sin, T sign, int64_t tokens,
    int64_t heads, int64_t half, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* c = cos + (row % tokens) * half;
    const T* s = sin + (row % tokens) * half;
    for (int64_t head = 0; head < heads; head++) {
      const T* in = x + row * x_stride + head * 2 * half;
      T* out = y + row * y_stride + head * 2 * half;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        const T left = in[i], right = in[half + i], turn = sign * s[i];
        out[i] = left * c[i] - right * turn;
        out[half + i] = right * c[i] + left * turn;
      }
    }
  }
}

template <typename T>
void swiglu(const T* gate_up, T* act, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* gate = gate_up + row * 2 * width;
    const T* up = gate + width;
    T* out = act + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  }
}

template <typename T>
void swiglu_backward(
    const T* grad_act, const T* gate_up, T* grad_gate_up, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* gate = gate_up + row * 2 * width;
    const T* up = gate + width;
    const T* grad = grad_act + row * width;
    T* grad_gate = grad_gate_up + row * 2 * width;
    T* grad_up = grad_gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      const T gated = sigmoid(gate[i]);
      grad_gate[i] = grad[i] * up[i] * gated * (T(1) + gate[i] * (T(1) - gated));
      grad_up[i] = grad[i] * gate[i] * gated;
    }
  }
}

template <typename T>
void row_max(const T* x, T* highest, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* in = x + row * width;
    T most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < width; i++)
      most = in[i] > most ? in[i] : most;
    highest[row] = most;
  }
}

template <typename T>
void exp_sum(T* x, const T* highest, T* sum, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* values = x + row * width;
    const T most = highest[row];
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; i++) {
      const T value = exponential(values[i] - most);
      values[i] = value;
      total += value;
    }
    sum[row] = total;
  }
}

template <typename T>
void scale_rows(T* x, const T* sum, T scale, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* values = x + row * width;
    const T factor = scale / sum[row];
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      values[i] *= factor;
  }
}

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

template <typename T>
void dropout(
    const T* x, T* y, const int64_t* features, uint32_t key, uint32_t first_token, uint64_t threshold, T scale,
    int64_t width, int64_t begin, int64_t end) {
  const uint32_t bound = threshold > 0xFFFFFFFFu ? 0xFFFFFFFFu : static_cast<uint32_t>(threshold);
  for (int64_t row = begin; row < end; row++) {
    const T* in = x + row * width;
    T* out = y + row * width;
    const uint32_t row_key = mix(key ^ (first_token + static_cast<uint32_t>(row)));
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      const uint32_t hash = mix(row_key + static_cast<uint32_t>(features[i]) * 0x9E3779B1u);
      out[i] = hash >= bound ? in[i] * scale : T(0);
    }
  }
}

template <typename T>
constexpr Kernels<T> table() {
  return {
      rms_norm<T>, rms_norm_apply<T>, rms_norm_backward_add<T>, rotate<T>,  swiglu<T>,
      swiglu_backward<T>, row_max<T>, exp_sum<T>,               scale_rows<T>, dropout<T>};
}

} // namespace

extern const Kernels<float> f32 = table<float>();
extern const Kernels<double> f64 = table<double>();
} // namespace LEVEL
