// One row of logits and the block of threads that reads it: element types, vectors of 8 columns, the row's pieces,
// and reductions over the block.
//
// A row is [head | vectors of 8 columns | tail]. The head is the shortest that leaves every operand of the row on a
// 16-byte boundary; operands whose boundaries never meet are read column by column. Thread i takes vectors i, i + 256,
// ..., and of the loose columns of head and tail again each 256th, so that what a thread sums does not depend on timing.

#ifndef MEGATRON_TCOD_ROWS_CUH
#define MEGATRON_TCOD_ROWS_CUH

#include "device.cuh"

namespace tcod {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;  // columns
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return float_of_bits(0x7f800000u); }

struct alignas(16) Quad {
  uint32_t word[4];
};

template <int kDtype>
struct Element;

template <>
struct Element<TCOD_FP32> {
  using Storage = float;
  using Maximum = float;  // running maximum of one thread
  static constexpr int kQuads = 2;
  static __device__ __forceinline__ float value(float stored) { return stored; }
  static __device__ __forceinline__ float at(const Quad* quads, int i) { return float_of_bits(quads[i / 4].word[i % 4]); }
  static __device__ __forceinline__ Maximum lowest() { return -infinity(); }
  static __device__ __forceinline__ float widest(Maximum maximum) { return maximum; }
  static __device__ __forceinline__ Maximum max_word(Maximum maximum, uint32_t word) {
    return max_nan(maximum, float_of_bits(word));
  }
};

template <>
struct Element<TCOD_BF16> {
  using Storage = uint16_t;
  using Maximum = uint32_t;  // two of them
  static constexpr int kQuads = 1;
  static __device__ __forceinline__ float value(uint16_t stored) { return float_of_bits(uint32_t(stored) << 16); }
  static __device__ __forceinline__ float at(const Quad* quads, int i) {
    const uint32_t word = quads[0].word[i / 2];
    return float_of_bits(i % 2 ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ Maximum lowest() { return 0xff80ff80u; }
  static __device__ __forceinline__ float widest(Maximum maximum) {
    return max_nan(float_of_bits(maximum & 0xffff0000u), float_of_bits(maximum << 16));
  }
  static __device__ __forceinline__ Maximum max_word(Maximum maximum, uint32_t word) {
    return max_nan_bf16x2(maximum, word);
  }
};

template <>
struct Element<TCOD_FP16> {
  using Storage = uint16_t;
  using Maximum = uint32_t;
  static constexpr int kQuads = 1;
  static __device__ __forceinline__ float value(uint16_t stored) { return float_of_fp16(stored); }
  static __device__ __forceinline__ float at(const Quad* quads, int i) {
    const uint32_t word = quads[0].word[i / 2];
    return float_of_fp16(static_cast<uint16_t>(i % 2 ? word >> 16 : word));
  }
  static __device__ __forceinline__ Maximum lowest() { return 0xfc00fc00u; }
  static __device__ __forceinline__ float widest(Maximum maximum) {
    return max_nan(float_of_fp16(maximum >> 16), float_of_fp16(static_cast<uint16_t>(maximum)));
  }
  static __device__ __forceinline__ Maximum max_word(Maximum maximum, uint32_t word) {
    return max_nan_fp16x2(maximum, word);
  }
};

// 8 neighbouring columns as they lie in memory.
template <int kDtype>
struct Vector {
  Quad quads[Element<kDtype>::kQuads];

  static __device__ __forceinline__ Vector load(const typename Element<kDtype>::Storage* from) {
    Vector vector;
#pragma unroll
    for (int q = 0; q < Element<kDtype>::kQuads; ++q) vector.quads[q] = reinterpret_cast<const Quad*>(from)[q];
    return vector;
  }
  __device__ __forceinline__ float operator[](int i) const { return Element<kDtype>::at(quads, i); }
  __device__ __forceinline__ void raise(typename Element<kDtype>::Maximum& maximum) const {
#pragma unroll
    for (int q = 0; q < Element<kDtype>::kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) maximum = Element<kDtype>::max_word(maximum, quads[q].word[i]);
    }
  }
};

__device__ __forceinline__ void store_vector(void* row, int dtype, int64_t column, const float* values) {
  if (dtype == TCOD_FP32) {
    Quad* to = reinterpret_cast<Quad*>(static_cast<float*>(row) + column);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      Quad quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) quad.word[i] = bits_of_float(values[4 * q + i]);
      to[q] = quad;
    }
    return;
  }
  Quad quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = values[2 * i], high = values[2 * i + 1];
    quad.word[i] = dtype == TCOD_BF16 ? bf16x2_of(low, high) : fp16x2_of(low, high);
  }
  *reinterpret_cast<Quad*>(static_cast<uint16_t*>(row) + column) = quad;
}

__device__ __forceinline__ void store_value(void* row, int dtype, int64_t column, float value) {
  if (dtype == TCOD_FP32) {
    static_cast<float*>(row)[column] = value;
  } else {
    const uint32_t bits = dtype == TCOD_BF16 ? bf16x2_of(value, 0) : fp16x2_of(value, 0);
    static_cast<uint16_t*>(row)[column] = static_cast<uint16_t>(bits);
  }
}

__device__ __forceinline__ int64_t bytes_of(int dtype) { return dtype == TCOD_FP32 ? 4 : 2; }

// Start of a row, or null.
__device__ __forceinline__ char* row_of(const void* base, int64_t stride, int64_t row, int dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(base)) + row * stride * bytes_of(dtype);
}

struct Operand {
  const void* row;  // or null: does not matter
  int dtype;

  __device__ __forceinline__ bool is_aligned(int column) const {
    return row == nullptr || (reinterpret_cast<uintptr_t>(row) + column * bytes_of(dtype)) % 16 == 0;
  }
};

// Where the vectors of a row are, in columns. The loose columns are counted from 0: first the head, then the tail.
struct Pieces {
  int head, vectors, columns;

  template <int kCount>
  static __device__ Pieces of(int64_t columns, const Operand (&operands)[kCount]) {
    Pieces pieces = {static_cast<int>(columns), 0, static_cast<int>(columns)};
    for (int head = 0; head < kVector && head < columns; ++head) {
      bool is_aligned = true;
#pragma unroll
      for (int i = 0; i < kCount; ++i) is_aligned &= operands[i].is_aligned(head);
      if (is_aligned) {
        pieces.head = head;
        pieces.vectors = (pieces.columns - head) / kVector;
        break;
      }
    }
    return pieces;
  }
  __device__ __forceinline__ int loose() const { return columns - vectors * kVector; }
  __device__ __forceinline__ int loose_column(int i) const { return i < head ? i : i + vectors * kVector; }
  __device__ __forceinline__ int vector_column(int i) const { return head + i * kVector; }
};

constexpr float kSmallDelta = 1.f / 16;

// log(m / p_S) = log(1 - beta + beta e^delta) for |delta| < kSmallDelta: the cumulants of a coin, to the fourth power.
struct MixtureSeries {
  float first, second, third, fourth;

  __device__ explicit MixtureSeries(double beta) {
    const double variance = beta * (1 - beta);
    first = beta;
    second = variance / 2;
    third = variance * (1 - 2 * beta) / 6;
    fourth = variance * (1 - 6 * variance) / 24;
  }
  __device__ __forceinline__ float operator()(float delta) const {
    return delta * fmaf(delta, fmaf(delta, fmaf(delta, fourth, third), second), first);
  }
};

// Sums over the block in a fixed order: warp i adds up values[i] of all threads in float64. Leaves them in sums[],
// visible to all threads, and says whether each is finite. At most one sum a warp.
template <int kCount>
struct BlockSum {
  float stage[kCount][kThreads];
  double sums[kCount];

  __device__ bool operator()(const float (&values)[kCount]) {
    static_assert(kCount <= kWarps, "a warp for each sum");
    const int thread = thread_index(), which = thread / 32, lane = thread % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) stage[i][thread] = values[i];
    barrier();
    double sum = 0;
    if (which < kCount) {
#pragma unroll
      for (int i = 0; i < kThreads; i += 32) sum += stage[which][i + lane];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += from_lane_xor(sum, mask);
      if (lane == 0) sums[which] = sum;
    }
    return !any_in_block(!(fabs(sum) < 1e300));
  }
};

// Maxima over the block, of the first two slots of `shared` for each warp; a NaN wins.
__device__ __forceinline__ void max_over_block(float& first, float& second, float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    first = max_nan(first, from_lane_xor(first, mask));
    second = max_nan(second, from_lane_xor(second, mask));
  }
  const int warp = thread_index() / 32;
  barrier();
  if (thread_index() % 32 == 0) {
    shared[2 * warp] = first;
    shared[2 * warp + 1] = second;
  }
  barrier();
  for (int w = 0; w < kWarps; ++w) {
    first = max_nan(first, shared[2 * w]);
    second = max_nan(second, shared[2 * w + 1]);
  }
}

}  // namespace tcod

#endif
