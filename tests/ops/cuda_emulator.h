// Stands in for the device half of csrc/cuda/device.cuh, so that the kernels' source runs on a CPU, block after block.
//
// A block's threads are fibers that take turns; barriers, shuffles and votes wait for the block or the warp as on a
// device. exp2_fast and log2_fast are wrong by as much as the hardware's are allowed to be (2^-22, PTX ISA), by an amount
// that depends on the argument alone. What this cannot show: registers, speed, memory ordering, the compiled code.

#ifndef MEGATRON_TCOD_CUDA_EMULATOR_H
#define MEGATRON_TCOD_CUDA_EMULATOR_H

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDA_ARCH_LIST__ 0

enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace tcod {

struct Gate {
  int size = 0, arrived = 0, opened = 0;
};

struct Emulator {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> is_done;
  std::vector<uint64_t> slots;  // what each thread shows to others
  std::vector<Gate> gates;      // one a warp, then the block's
  int current = 0;
  int64_t block = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;

  static Emulator& instance() {
    static Emulator emulator;
    return emulator;
  }
  void yield() { swapcontext(&fibers[current], &scheduler); }
  void pass(Gate& gate) {
    const int opened = gate.opened;
    if (++gate.arrived == gate.size) {
      gate.arrived = 0;
      ++gate.opened;
    }
    while (gate.opened == opened) yield();
  }
  void pass_warp() { pass(gates[current / 32]); }
  void pass_block() { pass(gates.back()); }

  static void enter() {
    Emulator& self = instance();
    self.body(self.argument);
    self.is_done[self.current] = true;
  }
  void run_block(int64_t index, int threads) {
    block = index;
    fibers.resize(threads);
    stacks.resize(threads);
    slots.assign(threads, 0);
    is_done.assign(threads, false);
    gates.assign(threads / 32 + 1, Gate{32});
    gates.back().size = threads;
    for (int i = 0; i < threads; ++i) {
      stacks[i].resize(1 << 16);
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i].data();
      fibers[i].uc_stack.ss_size = stacks[i].size();
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], &Emulator::enter, 0);
    }
    for (bool is_running = true; is_running;) {
      is_running = false;
      for (current = 0; current < threads; ++current) {
        if (is_done[current]) continue;
        is_running = true;
        swapcontext(&scheduler, &fibers[current]);
      }
    }
  }
};

inline int thread_index() { return Emulator::instance().current; }
inline int64_t block_index() { return Emulator::instance().block; }
inline void barrier() { Emulator::instance().pass_block(); }

inline bool any_in_block(bool is_true) {
  Emulator& emulator = Emulator::instance();
  emulator.slots[emulator.current] = is_true;
  emulator.pass_block();
  bool is_any = false;
  for (uint64_t slot : emulator.slots) is_any |= slot != 0;
  emulator.pass_block();
  return is_any;
}

inline unsigned lanes_with(bool is_true) {
  Emulator& emulator = Emulator::instance();
  emulator.slots[emulator.current] = is_true;
  emulator.pass_warp();
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= unsigned(emulator.slots[emulator.current / 32 * 32 + i]) << i;
  emulator.pass_warp();
  return lanes;
}

inline int lowest_lane(unsigned lanes) { return __builtin_ctz(lanes); }

template <class To, class From>
To same_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "");
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Value>
Value from_lane_xor(Value value, int mask) {
  Emulator& emulator = Emulator::instance();
  memcpy(&emulator.slots[emulator.current], &value, sizeof(value));
  emulator.pass_warp();
  memcpy(&value, &emulator.slots[emulator.current ^ mask], sizeof(value));
  emulator.pass_warp();
  return value;
}

// In [-2^-22, 2^-22], zero for an integer: hardware gives those exactly.
inline float hardware_error(float x) {
  if (x == floorf(x)) return 0;
  const uint32_t mixed = same_bits<uint32_t>(x) * 2654435761u;
  return (static_cast<float>(mixed >> 8) / (1 << 23) - 1) * 0x1p-22f;
}

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y + y * hardware_error(x);
}

inline float log2_fast(float x) {
  const float y = log2f(x);
  return y + (x > 0.5f && x < 2 ? 1 : y) * hardware_error(x);
}

inline float float_of_bits(uint32_t bits) { return same_bits<float>(bits); }
inline uint32_t bits_of_float(float value) { return same_bits<uint32_t>(value); }
inline float float_of_fp16(uint16_t bits) { return same_bits<_Float16>(bits); }

inline float max_nan(float x, float y) { return x > y || isnan(x) ? x : y; }

inline uint32_t max_nan_bf16x2(uint32_t x, uint32_t y) {
  const float low = max_nan(float_of_bits(x << 16), float_of_bits(y << 16));
  const float high = max_nan(float_of_bits(x & 0xffff0000u), float_of_bits(y & 0xffff0000u));
  return bits_of_float(low) >> 16 | (bits_of_float(high) & 0xffff0000u);
}

inline uint32_t fp16x2_of(float low, float high) {
  return same_bits<uint16_t>(static_cast<_Float16>(low)) | uint32_t(same_bits<uint16_t>(static_cast<_Float16>(high))) << 16;
}

inline uint32_t max_nan_fp16x2(uint32_t x, uint32_t y) {
  return fp16x2_of(max_nan(float_of_fp16(uint16_t(x)), float_of_fp16(uint16_t(y))),
                   max_nan(float_of_fp16(x >> 16), float_of_fp16(y >> 16)));
}

inline uint32_t bf16_of(float value) {
  const uint32_t bits = bits_of_float(value);
  if (isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t bf16x2_of(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int64_t rows, int threads, void*) {
  struct Call {
    void (*kernel)(Args);
    const Args& args;
  } call = {kernel, args};
  Emulator& emulator = Emulator::instance();
  emulator.argument = &call;
  emulator.body = [](void* argument) {
    const Call& own = *static_cast<Call*>(argument);
    own.kernel(own.args);
  };
  for (int64_t row = 0; row < rows; ++row) emulator.run_block(row, threads);
  return cudaSuccess;
}

}  // namespace tcod

#endif
