// What the native kernels are told: the argument structs that the CPU and the CUDA code share, and their entry points.
//
// The meaning of each argument is the contract in megatron_tcod/ops/backends.py; the order of the sums is fixed by
// megatron_tcod/ops/shard_sums.py. Plain C: pointers, sizes and strides, no torch. The Python wrapper has checked
// everything and keeps the tensors alive until the call returns (on CUDA: until the stream has passed it).
//
// Strides count elements and are int64, because rows * columns exceeds 2^31. The stride along columns is always 1.

#ifndef MEGATRON_TCOD_DIVERGENCE_API_H
#define MEGATRON_TCOD_DIVERGENCE_API_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum TcodDtype { TCOD_FP32 = 0, TCOD_BF16 = 1, TCOD_FP16 = 2 };

enum TcodKind { TCOD_REVERSE_KL = 0, TCOD_FORWARD_KL = 1, TCOD_JSD = 2, TCOD_NLL = 3 };

enum { TCOD_SOFTMAX_SUMS = 4, TCOD_ALL_SUMS = 13, TCOD_MIXTURE_SUMS = 2, TCOD_TABLE_ROWS = 5 };

// One chunk of logits of both models, before the temperature.
typedef struct TcodLogits {
  const void* student;         // [rows, columns] of `dtype`
  const void* teacher;         // [rows, columns] of `dtype`, or null: no teacher. With is_packed: the gap s - t
  int64_t student_row_stride;  // >= columns
  int64_t teacher_row_stride;  // >= columns
  int64_t rows;                // may be 0
  int64_t columns;             // may be 0: a shard of padding
  int32_t dtype;               // TcodDtype
  int32_t is_packed;           // 1: fp16 (s, s - t) over their temperatures; both scales are then 1
  float student_scale;         // 1 / temperature
  float teacher_scale;
} TcodLogits;

typedef struct TcodPartialSums {
  TcodLogits logits;
  const int64_t* column;      // [rows] the target's column or -1; null: no targets. In [-1, columns), checked
  void* packed_student;       // [rows, columns] fp16, or null
  void* packed_gap;           // [rows, columns] fp16, or null
  int64_t packed_row_stride;  // of both
  double* sums;               // [13, rows], or [4, rows] without a teacher
  int64_t sums_stride;        // between two sums of one row, >= rows
} TcodPartialSums;

typedef struct TcodMixtureSums {
  TcodLogits logits;
  const double* table;   // [5, rows] maximum and log-total of the student, of the teacher, centre
  int64_t table_stride;  // between two values of one row, >= rows
  double beta;
  double* sums;          // [2, rows]
  int64_t sums_stride;
} TcodMixtureSums;

typedef struct TcodLogitsGradient {
  TcodLogits logits;
  const double* table;     // [5, rows] as above
  int64_t table_stride;
  const float* row_scale;  // [rows]; a row with 0 is written as zeros and not read
  const int64_t* column;   // [rows] as above; not null for TCOD_NLL
  double beta;
  void* out;               // [rows, columns] of `out_dtype`; may be one of the inputs if dtype and stride are the same
  int64_t out_row_stride;
  int32_t out_dtype;       // TcodDtype
  int32_t kind;            // TcodKind
} TcodLogitsGradient;

// CPU. Each row is computed by one thread in one order, so results do not depend on num_threads.
void tcod_cpu_partial_sums(const TcodPartialSums* args, int num_threads);
void tcod_cpu_mixture_sums(const TcodMixtureSums* args, int num_threads);
void tcod_cpu_logits_gradient(const TcodLogitsGradient* args, int num_threads);

// CUDA. Asynchronous on `stream` (a cudaStream_t) of the current device; the result is a cudaError_t.
int tcod_cuda_partial_sums(const TcodPartialSums* args, void* stream);
int tcod_cuda_mixture_sums(const TcodMixtureSums* args, void* stream);
int tcod_cuda_logits_gradient(const TcodLogitsGradient* args, void* stream);

#ifdef __cplusplus
}
#endif

#endif
