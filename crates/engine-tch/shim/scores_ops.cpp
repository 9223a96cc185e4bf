// The score pass on tensors.
#include "dispatch.h"
#include "scores.h"

namespace {

template <typename W>
const Scores<W>& kernels();
template <>
const Scores<float>& kernels<float>() {
  static const Scores<float>& chosen = pick(avx512::scores_f32, avx2::scores_f32, baseline::scores_f32);
  return chosen;
}
template <>
const Scores<Bf16>& kernels<Bf16>() {
  static const Scores<Bf16>& chosen = pick(avx512::scores_bf16, avx2::scores_bf16, baseline::scores_bf16);
  return chosen;
}

constexpr int64_t kRowGrain = 16, kColumnGrain = 256;

template <typename W>
void add(const Scored<W>& scored, int64_t rows, bool by_column, double* sums) {
  const int64_t count = by_column ? scored.width : rows, grain = by_column ? kColumnGrain : kRowGrain;
  at::parallel_for(0, (count + grain - 1) / grain, 1, [&](int64_t b, int64_t e) {
    const int64_t begin = b * grain, end = std::min(e * grain, count);
    if (by_column)
      kernels<W>().by_column(scored, rows, sums, begin, end);
    else
      kernels<W>().by_row(scored, sums, begin, end);
  });
}
} // namespace

extern "C" {

// Adds to f64 sums of rows or columns; the weight is f32 or bf16, everything else f32.
char* esp_low_rank_scores(
    void* weight, void* a, void* a_less, void* grad_a, void* b, void* grad_b, double scaling, bool square,
    bool by_column, void* sums) {
  return guard([&] {
    at::Tensor& w = tensor(weight);
    require(w.device().is_cpu() && w.dim() == 2 && w.is_contiguous(), "scores need a contiguous weight on the CPU");
    const int64_t rows = w.size(0), width = w.size(1), lora_rank = tensor(a).size(0);
    for (void* factor : {a, a_less, grad_a})
      require(tensor(factor).dim() == 2 && tensor(factor).size(0) == lora_rank && tensor(factor).size(1) == width,
          "scores got other factors than the weight's");
    for (void* factor : {b, grad_b})
      require(tensor(factor).dim() == 2 && tensor(factor).size(0) == rows && tensor(factor).size(1) == lora_rank,
          "scores got other factors than the weight's");
    require(tensor(sums).numel() == (by_column ? width : rows), "scores got another length of sums");
    const auto run = [&](const auto* elements) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(elements)>>;
      const Scored<W> scored = {elements, width, width, lora_rank, data<float>(a), data<float>(a_less),
          data<float>(grad_a), data<float>(b), data<float>(grad_b), float(scaling), square};
      add(scored, rows, by_column, data<double>(sums));
    };
    switch (w.scalar_type()) {
      case at::kFloat: run(w.data_ptr<float>()); break;
      case at::kBFloat16: run(reinterpret_cast<const Bf16*>(w.data_ptr())); break;
      default: throw std::invalid_argument("scores take weights in f32 or bf16");
    }
  });
}
}
