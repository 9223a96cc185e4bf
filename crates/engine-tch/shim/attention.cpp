#include "attention.h"
#include "exponential.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>

namespace LEVEL {
namespace {

// Rows and vectors of a tile of sums that stays in registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kManyRegisters ? 4 : 2;
// Query positions worked on at a time.
constexpr int64_t kBlock = 48;

// c[r, n] = (c[r, n] if add) + sum over p of a[r * a_row + p * a_step] b[p * b_row + n]
template <typename T, int Rows, int Vectors>
void tile(
    const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t depth, bool add) {
  constexpr int64_t lanes = Vector<T>::lanes;
  Vec<T> sums[Rows][Vectors] = {};
  if (add)
    for (int r = 0; r < Rows; r++)
      for (int v = 0; v < Vectors; v++)
        sums[r][v] = load(c + r * c_row + v * lanes);
  for (int64_t p = 0; p < depth; p++) {
    Vec<T> right[Vectors];
    for (int v = 0; v < Vectors; v++)
      right[v] = load(b + p * b_row + v * lanes);
    for (int r = 0; r < Rows; r++) {
      const Vec<T> left = all(a[r * a_row + p * a_step]);
      for (int v = 0; v < Vectors; v++)
        sums[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < Vectors; v++)
      store<T>(c + r * c_row + v * lanes, sums[r][v]);
}

template <typename T, int Rows>
void tile_of_rows(
    const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t columns,
    int64_t depth, bool add) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t n = 0;
  for (; n + kTileVectors * lanes <= columns; n += kTileVectors * lanes)
    tile<T, Rows, kTileVectors>(a, a_row, a_step, b + n, b_row, c + n, c_row, depth, add);
  for (; n < columns; n += lanes)
    tile<T, Rows, 1>(a, a_row, a_step, b + n, b_row, c + n, c_row, depth, add);
}

// The product of up to kTileRows rows of `a` and `b`, whose columns are whole vectors.
template <typename T>
void multiply(
    int64_t rows, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* c, int64_t c_row,
    int64_t columns, int64_t depth, bool add) {
  switch (rows) {
    case 1: return tile_of_rows<T, 1>(a, a_row, a_step, b, b_row, c, c_row, columns, depth, add);
    case 2: return tile_of_rows<T, 2>(a, a_row, a_step, b, b_row, c, c_row, columns, depth, add);
    case 3: return tile_of_rows<T, 3>(a, a_row, a_step, b, b_row, c, c_row, columns, depth, add);
    case 4: return tile_of_rows<T, 4>(a, a_row, a_step, b, b_row, c, c_row, columns, depth, add);
    case 5: return tile_of_rows<T, 5>(a, a_row, a_step, b, b_row, c, c_row, columns, depth, add);
    default: return tile_of_rows<T, 6>(a, a_row, a_step, b, b_row, c, c_row, columns, depth, add);
  }
}

inline int64_t round_up(int64_t count, int64_t to) {
  return (count + to - 1) / to * to;
}

template <typename T>
int64_t padded(int64_t tokens) {
  return round_up(tokens, Vector<T>::lanes);
}

// to[d, t] = from[t, d], the rest of every row zero
template <typename T>
void transpose(const T* from, int64_t stride, int64_t tokens, int64_t width, T* to) {
  const int64_t row = padded<T>(tokens);
  for (int64_t first = 0; first < tokens; first += 16) {
    const int64_t last = std::min(first + 16, tokens);
    for (int64_t d = 0; d < width; d++)
      for (int64_t t = first; t < last; t++)
        to[d * row + t] = from[t * stride + d];
  }
  for (int64_t d = 0; d < width; d++)
    std::fill(to + d * row + tokens, to + (d + 1) * row, T(0));
}

template <typename T>
void pack(const T* from, int64_t stride, int64_t tokens, int64_t width, T* to, int64_t to_stride) {
  for (int64_t t = 0; t < tokens; t++)
    std::memcpy(to + t * to_stride, from + t * stride, width * sizeof(T));
}

template <typename T>
int64_t scratch_len(const AttentionShape& shape, bool backward) {
  const int64_t row = padded<T>(shape.tokens), matrix = row * shape.head_dim;
  return backward ? 5 * matrix + 2 * kBlock * row + 2 * kBlock * shape.head_dim : 2 * matrix + kBlock * row;
}

template <typename T>
void forward(const AttentionShape& shape, const T* q, const T* k, const T* v, T* out, T* log_sum_exp, T* scratch) {
  const int64_t tokens = shape.tokens, width = shape.head_dim, row = padded<T>(tokens);
  T *k_t = scratch, *values = k_t + row * width, *scores = values + row * width;
  transpose(k, shape.k_stride, tokens, width, k_t);
  pack(v, shape.v_stride, tokens, width, values, width);
  const T scale = T(1) / std::sqrt(T(width));
  for (int64_t head = 0; head < shape.shared_by; head++)
    for (int64_t first = 0; first < tokens; first += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, tokens - first), seen = first + rows;
      const int64_t columns = round_up(seen, Vector<T>::lanes);
      multiply(
          rows, q + first * shape.q_stride + head * width, shape.q_stride, 1, k_t, row, scores, row, columns, width,
          false);
      T inverse[kTileRows];
      for (int64_t r = 0; r < rows; r++) {
        T* score = scores + r * row;
        const int64_t valid = first + r + 1;
        T most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < valid; j++)
          most = score[j] > most ? score[j] : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < valid; j++) {
          const T value = exponential((score[j] - most) * scale);
          score[j] = value;
          sum += value;
        }
        for (int64_t j = valid; j < seen; j++)
          score[j] = 0;
        inverse[r] = T(1) / sum;
        log_sum_exp[head * tokens + first + r] = most * scale + std::log(sum);
      }
      T* to = out + first * shape.out_stride + head * width;
      multiply(rows, scores, row, 1, values, width, to, shape.out_stride, width, seen, false);
      for (int64_t r = 0; r < rows; r++) {
        T* values_out = to + r * shape.out_stride;
#pragma omp simd
        for (int64_t d = 0; d < width; d++)
          values_out[d] *= inverse[r];
      }
    }
}

template <typename T>
void backward(
    const AttentionShape& shape, const T* grad_out, const T* q, const T* k, const T* v, const T* out,
    const T* log_sum_exp, T* grad_q, T* grad_k, T* grad_v, const AttentionShape& grad_shape, T* scratch) {
  const int64_t tokens = shape.tokens, width = shape.head_dim, row = padded<T>(tokens), matrix = row * width;
  T *k_t = scratch, *v_t = k_t + matrix, *keys = v_t + matrix, *grad_keys = keys + matrix;
  T *grad_values = grad_keys + matrix, *likely = grad_values + matrix, *slopes = likely + kBlock * row;
  T *queries = slopes + kBlock * row, *grads = queries + kBlock * width;
  transpose(k, shape.k_stride, tokens, width, k_t);
  transpose(v, shape.v_stride, tokens, width, v_t);
  pack(k, shape.k_stride, tokens, width, keys, width);
  std::fill(grad_keys, grad_keys + 2 * matrix, T(0));
  const T scale = T(1) / std::sqrt(T(width));
  for (int64_t head = 0; head < shape.shared_by; head++)
    for (int64_t first = 0; first < tokens; first += kBlock) {
      const int64_t count = std::min(kBlock, tokens - first), block_end = first + count;
      const int64_t offset = first * shape.out_stride + head * width;
      pack(q + first * shape.q_stride + head * width, shape.q_stride, count, width, queries, width);
      pack(grad_out + offset, shape.out_stride, count, width, grads, width);
      for (int64_t at = 0; at < count; at += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, count - at), seen = first + at + rows;
        const int64_t columns = round_up(seen, Vector<T>::lanes);
        T *p = likely + at * row, *ds = slopes + at * row;
        multiply(rows, queries + at * width, width, 1, k_t, row, p, row, columns, width, false);
        multiply(rows, grads + at * width, width, 1, v_t, row, ds, row, columns, width, false);
        for (int64_t r = 0; r < rows; r++) {
          const T* result = out + offset + (at + r) * shape.out_stride;
          const T* grad = grads + (at + r) * width;
          T along = 0;
#pragma omp simd reduction(+ : along)
          for (int64_t d = 0; d < width; d++)
            along += result[d] * grad[d];
          const int64_t valid = first + at + r + 1;
          const T log_sum = log_sum_exp[head * tokens + first + at + r];
          T *pr = p + r * row, *dr = ds + r * row;
#pragma omp simd
          for (int64_t j = 0; j < valid; j++) {
            const T value = exponential(pr[j] * scale - log_sum);
            pr[j] = value;
            dr[j] = value * (dr[j] - along) * scale;
          }
          for (int64_t j = valid; j < block_end; j++)
            pr[j] = dr[j] = 0;
        }
        multiply(
            rows, ds, row, 1, keys, width, grad_q + (first + at) * grad_shape.q_stride + head * width,
            grad_shape.q_stride, width, seen, false);
      }
      for (int64_t j = 0; j < block_end; j += kTileRows) {
        const int64_t rows = std::min(int64_t(kTileRows), block_end - j);
        const int64_t skip = std::max<int64_t>(0, j - first);
        const int64_t from = skip * row + j, depth = count - skip;
        multiply(
            rows, likely + from, 1, row, grads + skip * width, width, grad_values + j * width, width, width, depth, true);
        multiply(
            rows, slopes + from, 1, row, queries + skip * width, width, grad_keys + j * width, width, width, depth, true);
      }
    }
  pack(grad_keys, width, tokens, width, grad_k, grad_shape.k_stride);
  pack(grad_values, width, tokens, width, grad_v, grad_shape.v_stride);
}

template <typename T>
constexpr Attention<T> attention_table() {
  return {Vector<T>::lanes, scratch_len<T>, forward<T>, backward<T>};
}

} // namespace

extern const Attention<float> attention_f32 = attention_table<float>();
extern const Attention<double> attention_f64 = attention_table<double>();
} // namespace LEVEL
