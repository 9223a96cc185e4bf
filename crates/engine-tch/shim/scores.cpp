#include "scores.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>

namespace LEVEL {
namespace {

constexpr int64_t kLanes = Vector<float>::lanes;
constexpr int kRows = kManyRegisters ? 4 : 2;
constexpr int kVectors = kManyRegisters ? 2 : 1;
// Columns whose factors stay in the first-level cache from row to row.
constexpr int64_t kColumnBlock = 256;
// Rows summed in f32 before they are added to f64 sums.
constexpr int64_t kRowBlock = 64;

inline float widened(float value) {
  return value;
}
inline float widened(Bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline Vec<float> load_weight(const float* from) {
  return load(from);
}
inline Vec<float> load_weight(const Bf16* from) {
  float wide[kLanes];
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; lane++)
    wide[lane] = widened(from[lane]);
  return load(wide);
}

inline Vec<float> magnitude(Vec<float> v) {
  return v < 0.0f ? -v : v;
}

// Asks for the weights of the same columns, Rows rows on, while these are worked on: a row's part of a block is too short
// for the machine to see where reading goes next.
template <typename W, int Rows>
inline void prefetch(const Scored<W>& s, int64_t row, int64_t column) {
  constexpr int64_t bytes = kVectors * kLanes * sizeof(W);
  for (int r = 0; r < Rows; r++)
    for (int64_t at = 0; at < bytes; at += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(s.weight + (row + Rows + r) * s.weight_stride + column) + at);
}

// Scores of Rows rows and Vectors vectors of columns from `row` and `column` on.
template <typename W, int Rows, int Vectors>
inline void tile(const Scored<W>& s, int64_t row, int64_t column, Vec<float> (&scores)[Rows][Vectors]) {
  Vec<float> guide[Rows][Vectors] = {}, shift[Rows][Vectors] = {};
  for (int64_t j = 0; j < s.lora_rank; j++) {
    Vec<float> a[Vectors], a_less[Vectors], grad_a[Vectors];
    for (int v = 0; v < Vectors; v++) {
      const int64_t at = j * s.width + column + v * kLanes;
      a[v] = load(s.a + at), a_less[v] = load(s.a_less + at), grad_a[v] = load(s.grad_a + at);
    }
    for (int r = 0; r < Rows; r++) {
      const Vec<float> b = all(s.b[(row + r) * s.lora_rank + j]);
      const Vec<float> grad_b = all(s.grad_b[(row + r) * s.lora_rank + j]);
      for (int v = 0; v < Vectors; v++) {
        guide[r][v] += grad_b * a_less[v];
        guide[r][v] += b * grad_a[v];
        shift[r][v] += b * a[v];
      }
    }
  }
  for (int r = 0; r < Rows; r++)
    for (int v = 0; v < Vectors; v++) {
      const Vec<float> weight = load_weight(s.weight + (row + r) * s.weight_stride + column + v * kLanes);
      const Vec<float> value = guide[r][v] * (weight + s.scaling * shift[r][v]);
      scores[r][v] = s.square ? value * value : magnitude(value);
    }
}

// The same of one weight.
template <typename W>
inline float single(const Scored<W>& s, int64_t row, int64_t column) {
  float guide = 0, shift = 0;
  for (int64_t j = 0; j < s.lora_rank; j++) {
    const float b = s.b[row * s.lora_rank + j];
    guide += s.grad_b[row * s.lora_rank + j] * s.a_less[j * s.width + column];
    guide += b * s.grad_a[j * s.width + column];
    shift += b * s.a[j * s.width + column];
  }
  const float value = guide * (widened(s.weight[row * s.weight_stride + column]) + s.scaling * shift);
  return s.square ? value * value : std::fabs(value);
}

template <typename W, int Rows>
inline void rows_of_block(const Scored<W>& s, int64_t row, int64_t first, int64_t last, double* sums) {
  Vec<float> totals[Rows] = {};
  int64_t c = first;
  for (; c + kVectors * kLanes <= last; c += kVectors * kLanes) {
    prefetch<W, Rows>(s, row, c);
    Vec<float> scores[Rows][kVectors];
    tile(s, row, c, scores);
    for (int r = 0; r < Rows; r++)
      for (int v = 0; v < kVectors; v++)
        totals[r] += scores[r][v];
  }
  for (int r = 0; r < Rows; r++) {
    double sum = lane_sum<float>(totals[r]);
    for (int64_t rest = c; rest < last; rest++)
      sum += single(s, row + r, rest);
    sums[row + r] += sum;
  }
}

template <typename W>
void by_row(const Scored<W>& s, double* sums, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < s.width; first += kColumnBlock) {
    const int64_t last = std::min(first + kColumnBlock, s.width);
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows)
      rows_of_block<W, kRows>(s, row, first, last, sums);
    for (; row < end; row++)
      rows_of_block<W, 1>(s, row, first, last, sums);
  }
}

template <typename W, int Rows>
inline void add_rows(const Scored<W>& s, int64_t row, int64_t first, int64_t last, float* part) {
  int64_t c = first;
  for (; c + kVectors * kLanes <= last; c += kVectors * kLanes) {
    prefetch<W, Rows>(s, row, c);
    Vec<float> scores[Rows][kVectors];
    tile(s, row, c, scores);
    for (int v = 0; v < kVectors; v++) {
      Vec<float> sum = load(part + c - first + v * kLanes);
      for (int r = 0; r < Rows; r++)
        sum += scores[r][v];
      store<float>(part + c - first + v * kLanes, sum);
    }
  }
  for (; c < last; c++)
    for (int r = 0; r < Rows; r++)
      part[c - first] += single(s, row + r, c);
}

template <typename W>
void by_column(const Scored<W>& s, int64_t rows, double* sums, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kColumnBlock) {
    const int64_t last = std::min(first + kColumnBlock, end);
    for (int64_t start = 0; start < rows; start += kRowBlock) {
      const int64_t stop = std::min(start + kRowBlock, rows);
      float part[kColumnBlock] = {};
      int64_t row = start;
      for (; row + kRows <= stop; row += kRows)
        add_rows<W, kRows>(s, row, first, last, part);
      for (; row < stop; row++)
        add_rows<W, 1>(s, row, first, last, part);
      for (int64_t c = first; c < last; c++)
        sums[c] += part[c - first];
    }
  }
}

} // namespace

extern const Scores<float> scores_f32 = {by_row<float>, by_column<float>};
extern const Scores<Bf16> scores_bf16 = {by_row<Bf16>, by_column<Bf16>};
} // namespace LEVEL
