// Kernels that libtorch has not, compiled at run time for the device at hand, and by the tests for the CPU, where a block
// is one thread. Numbers are read and written as T and computed in f32.
//
// n rows (tokens) of a width each; everything contiguous unless a stride is given.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short bf16;

struct Args {
  void* p[8];
  i64 i[8];
  float f[4];
};

#ifndef ESPALIER_ON_HOST
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
DEVICE float of_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }

DEVICE float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset >>= 1)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// Of a block of whole warps; the same bits in all threads.
DEVICE float block_sum(float value) {
  __shared__ float parts[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  value = warp_sum(value);
  __syncthreads();
  if (lane == 0)
    parts[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? parts[lane] : 0.0f);
}
#define LANES 32
#endif

DEVICE float load(const float* from, i64 at) { return from[at]; }
DEVICE float load(const bf16* from, i64 at) { return of_bits(static_cast<u32>(from[at]) << 16); }
DEVICE void store(float* to, i64 at, float value) { to[at] = value; }
DEVICE void store(bf16* to, i64 at, float value) {
  const u32 bits = bits_of(value);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  to[at] = is_nan ? bf16(0x7FC0) : static_cast<bf16>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DEVICE i64 first() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
DEVICE i64 stride() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// y = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps). p: x weight rstd(f32) y; i: width; f: eps. A block a row.
template <typename T>
DEVICE void rms_norm(const Args& a) {
  const i64 width = a.i[0], row = blockIdx.x;
  const T *x = static_cast<const T*>(a.p[0]) + row * width, *weight = static_cast<const T*>(a.p[1]);
  T* y = static_cast<T*>(a.p[3]) + row * width;
  float squares = 0.0f;
  for (i64 j = threadIdx.x; j < width; j += blockDim.x) {
    const float value = load(x, j);
    squares += value * value;
  }
  const float rstd = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(width) + a.f[0]);
  if (threadIdx.x == 0)
    static_cast<float*>(a.p[2])[row] = rstd;
  for (i64 j = threadIdx.x; j < width; j += blockDim.x)
    store(y, j, load(x, j) * rstd * load(weight, j));
}

// p: x rstd(f32) weight y; i: width. A block a row.
template <typename T>
DEVICE void rms_norm_apply(const Args& a) {
  const i64 width = a.i[0], row = blockIdx.x;
  const T *x = static_cast<const T*>(a.p[0]) + row * width, *weight = static_cast<const T*>(a.p[2]);
  const float rstd = static_cast<const float*>(a.p[1])[row];
  T* y = static_cast<T*>(a.p[3]) + row * width;
  for (i64 j = threadIdx.x; j < width; j += blockDim.x)
    store(y, j, load(x, j) * rstd * load(weight, j));
}

// dx += rstd (e - xhat mean(e xhat)), e = dy weight, xhat = x rstd. p: dx dy x rstd(f32) weight; i: width. A block a row.
template <typename T>
DEVICE void rms_norm_backward_add(const Args& a) {
  const i64 width = a.i[0], row = blockIdx.x;
  T* grad_x = static_cast<T*>(a.p[0]) + row * width;
  const T *grad_y = static_cast<const T*>(a.p[1]) + row * width, *x = static_cast<const T*>(a.p[2]) + row * width;
  const float rstd = static_cast<const float*>(a.p[3])[row];
  const T* weight = static_cast<const T*>(a.p[4]);
  float along = 0.0f;
  for (i64 j = threadIdx.x; j < width; j += blockDim.x)
    along += load(grad_y, j) * load(weight, j) * load(x, j);
  const float slope = block_sum(along) * rstd * rstd / static_cast<float>(width);
  for (i64 j = threadIdx.x; j < width; j += blockDim.x)
    store(grad_x, j, load(grad_x, j) + rstd * (load(grad_y, j) * load(weight, j) - load(x, j) * slope));
}

// Turns pairs (j, j + half) of every head; row n has position n % tokens. p: x y cos sin [tokens, half];
// i: rows, x's row stride, tokens, heads, half; f: sign.
template <typename T>
DEVICE void rotate(const Args& a) {
  const i64 rows = a.i[0], x_stride = a.i[1], tokens = a.i[2], heads = a.i[3], half = a.i[4];
  const T *x = static_cast<const T*>(a.p[0]), *cos = static_cast<const T*>(a.p[2]), *sin = static_cast<const T*>(a.p[3]);
  T* y = static_cast<T*>(a.p[1]);
  for (i64 at = first(); at < rows * heads * half; at += stride()) {
    const i64 j = at % half, head = at / half % heads, row = at / half / heads;
    const i64 from = row * x_stride + head * 2 * half + j, to = (row * heads + head) * 2 * half + j;
    const i64 angle = row % tokens * half + j;
    const float left = load(x, from), right = load(x, from + half);
    const float c = load(cos, angle), s = a.f[0] * load(sin, angle);
    store(y, to, left * c - right * s);
    store(y, to + half, right * c + left * s);
  }
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// act = silu(gate) up. p: gate_up [rows, 2 width], act; i: rows, width.
template <typename T>
DEVICE void swiglu(const Args& a) {
  const i64 rows = a.i[0], width = a.i[1];
  const T* gate_up = static_cast<const T*>(a.p[0]);
  T* act = static_cast<T*>(a.p[1]);
  for (i64 at = first(); at < rows * width; at += stride()) {
    const i64 gate = at / width * 2 * width + at % width;
    const float g = load(gate_up, gate);
    store(act, at, g * sigmoid(g) * load(gate_up, gate + width));
  }
}

// p: d act, gate_up, d gate_up; i: rows, width.
template <typename T>
DEVICE void swiglu_backward(const Args& a) {
  const i64 rows = a.i[0], width = a.i[1];
  const T *grad_act = static_cast<const T*>(a.p[0]), *gate_up = static_cast<const T*>(a.p[1]);
  T* grad = static_cast<T*>(a.p[2]);
  for (i64 at = first(); at < rows * width; at += stride()) {
    const i64 gate = at / width * 2 * width + at % width;
    const float g = load(gate_up, gate), up = load(gate_up, gate + width), d = load(grad_act, at);
    const float gated = sigmoid(g);
    store(grad, gate, d * up * gated * (1.0f + g * (1.0f - gated)));
    store(grad, gate + width, d * g * gated);
  }
}

DEVICE u32 mix(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// y = x scale where the hash of token and feature is not below the threshold, else 0. p: x y features(i64);
// i: rows, width, key, first token, threshold; f: scale.
template <typename T>
DEVICE void dropout(const Args& a) {
  const i64 rows = a.i[0], width = a.i[1];
  const u32 key = static_cast<u32>(a.i[2]), first_token = static_cast<u32>(a.i[3]);
  const u64 threshold = static_cast<u64>(a.i[4]);
  const T* x = static_cast<const T*>(a.p[0]);
  T* y = static_cast<T*>(a.p[1]);
  const i64* features = static_cast<const i64*>(a.p[2]);
  for (i64 at = first(); at < rows * width; at += stride()) {
    const u32 row_key = mix(key ^ (first_token + static_cast<u32>(at / width)));
    const u32 hash = mix(row_key + static_cast<u32>(features[at % width]) * 0x9E3779B1u);
    store(y, at, hash >= threshold ? load(x, at) * a.f[0] : 0.0f);
  }
}

// out = q scale of the row. p: q(int8) scale(f32) out; i: rows, width.
template <typename T>
DEVICE void widen_int8(const Args& a) {
  const i64 rows = a.i[0], width = a.i[1];
  const signed char* q = static_cast<const signed char*>(a.p[0]);
  const float* scale = static_cast<const float*>(a.p[1]);
  T* out = static_cast<T*>(a.p[2]);
  for (i64 at = first(); at < rows * width; at += stride())
    store(out, at, static_cast<float>(q[at]) * scale[at / width]);
}

// Two weights a byte, 32 bytes a block. p: codes(u8) scale(f32) table(f32 [256, 2]) out; i: bytes.
// Codes and scales have rows of their own strides. i: lines, bytes a line, codes' row stride, scales' row stride.
template <typename T>
DEVICE void widen_nf4(const Args& a) {
  const i64 lines = a.i[0], bytes = a.i[1], codes_stride = a.i[2], scale_stride = a.i[3];
  const unsigned char* codes = static_cast<const unsigned char*>(a.p[0]);
  const float *scale = static_cast<const float*>(a.p[1]), *table = static_cast<const float*>(a.p[2]);
  T* out = static_cast<T*>(a.p[3]);
  for (i64 at = first(); at < lines * bytes; at += stride()) {
    const i64 line = at / bytes, byte = at % bytes;
    const int code = codes[line * codes_stride + byte];
    const float largest = scale[line * scale_stride + byte / 32];
    store(out, 2 * at, table[2 * code] * largest);
    store(out, 2 * at + 1, table[2 * code + 1] * largest);
  }
}

#ifdef LORA_RANK
// The score pass: |([dB | B] [A - dA ; dA]) (W + s B A)|, or its square, summed over rows or over columns. A thread has
// one column, whose factors stay in registers, and goes down a stretch of rows; W is read once.
// p: W(T) A dA(f32 [rank, columns]) B dB(f32 [rows, rank]) parts(f32);
// i: rows, columns, rows a block, what (0: sums of rows, 1: of columns), square (0 or 1); f: s.
// parts: [column blocks * warps, rows] for rows, [row blocks, columns] for columns.
template <typename T>
DEVICE void low_rank_scores(const Args& a) {
  const i64 rows = a.i[0], columns = a.i[1], per_block = a.i[2];
  const bool of_columns = a.i[3] != 0, square = a.i[4] != 0;
  const T* weight = static_cast<const T*>(a.p[0]);
  const float *fa = static_cast<const float*>(a.p[1]), *fda = static_cast<const float*>(a.p[2]);
  const float *fb = static_cast<const float*>(a.p[3]), *fdb = static_cast<const float*>(a.p[4]);
  float* parts = static_cast<float*>(a.p[5]);
  const i64 column = first();
  const bool inside = column < columns;
  float va[LORA_RANK], vda[LORA_RANK];
#pragma unroll
  for (int r = 0; r < LORA_RANK; r++) {
    va[r] = inside ? fa[r * columns + column] : 0.0f;
    vda[r] = inside ? fda[r * columns + column] : 0.0f;
  }
  const i64 begin = static_cast<i64>(blockIdx.y) * per_block;
  const i64 end = begin + per_block < rows ? begin + per_block : rows;
  const i64 warp = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
  float down = 0.0f;
  for (i64 row = begin; row < end; row++) {
    const float *b = fb + row * LORA_RANK, *db = fdb + row * LORA_RANK;
    float adapted = 0.0f, guide = 0.0f;
#pragma unroll
    for (int r = 0; r < LORA_RANK; r++) {
      adapted += b[r] * va[r];
      guide += db[r] * (va[r] - vda[r]) + b[r] * vda[r];
    }
    float score = 0.0f;
    if (inside) {
      const float product = guide * (load(weight, row * columns + column) + a.f[0] * adapted);
      score = square ? product * product : fabsf(product);
    }
    if (of_columns) {
      down += score;
    } else {
      const float sum = warp_sum(score);
      if (threadIdx.x % LANES == 0)
        parts[warp * rows + row] = sum;
    }
  }
  if (of_columns && inside)
    parts[static_cast<i64>(blockIdx.y) * columns + column] = down;
}
#endif

#define FOR_BOTH(name)                                   \
  KERNEL name##_f32(Args a) { name<float>(a); }          \
  KERNEL name##_bf16(Args a) { name<bf16>(a); }

FOR_BOTH(rms_norm)
FOR_BOTH(rms_norm_apply)
FOR_BOTH(rms_norm_backward_add)
FOR_BOTH(rotate)
FOR_BOTH(swiglu)
FOR_BOTH(swiglu_backward)
FOR_BOTH(dropout)
FOR_BOTH(widen_int8)
FOR_BOTH(widen_nf4)
#ifdef LORA_RANK
FOR_BOTH(low_rank_scores)
#endif
