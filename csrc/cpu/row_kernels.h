// One row of each kernel, once per instruction set; divergence.cpp chooses the set at run time and loops over rows.

#ifndef MEGATRON_TCOD_ROW_KERNELS_H
#define MEGATRON_TCOD_ROW_KERNELS_H

#include "divergence_api.h"

struct RowKernels {
  void (*partial_sums)(const TcodPartialSums& args, int64_t row);
  void (*mixture_sums)(const TcodMixtureSums& args, int64_t row);
  void (*logits_gradient)(const TcodLogitsGradient& args, int64_t row);
};

extern const RowKernels portable_rows;
#if defined(__x86_64__)
#define TCOD_HAS_X86_ROWS 1
extern const RowKernels avx2_rows;
extern const RowKernels avx512_rows;
#endif

#endif
