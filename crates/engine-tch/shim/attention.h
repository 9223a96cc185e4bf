// Causal softmax attention of one key/value head of one row of tokens, with the query heads that it serves, forward and
// backward. Without libtorch; compiled once for each x86-64 level (see build.rs).
#pragma once
#include <cstdint>

// Data of token t lie t * stride elements from the first's; the query heads of the group lie next to each other.
struct AttentionShape {
  int64_t tokens, shared_by, head_dim;
  int64_t q_stride, k_stride, v_stride, out_stride;
};

template <typename T>
struct Attention {
  // head_dim must be a multiple of it.
  int64_t lanes;
  // Elements of scratch that each direction wants.
  int64_t (*scratch_len)(const AttentionShape& shape, bool backward);
  // out = softmax(q k^T / sqrt(head_dim)) v; log_sum_exp is [shared_by, tokens].
  void (*forward)(
      const AttentionShape& shape, const T* q, const T* k, const T* v, T* out, T* log_sum_exp, T* scratch);
  // Gradients lie like q, k and v; grad_out lies like out.
  void (*backward)(
      const AttentionShape& shape, const T* grad_out, const T* q, const T* k, const T* v, const T* out,
      const T* log_sum_exp, T* grad_q, T* grad_k, T* grad_v, const AttentionShape& grad_shape, T* scratch);
};

namespace baseline {
extern const Attention<float> attention_f32;
extern const Attention<double> attention_f64;
} // namespace baseline
namespace avx2 {
extern const Attention<float> attention_f32;
extern const Attention<double> attention_f64;
} // namespace avx2
namespace avx512 {
extern const Attention<float> attention_f32;
extern const Attention<double> attention_f64;
} // namespace avx512
