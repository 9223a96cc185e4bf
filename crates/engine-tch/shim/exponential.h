#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace LEVEL {
namespace {

// exp by 2^k * p(r), |r| <= ln(2) / 2, p of degree 6: relative error below 2e-7. NaN stays NaN.
inline float exponential(float x) {
  x = x > 88.3762626647949f ? 88.3762626647949f : x;
  x = x < -87.3365447504019f ? -87.3365447504019f : x;
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to the nearest integer
  const float k = (x * 1.44269504088896341f + magic) - magic;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline double exponential(double x) {
  return std::exp(x);
}

} // namespace
} // namespace LEVEL
