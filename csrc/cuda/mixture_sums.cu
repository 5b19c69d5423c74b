// JSD's second read: a row's part of KL(p_S || m) and KL(p_T || m), m = beta p_T + (1 - beta) p_S. One block a row.
//
// Of a column's two probabilities let `big` be the larger, small = big e, e = 2^-d with d the difference of their
// logarithms to base 2, and c the weight of the smaller in m. Then log2(m / big) = log2(1 - c + c e) =: y <= 0 and
// log2(m / small) = y + d: three fast exponentials and logarithms for both terms, nothing overflows, and a probability
// of zero needs no special case as long as d is finite. Where fp32 logits differ by little, y comes from its series.

#include "rows.cuh"

namespace tcod {
namespace {

constexpr float kLargestDifference = 1000;  // e is zero from 150 on

template <int kDtype, bool kIsPacked>
struct Mixture {
  static constexpr bool kHasSeries = kDtype == TCOD_FP32;
  float student_scale, teacher_scale, student_max, teacher_max;
  float student_log2_total, teacher_log2_total;
  float offset;  // what log p_T - log p_S has beside the shifted logits
  float beta, share;
  MixtureSeries series;
  float from_student = 0, from_teacher = 0;

  __device__ Mixture(const TcodMixtureSums& args, int64_t at) : series(args.beta) {
    const double* table = args.table + at;
    const int64_t step = args.table_stride;
    student_scale = args.logits.student_scale;
    teacher_scale = args.logits.teacher_scale;
    student_max = table[0];
    teacher_max = table[2 * step];
    student_log2_total = table[step] * kLog2e;
    teacher_log2_total = table[3 * step] * kLog2e;
    offset = table[step] - table[3 * step] + (kIsPacked ? table[0] - table[2 * step] : 0);
    beta = args.beta;
    share = 1 - args.beta;
  }

  __device__ __forceinline__ void add(float student, float teacher) {
    const float a = fmaf(student, student_scale, -student_max);
    const float b = kIsPacked ? student - teacher - teacher_max : fmaf(teacher, teacher_scale, -teacher_max);
    const float delta = offset - (kIsPacked ? teacher : a - b);  // log p_T - log p_S
    const float log2_p = fmaf(a, kLog2e, -student_log2_total), log2_q = fmaf(b, kLog2e, -teacher_log2_total);
    const float big = exp2_fast(max_nan(log2_p, log2_q));
    const float difference = fminf(fabsf(delta) * kLog2e, kLargestDifference);
    const float ratio = exp2_fast(-difference);
    const bool is_teacher_big = delta > 0;
    const float mixture = is_teacher_big ? fmaf(share, ratio, beta) : fmaf(beta, ratio, share);  // m / big
    float y = log2_fast(mixture);
    if (kHasSeries && fabsf(delta) < kSmallDelta) y = kLog2e * (series(delta) - fmaxf(delta, 0));
    const float of_big = big * y, of_small = big * ratio * (y + difference);
    from_student += is_teacher_big ? of_small : of_big;
    from_teacher += is_teacher_big ? of_big : of_small;
  }
};

template <int kDtype, bool kIsPacked>
__global__ __launch_bounds__(kThreads, 4) void mixture_sums_kernel(TcodMixtureSums args) {
  using E = Element<kDtype>;
  using Storage = typename E::Storage;
  constexpr int kAhead = kDtype == TCOD_FP32 ? 1 : 2;
  __shared__ BlockSum<2> block;
  const int64_t at = block_index();
  char* const student_row = row_of(args.logits.student, args.logits.student_row_stride, at, kDtype);
  char* const teacher_row = row_of(args.logits.teacher, args.logits.teacher_row_stride, at, kDtype);
  const Operand operands[] = {{student_row, kDtype}, {teacher_row, kDtype}};
  const Pieces pieces = Pieces::of(args.logits.columns, operands);
  const Storage* const students = reinterpret_cast<Storage*>(student_row);
  const Storage* const teachers = reinterpret_cast<Storage*>(teacher_row);

  Mixture<kDtype, kIsPacked> mixture(args, at);
#pragma unroll 1
  for (int vector = thread_index(); vector < pieces.vectors; vector += kAhead * kThreads) {
    Vector<kDtype> student[kAhead], teacher[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u > 0 && vector + u * kThreads >= pieces.vectors) continue;
      const int column = pieces.vector_column(vector + u * kThreads);
      student[u] = Vector<kDtype>::load(students + column);
      teacher[u] = Vector<kDtype>::load(teachers + column);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u > 0 && vector + u * kThreads >= pieces.vectors) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) mixture.add(student[u][i], teacher[u][i]);
    }
  }
#pragma unroll 1
  for (int i = thread_index(); i < pieces.loose(); i += kThreads) {
    const int column = pieces.loose_column(i);
    mixture.add(E::value(students[column]), E::value(teachers[column]));
  }

  const float sums[] = {mixture.from_student, mixture.from_teacher};  // of log2(m / p)
  block(sums);
  if (thread_index() != 0) return;
  for (int i = 0; i < 2; ++i) args.sums[i * args.sums_stride + at] = -0.69314718055994531 * block.sums[i];
}

}  // namespace
}  // namespace tcod

extern "C" int tcod_cuda_mixture_sums(const TcodMixtureSums* args, void* stream) {
  using namespace tcod;
  const int64_t rows = args->logits.rows;
  if (args->logits.is_packed) return launch(mixture_sums_kernel<TCOD_FP16, true>, *args, rows, kThreads, stream);
  switch (args->logits.dtype) {
    case TCOD_FP32: return launch(mixture_sums_kernel<TCOD_FP32, false>, *args, rows, kThreads, stream);
    case TCOD_BF16: return launch(mixture_sums_kernel<TCOD_BF16, false>, *args, rows, kThreads, stream);
    default: return launch(mixture_sums_kernel<TCOD_FP16, false>, *args, rows, kThreads, stream);
  }
}
