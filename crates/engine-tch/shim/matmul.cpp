// Products of matrices on the CPU by oneDNN, which libtorch brings along and uses for bf16 alone: in f32 its kernels are a
// tenth faster than those behind at::mm, and as exact.
#include "dispatch.h"

#include <ATen/ops/mm.h>
#include <torch/version.h>

static_assert(
    TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR == 11,
    "the declaration of mkldnn_matmul was checked against libtorch 2.11 only");

namespace at::native {
// result = beta * result + alpha * left right. Weak: some builds of libtorch are without it.
__attribute__((weak)) void mkldnn_matmul(
    const Tensor& left, const Tensor& right, const Tensor& result, float beta, float alpha);
} // namespace at::native

namespace {

bool plain(const at::Tensor& t) {
  return t.is_contiguous() || (t.stride(0) == 1 && t.stride(1) == t.size(0));
}

bool takes(const at::Tensor& left, const at::Tensor& right, const at::Tensor& out) {
  static const bool usable = at::native::mkldnn_matmul != nullptr && __builtin_cpu_supports("avx2");
  const auto fits = [](const at::Tensor& t) { return t.device().is_cpu() && t.scalar_type() == at::kFloat; };
  return usable && fits(left) && fits(right) && fits(out) && left.dim() == 2 && right.dim() == 2 && out.dim() == 2 &&
      left.size(0) == out.size(0) && left.size(1) == right.size(0) && right.size(1) == out.size(1) && plain(left) &&
      plain(right) && out.is_contiguous() && left.numel() > 0 && right.numel() > 0;
}
} // namespace

extern "C" {

// out = left right
char* esp_matmul(void* left, void* right, void* out) {
  return guard([&] {
    at::NoGradGuard no_grad;
    const at::Tensor &l = tensor(left), &r = tensor(right);
    at::Tensor& o = tensor(out);
    if (takes(l, r, o))
      at::native::mkldnn_matmul(l, r, o, 0.0f, 1.0f);
    else
      at::mm_out(o, l, r);
  });
}
}
