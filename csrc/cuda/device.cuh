// What the kernels ask of the machine: fast exponentials, packed maxima, 128-bit vectors of logits, launches.
//
// Everything that is an instruction, a thread number or a barrier stands here, so that tests/ops/cuda_emulator.h can
// stand in for it and run the kernels' source on a CPU (TCOD_EMULATE_CUDA).

#ifndef MEGATRON_TCOD_DEVICE_CUH
#define MEGATRON_TCOD_DEVICE_CUH

#include <stdint.h>

#include "divergence_api.h"

#ifdef TCOD_EMULATE_CUDA
#include "cuda_emulator.h"
#else

#include <cuda_runtime.h>

namespace tcod {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ bool any_in_block(bool is_true) { return __syncthreads_or(is_true); }
__device__ __forceinline__ unsigned lanes_with(bool is_true) { return __ballot_sync(kAllLanes, is_true); }
__device__ __forceinline__ int lowest_lane(unsigned lanes) { return __ffs(static_cast<int>(lanes)) - 1; }

template <class Value>
__device__ __forceinline__ Value from_lane_xor(Value value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

// 2^x and log2(x) in one instruction; subnormal values count as zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Maxima that keep a NaN.
__device__ __forceinline__ float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

__device__ __forceinline__ uint32_t max_nan_fp16x2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float float_of_fp16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Two values rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32_t bf16x2_of(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ uint32_t fp16x2_of(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Starts one block of `threads` for each row. Returns a cudaError_t.
template <class Args>
int launch(void (*kernel)(Args), const Args& args, int64_t rows, int threads, void* stream) {
  if (rows == 0) return cudaSuccess;
  kernel<<<dim3(static_cast<unsigned>(rows)), dim3(threads), 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace tcod

#endif
#endif
