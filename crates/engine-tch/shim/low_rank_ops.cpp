// The thin products on tensors. Activations may be views of some columns of a wider one.
#include "dispatch.h"
#include "low_rank.h"

namespace {

template <typename T>
const LowRank<T>& low_rank();
template <>
const LowRank<float>& low_rank<float>() {
  static const LowRank<float>& chosen = pick(avx512::low_rank_f32, avx2::low_rank_f32, baseline::low_rank_f32);
  return chosen;
}
template <>
const LowRank<double>& low_rank<double>() {
  static const LowRank<double>& chosen = pick(avx512::low_rank_f64, avx2::low_rank_f64, baseline::low_rank_f64);
  return chosen;
}

// x is [rows, width], l [rows, thin], m [thin, width].
void check(void* x, void* l, void* m) {
  const bool fits = tensor(x).dim() == 2 && tensor(l).dim() == 2 && tensor(m).dim() == 2 &&
      tensor(x).size(0) == tensor(l).size(0) && tensor(l).size(1) == tensor(m).size(0) &&
      tensor(x).size(1) == tensor(m).size(1);
  require(fits, "a thin product got tensors that do not fit each other");
}
} // namespace

extern "C" {

// y = scale * x m^T
char* esp_project(void* x, void* m, double scale, void* y) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(x, y, m);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1), thin = tensor(m).size(0);
    const int64_t xs = tensor(x).stride(0), ys = tensor(y).stride(0);
    T *px = rows_of<T>(x), *pm = data<T>(m), *py = rows_of<T>(y);
    over_rows(rows, width, [&](int64_t b, int64_t e) {
      low_rank<T>().project(px, xs, pm, py, ys, T(scale), width, thin, b, e);
    });
  });
}

// g += l^T x
char* esp_outer_add(void* l, void* x, void* g) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    check(x, l, g);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1), thin = tensor(g).size(0);
    const int64_t xs = tensor(x).stride(0), ls = tensor(l).stride(0);
    T *pl = rows_of<T>(l), *px = rows_of<T>(x), *pg = data<T>(g);
    // Threads take columns, so that every sum has the order of the rows.
    const int64_t grain = 64;
    at::parallel_for(0, (width + grain - 1) / grain, 1, [&](int64_t b, int64_t e) {
      low_rank<T>().outer_add(pl, ls, px, xs, pg, rows, width, thin, b * grain, std::min(e * grain, width));
    });
  });
}

// y += l m
char* esp_expand_add(void* l, void* m, void* y) {
  return dispatch(y, [&](auto zero) {
    using T = decltype(zero);
    check(y, l, m);
    const int64_t rows = tensor(y).size(0), width = tensor(y).size(1), thin = tensor(m).size(0);
    const int64_t ys = tensor(y).stride(0), ls = tensor(l).stride(0);
    T *pl = rows_of<T>(l), *pm = data<T>(m), *py = rows_of<T>(y);
    over_rows(rows, width, [&](int64_t b, int64_t e) {
      low_rank<T>().expand_add(pl, ls, pm, py, ys, width, thin, b, e);
    });
  });
}
}
