#include "low_rank.h"
#include "vectors.h"

#include <algorithm>

namespace LEVEL {
namespace {

// Calls `tile<8>(0)`, `tile<8>(8)`, ... and the rest by 4, 2 and 1, so that the inner loops know how many they are.
template <typename F>
inline void by_eights(int64_t count, F&& tile) {
  int64_t at = 0;
  for (; at + 8 <= count; at += 8)
    tile(std::integral_constant<int, 8>(), at);
  if (count - at >= 4) {
    tile(std::integral_constant<int, 4>(), at);
    at += 4;
  }
  if (count - at >= 2) {
    tile(std::integral_constant<int, 2>(), at);
    at += 2;
  }
  if (count - at >= 1)
    tile(std::integral_constant<int, 1>(), at);
}

template <typename T, int Rows, int Thin>
inline void project_tile(
    const T* x, int64_t x_stride, const T* m, T* y, int64_t y_stride, T scale, int64_t width) {
  constexpr int64_t lanes = Vector<T>::lanes;
  Vec<T> sums[Rows][Thin] = {};
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) {
    Vec<T> in[Rows];
    for (int r = 0; r < Rows; r++)
      in[r] = load(x + r * x_stride + c);
    for (int j = 0; j < Thin; j++) {
      const Vec<T> factor = load(m + j * width + c);
      for (int r = 0; r < Rows; r++)
        sums[r][j] += in[r] * factor;
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < Thin; j++) {
      T sum = lane_sum<T>(sums[r][j]);
      for (int64_t rest = c; rest < width; rest++)
        sum += x[r * x_stride + rest] * m[j * width + rest];
      y[r * y_stride + j] = scale * sum;
    }
}

template <typename T>
void project(
    const T* x, int64_t x_stride, const T* m, T* y, int64_t y_stride, T scale, int64_t width, int64_t thin,
    int64_t begin, int64_t end) {
  constexpr int kRows = kManyRegisters ? 3 : 1;
  by_eights(thin, [&](auto count, int64_t j) {
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows)
      project_tile<T, kRows, count()>(
          x + n * x_stride, x_stride, m + j * width, y + n * y_stride + j, y_stride, scale, width);
    for (; n < end; n++)
      project_tile<T, 1, count()>(
          x + n * x_stride, x_stride, m + j * width, y + n * y_stride + j, y_stride, scale, width);
  });
}

template <typename T, int Vectors, int Thin>
inline void outer_tile(
    const T* l, int64_t l_stride, const T* x, int64_t x_stride, T* g, int64_t g_stride, int64_t rows) {
  constexpr int64_t lanes = Vector<T>::lanes;
  Vec<T> sums[Thin][Vectors];
  for (int j = 0; j < Thin; j++)
    for (int v = 0; v < Vectors; v++)
      sums[j][v] = load(g + j * g_stride + v * lanes);
  for (int64_t n = 0; n < rows; n++) {
    Vec<T> in[Vectors];
    for (int v = 0; v < Vectors; v++)
      in[v] = load(x + n * x_stride + v * lanes);
    for (int j = 0; j < Thin; j++) {
      const Vec<T> factor = all(l[n * l_stride + j]);
      for (int v = 0; v < Vectors; v++)
        sums[j][v] += factor * in[v];
    }
  }
  for (int j = 0; j < Thin; j++)
    for (int v = 0; v < Vectors; v++)
      store<T>(g + j * g_stride + v * lanes, sums[j][v]);
}

template <typename T>
void outer_add(
    const T* l, int64_t l_stride, const T* x, int64_t x_stride, T* g, int64_t rows, int64_t width, int64_t thin,
    int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vector<T>::lanes;
  constexpr int kVectors = kManyRegisters ? 3 : 1;
  // Rows whose part of x stays in the second-level cache from one tile of columns to the next.
  constexpr int64_t kRowBlock = 64;
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rows - first);
    const T *lb = l + first * l_stride, *xb = x + first * x_stride;
    int64_t c = begin;
    for (; c + kVectors * lanes <= end; c += kVectors * lanes)
      by_eights(thin, [&](auto size, int64_t j) {
        outer_tile<T, kVectors, size()>(lb + j, l_stride, xb + c, x_stride, g + j * width + c, width, count);
      });
    for (; c + lanes <= end; c += lanes)
      by_eights(thin, [&](auto size, int64_t j) {
        outer_tile<T, 1, size()>(lb + j, l_stride, xb + c, x_stride, g + j * width + c, width, count);
      });
    for (; c < end; c++)
      for (int64_t j = 0; j < thin; j++) {
        T sum = g[j * width + c];
        for (int64_t n = 0; n < count; n++)
          sum += lb[n * l_stride + j] * xb[n * x_stride + c];
        g[j * width + c] = sum;
      }
  }
}

template <typename T, int Rows, int Thin>
inline void expand_tile(
    const T* l, int64_t l_stride, const T* m, int64_t m_stride, T* y, int64_t y_stride, int64_t width) {
  constexpr int64_t lanes = Vector<T>::lanes;
  Vec<T> left[Rows][Thin];
  for (int r = 0; r < Rows; r++)
    for (int j = 0; j < Thin; j++)
      left[r][j] = all(l[r * l_stride + j]);
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) {
    Vec<T> sums[Rows];
    for (int r = 0; r < Rows; r++)
      sums[r] = load(y + r * y_stride + c);
    for (int j = 0; j < Thin; j++) {
      const Vec<T> factor = load(m + j * m_stride + c);
      for (int r = 0; r < Rows; r++)
        sums[r] += left[r][j] * factor;
    }
    for (int r = 0; r < Rows; r++)
      store<T>(y + r * y_stride + c, sums[r]);
  }
  for (; c < width; c++)
    for (int r = 0; r < Rows; r++) {
      T sum = y[r * y_stride + c];
      for (int j = 0; j < Thin; j++)
        sum += l[r * l_stride + j] * m[j * m_stride + c];
      y[r * y_stride + c] = sum;
    }
}

template <typename T>
void expand_add(
    const T* l, int64_t l_stride, const T* m, T* y, int64_t y_stride, int64_t width, int64_t thin, int64_t begin,
    int64_t end) {
  constexpr int kRows = kManyRegisters ? 3 : 1;
  // Columns whose part of m stays in the first-level cache from row to row.
  constexpr int64_t kColumnBlock = 512;
  for (int64_t first = 0; first < width; first += kColumnBlock) {
    const int64_t count = std::min(kColumnBlock, width - first);
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows)
      by_eights(thin, [&](auto size, int64_t j) {
        expand_tile<T, kRows, size()>(
            l + n * l_stride + j, l_stride, m + j * width + first, width, y + n * y_stride + first, y_stride, count);
      });
    for (; n < end; n++)
      by_eights(thin, [&](auto size, int64_t j) {
        expand_tile<T, 1, size()>(
            l + n * l_stride + j, l_stride, m + j * width + first, width, y + n * y_stride + first, y_stride, count);
      });
  }
}

template <typename T>
constexpr LowRank<T> table() {
  return {project<T>, outer_add<T>, expand_add<T>};
}

} // namespace

extern const LowRank<float> low_rank_f32 = table<float>();
extern const LowRank<double> low_rank_f64 = table<double>();
} // namespace LEVEL
