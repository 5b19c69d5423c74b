#include "runtime.h"

#include "device.cuh"

#define TCOD_TEXT(...) #__VA_ARGS__
#define TCOD_EXPANDED_TEXT(...) TCOD_TEXT(__VA_ARGS__)

extern "C" int tcod_cuda_device_count(void) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

extern "C" const char* tcod_cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" const char* tcod_cuda_archs(void) { return TCOD_EXPANDED_TEXT(__CUDA_ARCH_LIST__); }
