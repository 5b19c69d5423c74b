// One read of both logits into the 13 sums of megatron_tcod/ops/shard_sums.py, one block a row, no atomics.
//
// The sums need the row's maxima, which are known only at the end. So the block takes the maxima of the first columns
// that its threads meet, and of the target's, which a sure model has sampled for being the largest, as the frame; sums
// e^(s - frame) and so on with nothing to rescale or compare on the way; and thread 0 moves the results to the true
// maxima, each nat between costing one part in 2^24. A frame is good if the maximum is at most kHeadroom above it.
// If it was further, or if a sum is not finite (a NaN, or a product 0 * inf of a masked token), the block reads the row
// again with the true maxima as the frame and with such products counted as zero. Rows of a language model do not.
//
// The excess sums. With w = e^a, v = e^b, g = a - b a term of E_s is w (e^-g - 1 + g) = v - w + w g. Half-precision
// logits that differ do so by much, and the right side, added up over 8 columns, keeps the digits that there are; it is
// cut at zero because the left side cannot be negative. For fp32 logits, and in loose columns, small gaps take the
// series in g instead.
// E_s = Z_t - Z_s + G_s as such. In moving from frames to maxima it gives Z_t - Z_s more digits where models nearly
// agree, and gives E_s where the two frames lie so differently below their maxima that moving E_s would leave no digit.
//
// Whether one column holds both maxima is asked at the end: only a thread that met both can have met them in one column,
// and its warp looks through that thread's columns once more.

#include "rows.cuh"

namespace tcod {
namespace {

constexpr int kNumShifted = 8;  // sums relative to a frame
constexpr float kHeadroom = 40;
constexpr float kSmallGap = 0.35f;

template <bool kIsGuarded>
__device__ __forceinline__ float product(float weight, float value) {
  return kIsGuarded && weight == 0 ? 0 : weight * value;
}

// What one thread adds up.
struct Sums {
  float total_s, centred_s, total_t, centred_t, gap_s, gap_t, excess_s, excess_t;

  template <bool kIsGuarded, int kCount>
  __device__ __forceinline__ void add_student(const float (&a)[kCount]) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float w = exp2_fast(a[i] * kLog2e);
      total += w;
      centred_s += product<kIsGuarded>(w, a[i]);
    }
    total_s += total;
  }

  // a, b: shifted logits of neighbouring columns.
  template <bool kHasSeries, bool kIsGuarded, int kCount>
  __device__ __forceinline__ void add_pair(const float (&a)[kCount], const float (&b)[kCount]) {
    float sum_w = 0, sum_v = 0, sum_wg = 0, sum_vg = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float w = exp2_fast(a[i] * kLog2e), v = exp2_fast(b[i] * kLog2e);
      const float gap = a[i] - b[i];
      const float wg = product<kIsGuarded>(w, gap), vg = product<kIsGuarded>(v, gap);
      sum_w += w;
      sum_v += v;
      sum_wg += wg;
      sum_vg += vg;
      centred_s += product<kIsGuarded>(w, a[i]);
      centred_t += product<kIsGuarded>(v, b[i]);
      if (kHasSeries) {
        const float g2 = gap * gap;
        const float even = g2 * fmaf(g2, fmaf(g2, 1.f / 720, 1.f / 24), 0.5f);
        const float odd = gap * g2 * fmaf(g2, fmaf(g2, 1.f / 5040, 1.f / 120), 1.f / 6);
        const bool is_small = fabsf(gap) < kSmallGap;
        const float gained = v - w;
        excess_s += is_small ? w * (even - odd) : gained + wg;
        excess_t += is_small ? v * (even + odd) : -(gained + vg);
      }
    }
    if (!kHasSeries) {
      const float gained = sum_v - sum_w;
      excess_s += max_nan(gained + sum_wg, 0);
      excess_t += max_nan(-(gained + sum_vg), 0);
    }
    total_s += sum_w;
    total_t += sum_v;
    gap_s += sum_wg;
    gap_t += sum_vg;
  }

  __device__ __forceinline__ bool add_up(BlockSum<kNumShifted>& block) const {
    const float values[kNumShifted] = {total_s, centred_s, total_t, centred_t, gap_s, gap_t, excess_s, excess_t};
    return block(values);
  }
};

template <int kDtype>
struct Row {
  using Storage = typename Element<kDtype>::Storage;
  const Storage *student, *teacher;
  char *packed_student, *packed_gap;
  Pieces pieces;
  float student_scale, teacher_scale;

  static __device__ Row of(const TcodPartialSums& args, int64_t at) {
    const TcodLogits& logits = args.logits;
    char* student = row_of(logits.student, logits.student_row_stride, at, kDtype);
    char* teacher = row_of(logits.teacher, logits.teacher_row_stride, at, kDtype);
    char* packed_student = row_of(args.packed_student, args.packed_row_stride, at, TCOD_FP16);
    char* packed_gap = row_of(args.packed_gap, args.packed_row_stride, at, TCOD_FP16);
    const Operand operands[] = {{student, kDtype}, {teacher, kDtype}, {packed_student, TCOD_FP16}, {packed_gap, TCOD_FP16}};
    return {
        reinterpret_cast<Storage*>(student),
        reinterpret_cast<Storage*>(teacher),
        packed_student,
        packed_gap,
        Pieces::of(logits.columns, operands),
        logits.student_scale,
        logits.teacher_scale
    };
  }
  __device__ __forceinline__ float student_at(int64_t column) const { return Element<kDtype>::value(student[column]); }
  __device__ __forceinline__ float teacher_at(int64_t column) const { return Element<kDtype>::value(teacher[column]); }
};

// Largest raw logits among the first columns of each thread.
template <int kDtype, bool kHasTeacher>
__device__ void sample_maxima(const Row<kDtype>& row, float& student, float& teacher) {
  using E = Element<kDtype>;
  student = teacher = -infinity();
  const int i = thread_index();
  if (i < row.pieces.vectors) {
    typename E::Maximum maximum = E::lowest();
    Vector<kDtype>::load(row.student + row.pieces.vector_column(i)).raise(maximum);
    student = E::widest(maximum);
    if (kHasTeacher) {
      maximum = E::lowest();
      Vector<kDtype>::load(row.teacher + row.pieces.vector_column(i)).raise(maximum);
      teacher = E::widest(maximum);
    }
  } else if (i < row.pieces.loose()) {
    const int column = row.pieces.loose_column(i);
    student = row.student_at(column);
    if (kHasTeacher) teacher = row.teacher_at(column);
  }
}

// Thread 0 writes the target's logits and adds them to its raw maxima.
template <int kDtype, bool kHasTeacher>
__device__ void take_target(const TcodPartialSums& args, const Row<kDtype>& row, int64_t at, float& student, float& teacher) {
  const int64_t column = args.column == nullptr ? -1 : args.column[at];
  const bool is_here = column >= 0 && column < row.pieces.columns;
  const float absent = column < 0 ? -infinity() : float_of_bits(0x7fffffffu);  // beyond the row: not a number
  if (is_here) student = max_nan(student, row.student_at(column));
  args.sums[3 * args.sums_stride + at] = is_here ? row.student_at(column) * row.student_scale : absent;
  if constexpr (kHasTeacher) {
    if (is_here) teacher = max_nan(teacher, row.teacher_at(column));
    args.sums[7 * args.sums_stride + at] = is_here ? row.teacher_at(column) * row.teacher_scale : absent;
  }
}

// Both logits over their temperatures as fp16, the teacher's as the gap s - t.
template <int kCount>
__device__ __forceinline__ void pack(const float (&s)[kCount], const float (&t)[kCount], float (&gap)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) gap[i] = s[i] == t[i] ? 0 : s[i] - t[i];
}

template <int kDtype, bool kHasTeacher, bool kIsPacking, bool kIsGuarded>
__device__ __forceinline__ void add_vector(
    const Row<kDtype>& row,
    int vector,
    const Vector<kDtype>& student,
    const Vector<kDtype>& teacher,
    float student_frame,
    float teacher_frame,
    Sums& sums
) {
  float a[kVector], b[kVector];
  if (kIsPacking) {
    float s[kVector], t[kVector], gap[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) s[i] = student[i] * row.student_scale, t[i] = teacher[i] * row.teacher_scale;
    pack(s, t, gap);
    store_vector(row.packed_student, TCOD_FP16, row.pieces.vector_column(vector), s);
    store_vector(row.packed_gap, TCOD_FP16, row.pieces.vector_column(vector), gap);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    a[i] = fmaf(student[i], row.student_scale, -student_frame);
    if (kHasTeacher) b[i] = fmaf(teacher[i], row.teacher_scale, -teacher_frame);
  }
  if constexpr (kHasTeacher) {
    sums.add_pair<kDtype == TCOD_FP32, kIsGuarded>(a, b);
  } else {
    sums.add_student<kIsGuarded>(a);
  }
}

// The whole row into one thread's sums; also its largest raw logits.
template <int kDtype, bool kHasTeacher, bool kIsPacking, bool kIsGuarded>
__device__ __forceinline__ void read_row(
    const Row<kDtype>& row, float student_frame, float teacher_frame, Sums& sums, float& student_max, float& teacher_max
) {
  using E = Element<kDtype>;
  constexpr int kAhead = kDtype == TCOD_FP32 || kIsPacking ? 1 : 2;  // vectors in flight
  const Pieces& pieces = row.pieces;
  typename E::Maximum student_maximum = E::lowest(), teacher_maximum = E::lowest();
  int vector = thread_index();
#pragma unroll 1
  for (; vector + (kAhead - 1) * kThreads < pieces.vectors; vector += kAhead * kThreads) {
    Vector<kDtype> student[kAhead], teacher[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int column = pieces.vector_column(vector + u * kThreads);
      student[u] = Vector<kDtype>::load(row.student + column);
      if (kHasTeacher) teacher[u] = Vector<kDtype>::load(row.teacher + column);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      student[u].raise(student_maximum);
      if (kHasTeacher) teacher[u].raise(teacher_maximum);
      add_vector<kDtype, kHasTeacher, kIsPacking, kIsGuarded>(
          row, vector + u * kThreads, student[u], teacher[u], student_frame, teacher_frame, sums
      );
    }
  }
  if (kAhead > 1 && vector < pieces.vectors) {
    Vector<kDtype> student = Vector<kDtype>::load(row.student + pieces.vector_column(vector)), teacher = student;
    if (kHasTeacher) teacher = Vector<kDtype>::load(row.teacher + pieces.vector_column(vector));
    student.raise(student_maximum);
    teacher.raise(teacher_maximum);
    add_vector<kDtype, kHasTeacher, kIsPacking, kIsGuarded>(
        row, vector, student, teacher, student_frame, teacher_frame, sums
    );
  }
  student_max = E::widest(student_maximum);
  teacher_max = E::widest(teacher_maximum);
#pragma unroll 1
  for (int i = thread_index(); i < pieces.loose(); i += kThreads) {
    const int column = pieces.loose_column(i);
    const float s = row.student_at(column);
    const float a[1] = {fmaf(s, row.student_scale, -student_frame)};
    student_max = max_nan(student_max, s);
    if constexpr (kHasTeacher) {
      const float t = row.teacher_at(column);
      const float b[1] = {fmaf(t, row.teacher_scale, -teacher_frame)};
      teacher_max = max_nan(teacher_max, t);
      if (kIsPacking) {
        const float scaled_s[1] = {s * row.student_scale}, scaled_t[1] = {t * row.teacher_scale};
        float gap[1];
        pack(scaled_s, scaled_t, gap);
        store_value(row.packed_student, TCOD_FP16, column, scaled_s[0]);
        store_value(row.packed_gap, TCOD_FP16, column, gap[0]);
      }
      sums.add_pair<true, kIsGuarded>(a, b);
    } else {
      sums.add_student<kIsGuarded>(a);
    }
  }
}

// Whether a column of `thread` holds both maxima; the lanes of a warp share its columns.
template <int kDtype>
__device__ bool is_shared_column(const Row<kDtype>& row, int thread, float student_max, float teacher_max) {
  bool is_shared = false;
  const int first = thread + thread_index() % 32 * kThreads;
  for (int vector = first; vector < row.pieces.vectors; vector += 32 * kThreads) {
    const int column = row.pieces.vector_column(vector);
    for (int i = column; i < column + kVector; ++i) {
      is_shared |= row.student_at(i) == student_max && row.teacher_at(i) == teacher_max;
    }
  }
  for (int i = first; i < row.pieces.loose(); i += 32 * kThreads) {
    const int column = row.pieces.loose_column(i);
    is_shared |= row.student_at(column) == student_max && row.teacher_at(column) == teacher_max;
  }
  return is_shared;
}

// Whether the block's row has a column that holds both maxima, from the largest that each thread met.
template <int kDtype>
__device__ bool is_shared_top(
    const Row<kDtype>& row, float own_student, float own_teacher, float student_max, float teacher_max
) {
  const bool met_both = own_student == student_max && own_teacher == teacher_max && student_max > -infinity() &&
                        teacher_max > -infinity();
  bool is_shared = false;
  for (unsigned lanes = lanes_with(met_both); lanes != 0; lanes &= lanes - 1) {
    const int thread = thread_index() / 32 * 32 + lowest_lane(lanes);
    is_shared |= is_shared_column(row, thread, student_max, teacher_max);
  }
  return any_in_block(is_shared);
}

// KL cannot be less than zero: E / Z >= r - log1p(r) with r = other / Z - 1, near zero by its series; and a little more,
// for the rounding of whoever subtracts the two.
__device__ double not_below_bound(double excess, double total, double difference) {
  const double r = difference / total;
  if (!(fabs(r) < 0.05)) return excess;
  const double bracket = 0.5 + r * (-1. / 3 + r * (0.25 + r * (-0.2 + r * (1. / 6 + r * (-1. / 7 + r / 8)))));
  const double bound = total * (r * r * bracket * (1 + 1e-6) + 4e-16 * fabs(r));
  return excess < bound ? bound : excess;
}

// Moves sums from frames to maxima that lie -shift above them.
__device__ void move_student(double shift, double& total, double& centred) {
  const double factor = exp(shift);
  centred = factor * (centred + shift * total);
  total *= factor;
}

__device__ void move_pair(double student_shift, double teacher_shift, double (&sums)[kNumShifted]) {
  double &total_s = sums[0], &centred_s = sums[1], &total_t = sums[2], &centred_t = sums[3];
  double &gap_s = sums[4], &gap_t = sums[5], &excess_s = sums[6], &excess_t = sums[7];
  const double shift = student_shift - teacher_shift;
  const bool is_near = fabs(shift) < 0.5;
  if (is_near && fabs(gap_s) + excess_s < 0.5 * total_s) total_t = total_s + (excess_s - gap_s);
  const double less = expm1(-shift), more = expm1(shift);
  const double factor_s = exp(student_shift), factor_t = exp(teacher_shift);
  if (is_near) {
    excess_s = factor_s * (excess_s + total_s * shift + total_t * less);
    excess_t = factor_t * (excess_t - total_t * shift + total_s * more);
  }
  gap_s = factor_s * (gap_s + shift * total_s);
  gap_t = factor_t * (gap_t + shift * total_t);
  centred_s = factor_s * (centred_s + student_shift * total_s);
  centred_t = factor_t * (centred_t + teacher_shift * total_t);
  total_s *= factor_s;
  total_t *= factor_t;
  if (!is_near) {
    excess_s = total_t - total_s + gap_s;
    excess_t = total_s - total_t - gap_t;
  }
  excess_s = not_below_bound(excess_s, total_s, total_t - total_s);
  excess_t = not_below_bound(excess_t, total_t, total_s - total_t);
}

// Blocks on one multiprocessor, which bound the registers of a thread: as many as fit without spilling.
constexpr int blocks_at_once(int dtype, bool is_packing) { return dtype == TCOD_FP32 || is_packing ? 3 : 4; }

template <int kDtype, bool kHasTeacher, bool kIsPacking>
__global__ __launch_bounds__(kThreads, blocks_at_once(kDtype, kIsPacking)) void partial_sums_kernel(TcodPartialSums args) {
  __shared__ BlockSum<kNumShifted> block;
  __shared__ float maxima[2 * kWarps];
  const int64_t at = block_index();
  const Row<kDtype> row = Row<kDtype>::of(args, at);

  float student_frame, teacher_frame;
  sample_maxima<kDtype, kHasTeacher>(row, student_frame, teacher_frame);
  if (thread_index() == 0) take_target<kDtype, kHasTeacher>(args, row, at, student_frame, teacher_frame);
  max_over_block(student_frame, teacher_frame, maxima);
  student_frame *= row.student_scale;
  teacher_frame *= row.teacher_scale;

  Sums sums = {};
  float own_student, own_teacher;
  read_row<kDtype, kHasTeacher, kIsPacking, false>(row, student_frame, teacher_frame, sums, own_student, own_teacher);
  bool is_good = sums.add_up(block);
  float student_raw = own_student, teacher_raw = own_teacher;
  max_over_block(student_raw, teacher_raw, maxima);
  const float student_max = student_raw * row.student_scale, teacher_max = teacher_raw * row.teacher_scale;

  is_good &= student_max - student_frame <= kHeadroom && (!kHasTeacher || teacher_max - teacher_frame <= kHeadroom);
  if (!is_good) {
    student_frame = student_max == -infinity() ? 0 : student_max;
    teacher_frame = teacher_max == -infinity() ? 0 : teacher_max;
    sums = {};
    float ignored_student, ignored_teacher;
    read_row<kDtype, kHasTeacher, false, true>(
        row, student_frame, teacher_frame, sums, ignored_student, ignored_teacher
    );
    sums.add_up(block);
  }
  bool is_shared = false;
  if constexpr (kHasTeacher) is_shared = is_shared_top(row, own_student, own_teacher, student_raw, teacher_raw);

  if (thread_index() != 0) return;
  const double student_shift = is_good ? double(student_frame) - student_max : 0;
  const double teacher_shift = is_good ? double(teacher_frame) - teacher_max : 0;
  double* const out = args.sums + at;
  const int64_t step = args.sums_stride;
  if constexpr (kHasTeacher) {
    move_pair(student_shift, teacher_shift, block.sums);
    out[4 * step] = teacher_max;
    out[5 * step] = block.sums[2];
    out[6 * step] = block.sums[3];
    for (int i = 4; i < kNumShifted; ++i) out[(i + 4) * step] = block.sums[i];
    out[12 * step] = is_shared;
  } else {
    move_student(student_shift, block.sums[0], block.sums[1]);
  }
  out[0] = student_max;
  out[step] = block.sums[0];
  out[2 * step] = block.sums[1];
}

template <int kDtype>
int launch_partial_sums(const TcodPartialSums& args, void* stream) {
  if (args.logits.teacher == nullptr) {
    return launch(partial_sums_kernel<kDtype, false, false>, args, args.logits.rows, kThreads, stream);
  }
  if (args.packed_student == nullptr) {
    return launch(partial_sums_kernel<kDtype, true, false>, args, args.logits.rows, kThreads, stream);
  }
  return launch(partial_sums_kernel<kDtype, true, true>, args, args.logits.rows, kThreads, stream);
}

}  // namespace
}  // namespace tcod

extern "C" int tcod_cuda_partial_sums(const TcodPartialSums* args, void* stream) {
  switch (args->logits.dtype) {
    case TCOD_FP32: return tcod::launch_partial_sums<TCOD_FP32>(*args, stream);
    case TCOD_BF16: return tcod::launch_partial_sums<TCOD_BF16>(*args, stream);
    default: return tcod::launch_partial_sums<TCOD_FP16>(*args, stream);
  }
}
