// Attention on tensors: [rows of tokens, tokens, heads, head_dim] views whose heads lie next to each other.
#include "attention.h"
#include "dispatch.h"

#include <memory>

namespace {

template <typename T>
const Attention<T>& attention();
template <>
const Attention<float>& attention<float>() {
  static const Attention<float>& chosen = pick(avx512::attention_f32, avx2::attention_f32, baseline::attention_f32);
  return chosen;
}
template <>
const Attention<double>& attention<double>() {
  static const Attention<double>& chosen = pick(avx512::attention_f64, avx2::attention_f64, baseline::attention_f64);
  return chosen;
}

// One tensor's elements and how they lie.
template <typename T>
struct Heads {
  T* at;
  int64_t rows, tokens, heads, head_dim, row_stride, stride;

  explicit Heads(void* p) : at(rows_of<T>(p)) {
    const at::Tensor& t = tensor(p);
    require(t.dim() == 4, "attention takes [rows, tokens, heads, head_dim]");
    rows = t.size(0), tokens = t.size(1), heads = t.size(2), head_dim = t.size(3);
    row_stride = t.stride(0), stride = t.stride(1);
    require(heads <= 1 || t.stride(2) == head_dim, "attention needs heads that lie next to each other");
  }
  T* of(int64_t row, int64_t head) const {
    return at + row * row_stride + head * head_dim;
  }
  bool fits(const Heads& other) const {
    return rows == other.rows && tokens == other.tokens && head_dim == other.head_dim;
  }
};

// The key/value heads of all rows, over the threads there are.
template <typename T, typename F>
void over_heads(const Heads<T>& q, const Heads<T>& k, int64_t scratch_len, const F& work) {
  at::parallel_for(0, k.rows * k.heads, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[scratch_len]);
    for (int64_t i = begin; i < end; i++)
      work(i / k.heads, i % k.heads, scratch.get());
  });
}

template <typename T>
AttentionShape shape_of(const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const Heads<T>& out) {
  require(
      q.fits(k) && q.fits(v) && q.fits(out) && v.heads == k.heads && out.heads == q.heads && k.heads > 0 &&
          q.heads % k.heads == 0,
      "attention got tensors that do not fit each other");
  require(q.head_dim % attention<T>().lanes == 0, "attention's kernel takes whole vectors of head_dim");
  return {q.tokens, q.heads / k.heads, q.head_dim, q.stride, k.stride, v.stride, out.stride};
}
} // namespace

extern "C" {

// What head_dim must be a multiple of, for elements of so many bytes.
int64_t esp_attention_lanes(int64_t element_bytes) {
  return element_bytes == 8 ? attention<double>().lanes : attention<float>().lanes;
}

// log_sum_exp: [rows, heads, tokens]
char* esp_attention(void* q, void* k, void* v, void* out, void* log_sum_exp) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    const Heads<T> hq(q), hk(k), hv(v), ho(out);
    const AttentionShape shape = shape_of(hq, hk, hv, ho);
    T* sums = data<T>(log_sum_exp);
    require(tensor(log_sum_exp).numel() == hq.rows * hq.heads * hq.tokens, "attention got other sums than heads");
    over_heads(hq, hk, attention<T>().scratch_len(shape, false), [&](int64_t row, int64_t head, T* scratch) {
      const int64_t query = head * shape.shared_by;
      attention<T>().forward(
          shape, hq.of(row, query), hk.of(row, head), hv.of(row, head), ho.of(row, query),
          sums + (row * hq.heads + query) * shape.tokens, scratch);
    });
  });
}

char* esp_attention_backward(
    void* grad_out, void* q, void* k, void* v, void* out, void* log_sum_exp, void* grad_q, void* grad_k,
    void* grad_v) {
  return dispatch(q, [&](auto zero) {
    using T = decltype(zero);
    const Heads<T> hq(q), hk(k), hv(v), ho(out), hg(grad_out), gq(grad_q), gk(grad_k), gv(grad_v);
    const AttentionShape shape = shape_of(hq, hk, hv, ho);
    const AttentionShape grad_shape = shape_of(gq, gk, gv, hg);
    require(grad_shape.shared_by == shape.shared_by && gk.heads == hk.heads && gq.fits(hq) && hg.stride == ho.stride,
        "attention got gradients that do not fit");
    const T* sums = data<T>(log_sum_exp);
    require(tensor(log_sum_exp).numel() == hq.rows * hq.heads * hq.tokens, "attention got other sums than heads");
    over_heads(hq, hk, attention<T>().scratch_len(shape, true), [&](int64_t row, int64_t head, T* scratch) {
      const int64_t query = head * shape.shared_by;
      attention<T>().backward(
          shape, hg.of(row, query), hq.of(row, query), hk.of(row, head), hv.of(row, head), ho.of(row, query),
          sums + (row * hq.heads + query) * shape.tokens, gq.of(row, query), gk.of(row, head), gv.of(row, head),
          grad_shape, scratch);
    });
  });
}
}
