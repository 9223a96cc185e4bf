// Vectors of the widest registers that the level compiled for has, as GCC and Clang know them without intrinsics.
#pragma once
#include <cstdint>
#include <cstring>

namespace LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Whether there are 32 registers, so that 24 sums fit beside what they are made from.
constexpr bool kManyRegisters = kVectorBytes == 64;

template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};
template <typename T>
using Vec = typename Vector<T>::Type;

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}
// All lanes the same.
template <typename T>
inline Vec<T> all(T value) {
  return value - Vec<T>{};
}
template <typename T>
inline T lane_sum(Vec<T> v) {
  T sum = 0;
  for (int64_t lane = 0; lane < Vector<T>::lanes; lane++)
    sum += v[lane];
  return sum;
}

} // namespace
} // namespace LEVEL
