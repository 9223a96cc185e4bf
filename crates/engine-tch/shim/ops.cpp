// Tensor operations that training needs and tch's generated bindings leave out.
#include "group.h"

#include <ATen/ops/_fused_adamw.h>

extern "C" {

// One AdamW step in place on one flat parameter; `step` is an f32 scalar that the caller has counted up already.
char* esp_fused_adamw(
    void* param, void* grad, void* exp_avg, void* exp_avg_sq, void* step,
    double lr, double beta1, double beta2, double weight_decay, double eps) {
  return guard([&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> p{tensor(param)}, g{tensor(grad)}, m{tensor(exp_avg)}, v{tensor(exp_avg_sq)},
        s{tensor(step)};
    at::_fused_adamw_(p, g, m, v, {}, s, lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}
}
