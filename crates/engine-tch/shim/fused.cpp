// The kernels on tensors: checked, chosen by machine and format, spread over libtorch's own threads.
#include "dispatch.h"
#include "kernels.h"

namespace {

template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float>& chosen = pick(avx512::f32, avx2::f32, baseline::f32);
  return chosen;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double>& chosen = pick(avx512::f64, avx2::f64, baseline::f64);
  return chosen;
}
} // namespace

extern "C" {

char* esp_rms_norm(void* x, void* weight, double eps, void* rstd, void* y) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    T *px = data<T>(x), *pw = data<T>(weight), *pr = data<T>(rstd), *py = data<T>(y);
    over_rows(rows, width, [&](int64_t b, int64_t e) { kernels<T>().rms_norm(px, pw, T(eps), pr, py, width, b, e); });
  });
}

char* esp_rms_norm_apply(void* x, void* rstd, void* weight, void* y) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    T *px = data<T>(x), *pr = data<T>(rstd), *pw = data<T>(weight), *py = data<T>(y);
    over_rows(rows, width, [&](int64_t b, int64_t e) { kernels<T>().rms_norm_apply(px, pr, pw, py, width, b, e); });
  });
}

char* esp_rms_norm_backward_add(void* grad_x, void* grad_y, void* x, void* rstd, void* weight) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    T *pg = data<T>(grad_x), *py = data<T>(grad_y), *px = data<T>(x), *pr = data<T>(rstd), *pw = data<T>(weight);
    over_rows(rows, width, [&](int64_t b, int64_t e) {
      kernels<T>().rms_norm_backward_add(pg, py, px, pr, pw, width, b, e);
    });
  });
}

// x, y: [n, heads * 2 half] views whose columns are contiguous; cos, sin: [tokens, half].
char* esp_rotate(void* x, void* y, void* cos, void* sin, double sign, int64_t heads) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    at::Tensor &in = tensor(x), &out = tensor(y);
    require(in.stride(1) == 1 && out.stride(1) == 1 && in.device().is_cpu(), "rotation needs contiguous columns");
    require(out.scalar_type() == in.scalar_type(), "rotation got tensors of different formats");
    const int64_t rows = in.size(0), tokens = tensor(cos).size(0), half = tensor(cos).size(1);
    require(in.size(1) == heads * 2 * half && out.size(1) == in.size(1), "rotation got other widths than its heads'");
    const T *px = in.data_ptr<T>(), *pc = data<T>(cos), *ps = data<T>(sin);
    T* py = out.data_ptr<T>();
    const int64_t xs = in.stride(0), ys = out.stride(0);
    over_rows(rows, heads * 2 * half, [&](int64_t b, int64_t e) {
      kernels<T>().rotate(px, xs, py, ys, pc, ps, T(sign), tokens, heads, half, b, e);
    });
  });
}

char* esp_swiglu(void* gate_up, void* act) {
  return dispatch(act, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(act).size(0), width = tensor(act).size(1);
    require(tensor(gate_up).size(1) == 2 * width, "swiglu got other widths than gate and up");
    T *pg = data<T>(gate_up), *pa = data<T>(act);
    over_rows(rows, 2 * width, [&](int64_t b, int64_t e) { kernels<T>().swiglu(pg, pa, width, b, e); });
  });
}

char* esp_swiglu_backward(void* grad_act, void* gate_up, void* grad_gate_up) {
  return dispatch(grad_act, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(grad_act).size(0), width = tensor(grad_act).size(1);
    require(tensor(gate_up).size(1) == 2 * width, "swiglu got other widths than gate and up");
    T *pa = data<T>(grad_act), *pg = data<T>(gate_up), *po = data<T>(grad_gate_up);
    over_rows(rows, 2 * width, [&](int64_t b, int64_t e) { kernels<T>().swiglu_backward(pa, pg, po, width, b, e); });
  });
}

char* esp_row_max(void* x, void* highest) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    T *px = data<T>(x), *ph = data<T>(highest);
    over_rows(rows, width, [&](int64_t b, int64_t e) { kernels<T>().row_max(px, ph, width, b, e); });
  });
}

char* esp_exp_sum(void* x, void* highest, void* sum) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    T *px = data<T>(x), *ph = data<T>(highest), *ps = data<T>(sum);
    over_rows(rows, width, [&](int64_t b, int64_t e) { kernels<T>().exp_sum(px, ph, ps, width, b, e); });
  });
}

char* esp_scale_rows(void* x, void* sum, double scale) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    T *px = data<T>(x), *ps = data<T>(sum);
    over_rows(rows, width, [&](int64_t b, int64_t e) { kernels<T>().scale_rows(px, ps, T(scale), width, b, e); });
  });
}

char* esp_dropout(
    void* x, void* y, void* features, uint32_t key, uint32_t first_token, uint64_t threshold, double scale) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = tensor(x).size(0), width = tensor(x).size(1);
    require(tensor(features).numel() == width, "dropout got other features than columns");
    T *px = data<T>(x), *py = data<T>(y);
    const int64_t* pf = data<int64_t>(features);
    over_rows(rows, width, [&](int64_t b, int64_t e) {
      kernels<T>().dropout(px, py, pf, key, first_token, threshold, T(scale), width, b, e);
    });
  });
}
}
