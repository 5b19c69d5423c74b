// Last read: each logit becomes row_scale times the derivative of its row's loss, in place if asked. One block a row.
//
// The factor 1 / Z_S is in the row's constants, so that p_S itself is never formed: e^(s - max) is exact to the digits
// of the exponential, and what multiplies it is one fused multiply-add. Formulas: megatron_tcod/ops/divergence.py.

#include "rows.cuh"

namespace tcod {
namespace {

template <int kDtype, bool kIsPacked, int kKind>
struct RowGradient {
  static constexpr bool kHasTeacher = kKind != TCOD_NLL;
  float student_scale, teacher_scale, student_max, teacher_max;
  float row_scale;
  float weight;          // row_scale / Z_S, for JSD times beta - 1
  float teacher_weight;  // row_scale / Z_T
  float offset;          // what log p_S - log p_T (JSD: log p_T - log p_S) has beside the shifted logits
  float centre, beta;
  float zero;  // for a column without weight; NaN where the row is
  MixtureSeries series;

  __device__ RowGradient(const TcodLogitsGradient& args, int64_t at, float scale) : series(args.beta) {
    const double* table = args.table + at;
    const int64_t step = args.table_stride;
    const double max_s = table[0], log_total_s = table[step], max_t = table[2 * step], log_total_t = table[3 * step];
    student_scale = args.logits.student_scale;
    teacher_scale = args.logits.teacher_scale;
    student_max = max_s;
    teacher_max = max_t;
    row_scale = scale;
    weight = scale * exp(-log_total_s);
    teacher_weight = scale * exp(-log_total_t);
    const double offset_s = log_total_s - log_total_t + (kIsPacked ? max_s - max_t : 0);
    centre = table[4 * step];
    beta = args.beta;
    offset = offset_s;
    if (kKind == TCOD_REVERSE_KL) offset = -weight * float(offset_s + table[4 * step]);
    if (kKind == TCOD_JSD) weight *= float(args.beta - 1);
    const float either = weight + offset;
    zero = either != either ? either : 0;
  }

  __device__ __forceinline__ float operator()(float student, float teacher) const {
    const float a = fmaf(student, student_scale, -student_max);
    const float exp_a = exp2_fast(a * kLog2e);
    if constexpr (kKind == TCOD_NLL) {
      return exp_a * weight;
    } else {
      const float b = kIsPacked ? student - teacher - teacher_max : fmaf(teacher, teacher_scale, -teacher_max);
      if constexpr (kKind == TCOD_FORWARD_KL) return fmaf(exp_a, weight, -exp2_fast(b * kLog2e) * teacher_weight);
      const float gap = kIsPacked ? teacher : a - b;
      if constexpr (kKind == TCOD_REVERSE_KL) return exp_a == 0 ? zero : exp_a * fmaf(gap, weight, offset);
      const float delta = offset - gap;  // log p_T - log p_S
      const float ratio = exp2_fast(fminf(delta * kLog2e, 126));  // finite, also where both logits are -inf
      const float mixture = fmaf(beta, ratio, 1 - beta);                       // m / p_S
      float log_mixture = kDtype == TCOD_FP32 ? logf(mixture) : kLn2 * log2_fast(mixture);
      if (kDtype == TCOD_FP32 && fabsf(delta) < kSmallDelta) log_mixture = series(delta);
      return exp_a * fmaf(log_mixture, weight, centre * weight);
    }
  }
};

template <int kDtype, bool kIsPacked, int kKind>
__global__ __launch_bounds__(kThreads, 4) void logits_gradient_kernel(TcodLogitsGradient args) {
  using E = Element<kDtype>;
  using Gradient = RowGradient<kDtype, kIsPacked, kKind>;
  using Storage = typename E::Storage;
  constexpr int kAhead = kDtype == TCOD_FP32 ? 1 : 2;
  const int64_t at = block_index();
  const int dtype = args.out_dtype;
  char* const student_row = row_of(args.logits.student, args.logits.student_row_stride, at, kDtype);
  char* const teacher_row =
      Gradient::kHasTeacher ? row_of(args.logits.teacher, args.logits.teacher_row_stride, at, kDtype) : nullptr;
  char* const out = row_of(args.out, args.out_row_stride, at, dtype);
  const Operand operands[] = {{student_row, kDtype}, {teacher_row, kDtype}, {out, dtype}};
  const Pieces pieces = Pieces::of(args.logits.columns, operands);
  const Storage* const students = reinterpret_cast<Storage*>(student_row);
  const Storage* const teachers = reinterpret_cast<Storage*>(teacher_row);

  const float scale = args.row_scale[at];
  if (scale == 0) {
    const float zeros[kVector] = {};
    for (int vector = thread_index(); vector < pieces.vectors; vector += kThreads) {
      store_vector(out, dtype, pieces.vector_column(vector), zeros);
    }
    for (int i = thread_index(); i < pieces.loose(); i += kThreads) store_value(out, dtype, pieces.loose_column(i), 0);
    return;
  }

  const Gradient gradient(args, at, scale);
  const int target = kKind == TCOD_NLL ? static_cast<int>(args.column[at]) : -1;
#pragma unroll 1
  for (int vector = thread_index(); vector < pieces.vectors; vector += kAhead * kThreads) {
    Vector<kDtype> student[kAhead], teacher[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u > 0 && vector + u * kThreads >= pieces.vectors) continue;
      const int column = pieces.vector_column(vector + u * kThreads);
      student[u] = Vector<kDtype>::load(students + column);
      if (Gradient::kHasTeacher) teacher[u] = Vector<kDtype>::load(teachers + column);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u > 0 && vector + u * kThreads >= pieces.vectors) continue;
      const int column = pieces.vector_column(vector + u * kThreads);
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values[i] = gradient(student[u][i], Gradient::kHasTeacher ? teacher[u][i] : 0);
        if (kKind == TCOD_NLL && column + i == target) values[i] -= scale;
      }
      store_vector(out, dtype, column, values);
    }
  }
#pragma unroll 1
  for (int i = thread_index(); i < pieces.loose(); i += kThreads) {
    const int column = pieces.loose_column(i);
    float value = gradient(E::value(students[column]), Gradient::kHasTeacher ? E::value(teachers[column]) : 0);
    if (kKind == TCOD_NLL && column == target) value -= scale;
    store_value(out, dtype, column, value);
  }
}

template <int kDtype, bool kIsPacked>
int launch_logits_gradient(const TcodLogitsGradient& args, void* stream) {
  const int64_t rows = args.logits.rows;
  switch (args.kind) {
    case TCOD_REVERSE_KL:
      return launch(logits_gradient_kernel<kDtype, kIsPacked, TCOD_REVERSE_KL>, args, rows, kThreads, stream);
    case TCOD_FORWARD_KL:
      return launch(logits_gradient_kernel<kDtype, kIsPacked, TCOD_FORWARD_KL>, args, rows, kThreads, stream);
    case TCOD_JSD: return launch(logits_gradient_kernel<kDtype, kIsPacked, TCOD_JSD>, args, rows, kThreads, stream);
    default: return launch(logits_gradient_kernel<kDtype, kIsPacked, TCOD_NLL>, args, rows, kThreads, stream);
  }
}

}  // namespace
}  // namespace tcod

extern "C" int tcod_cuda_logits_gradient(const TcodLogitsGradient* args, void* stream) {
  using namespace tcod;
  if (args->logits.is_packed) return launch_logits_gradient<TCOD_FP16, true>(*args, stream);
  switch (args->logits.dtype) {
    case TCOD_FP32: return launch_logits_gradient<TCOD_FP32, false>(*args, stream);
    case TCOD_BF16: return launch_logits_gradient<TCOD_BF16, false>(*args, stream);
    default: return launch_logits_gradient<TCOD_FP16, false>(*args, stream);
  }
}
