// What Python asks beside the kernels. No CUDA header is needed to call it.

#ifndef MEGATRON_TCOD_RUNTIME_H
#define MEGATRON_TCOD_RUNTIME_H

#ifdef __cplusplus
extern "C" {
#endif

int tcod_cuda_device_count(void);                 // 0 also without a driver
const char* tcod_cuda_error_string(int error);    // of a cudaError_t
const char* tcod_cuda_archs(void);                // compute capabilities compiled for, such as "800,900,1000"

#ifdef __cplusplus
}
#endif

#endif
