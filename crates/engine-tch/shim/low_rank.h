// Products of a tall activation and a thin factor, which general matrix routines do at a fifth of their rate. Without
// libtorch; compiled once for each x86-64 level (see build.rs). Rows lie `*_stride` elements apart; columns are contiguous.
// Every sum runs in an order that depends on the shapes alone, not on how the work is spread over threads.
#pragma once
#include <cstdint>

template <typename T>
struct LowRank {
  // y[n, j] = scale * sum over c of x[n, c] m[j, c], for rows n of [begin, end); m is [thin, width]
  void (*project)(
      const T* x, int64_t x_stride, const T* m, T* y, int64_t y_stride, T scale, int64_t width, int64_t thin,
      int64_t begin, int64_t end);
  // g[j, c] += sum over n of l[n, j] x[n, c], for columns c of [begin, end); g is [thin, width]
  void (*outer_add)(
      const T* l, int64_t l_stride, const T* x, int64_t x_stride, T* g, int64_t rows, int64_t width, int64_t thin,
      int64_t begin, int64_t end);
  // y[n, c] += sum over j of l[n, j] m[j, c], for rows n of [begin, end); m is [thin, width]
  void (*expand_add)(
      const T* l, int64_t l_stride, const T* m, T* y, int64_t y_stride, int64_t width, int64_t thin, int64_t begin,
      int64_t end);
};

namespace baseline {
extern const LowRank<float> low_rank_f32;
extern const LowRank<double> low_rank_f64;
} // namespace baseline
namespace avx2 {
extern const LowRank<float> low_rank_f32;
extern const LowRank<double> low_rank_f64;
} // namespace avx2
namespace avx512 {
extern const LowRank<float> low_rank_f32;
extern const LowRank<double> low_rank_f64;
} // namespace avx512
