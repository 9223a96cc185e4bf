// Sums of LoRA-guided scores over the rows or columns of a weight, in one read of it and with nothing stored of its size.
// Without libtorch; compiled once for each x86-64 level (see build.rs).
#pragma once
#include <cstdint>

// bf16 as it lies in memory.
struct Bf16 {
  uint16_t bits;
};

// A weight [rows, width] with its factors and their gradients, all row-major; a_less is a - grad_a.
template <typename W>
struct Scored {
  const W* weight;
  int64_t weight_stride, width, lora_rank;
  const float *a, *a_less, *grad_a; // [lora_rank, width]
  const float *b, *grad_b; // [rows, lora_rank]
  float scaling;
  bool square;
};

// Of the value grad_b a_less + b grad_a times weight + scaling b a, absolute or squared.
template <typename W>
struct Scores {
  // sums[row] += over all columns, for rows of [begin, end)
  void (*by_row)(const Scored<W>& scored, double* sums, int64_t begin, int64_t end);
  // sums[column] += over all rows, for columns of [begin, end)
  void (*by_column)(const Scored<W>& scored, int64_t rows, double* sums, int64_t begin, int64_t end);
};

namespace baseline {
extern const Scores<float> scores_f32;
extern const Scores<Bf16> scores_bf16;
} // namespace baseline
namespace avx2 {
extern const Scores<float> scores_f32;
extern const Scores<Bf16> scores_bf16;
} // namespace avx2
namespace avx512 {
extern const Scores<float> scores_f32;
extern const Scores<Bf16> scores_bf16;
} // namespace avx512
