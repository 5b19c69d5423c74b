"""The Triton kernels behind `ops/triton_chunk.py`, one program a row; importing this needs triton.

The mathematics and its order are those of csrc/cuda: a frame taken from the first tile and the target instead of running
maxima, sums per lane over tiles [LANES, VECTOR] in which a thread holds a lane's VECTOR neighbouring columns, one
reduction at the end in float64, and a second, guarded read of the rare row whose frame was bad or that holds an infinity
or a NaN. The number of passes is the least there is: one for the sums, one more for the mixture of JSD, one for the
gradient.

Pointers, all with last stride 1 and int64 offsets of rows:
    student, teacher  [C, columns] fp32, bf16 or fp16; packed: fp16 student and gap
    column            [C] int64          table  [5, C] float64      row_scale  [C] fp32
    sums              [13 or 4 or 2, C] float64      out  [C, columns] any of the float types, may be student

Not here: checks of arguments, choice of tile sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HEADROOM = tl.constexpr(40.0)
SMALL_GAP = tl.constexpr(0.35)
SMALL_DELTA = tl.constexpr(0.0625)
SCANNED = tl.constexpr(128)  # tiles that one step of the search for a shared maximum looks into
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _product(weight, value, IS_GUARDED: tl.constexpr):
    product = weight * value
    if IS_GUARDED:
        product = tl.where(weight == 0, 0.0, product)
    return product


@triton.jit
def _log2(x, IS_FAST: tl.constexpr):
    """In one instruction if asked; the interpreter knows no such thing."""
    if IS_FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _student_sums(a, IS_GUARDED: tl.constexpr):
    """Shifted logits [LANES, VECTOR] -> total and centred sum of each lane."""
    w = tl.exp2(a * LOG2E)
    return tl.sum(w, 1), tl.sum(_product(w, a, IS_GUARDED), 1)


@triton.jit
def _pair_sums(a, b, HAS_SERIES: tl.constexpr, IS_GUARDED: tl.constexpr):
    """Shifted logits of both -> the eight sums of each lane, in the order of csrc/cuda/partial_sums.cu."""
    w = tl.exp2(a * LOG2E)
    v = tl.exp2(b * LOG2E)
    gap = a - b
    wg = _product(w, gap, IS_GUARDED)
    vg = _product(v, gap, IS_GUARDED)
    total_s, total_t = tl.sum(w, 1), tl.sum(v, 1)
    gap_s, gap_t = tl.sum(wg, 1), tl.sum(vg, 1)
    centred_s = tl.sum(_product(w, a, IS_GUARDED), 1)
    centred_t = tl.sum(_product(v, b, IS_GUARDED), 1)
    if HAS_SERIES:
        g2 = gap * gap
        even = g2 * (0.5 + g2 * (1 / 24 + g2 * (1 / 720)))
        odd = gap * g2 * (1 / 6 + g2 * (1 / 120 + g2 * (1 / 5040)))
        is_small = tl.abs(gap) < SMALL_GAP
        gained = v - w
        excess_s = tl.sum(tl.where(is_small, w * (even - odd), gained + wg), 1)
        excess_t = tl.sum(tl.where(is_small, v * (even + odd), -(gained + vg)), 1)
    else:
        gained_s = (total_t - total_s) + gap_s
        gained_t = -((total_t - total_s) + gap_t)
        excess_s = tl.where(gained_s < 0, 0.0, gained_s)
        excess_t = tl.where(gained_t < 0, 0.0, gained_t)
    return total_s, centred_s, total_t, centred_t, gap_s, gap_t, excess_s, excess_t


@triton.jit
def _pack(s, t, packed_student, packed_gap, offset, mask):
    """Logits over their temperatures, stored as fp16 student and gap."""
    tl.store(packed_student + offset, s.to(tl.float16), mask=mask)
    tl.store(packed_gap + offset, tl.where(s == t, 0.0, s - t).to(tl.float16), mask=mask)


@triton.jit
def _expm1(x):
    """float64; by its series near zero."""
    series = 1.0 + x * (1 / 11)
    for i in tl.static_range(9):
        series = 1.0 + x * (1 / (10 - i)) * series
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1)


@triton.jit
def _not_below_bound(excess, total, difference):
    """E / Z >= r - log1p(r) with r = difference / Z: KL is not negative."""
    r = difference / total
    bracket = 0.5 + r * (-1 / 3 + r * (0.25 + r * (-0.2 + r * (1 / 6 + r * (-1 / 7 + r * 0.125)))))
    bound = total * (r * r * bracket * (1 + 1e-6) + 4e-16 * tl.abs(r))
    return tl.where((tl.abs(r) < 0.05) & (excess < bound), bound, excess)


@triton.jit
def _frame_of(maximum):
    return tl.where(maximum == NONE, 0.0, maximum)


@triton.jit
def partial_sums_kernel(
    student,
    teacher,
    column,
    packed_student,
    packed_gap,
    sums,
    student_stride,
    teacher_stride,
    packed_stride,
    sums_stride,
    columns,
    student_scale,
    teacher_scale,
    HAS_TEACHER: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    IS_PACKING: tl.constexpr,
    HAS_SERIES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    if HAS_TEACHER:
        teacher += row * teacher_stride
    if IS_PACKING:
        packed_student += row * packed_stride
        packed_gap += row * packed_stride
    TILE: tl.constexpr = LANES * VECTOR
    lanes = tl.arange(0, LANES)
    offset = lanes[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR] columns of the first tile
    full = columns // TILE * TILE

    if HAS_COLUMN:
        target = tl.load(column + row)
    else:
        target = tl.full([], -1, tl.int64)
    is_here = (target >= 0) & (target < columns)
    absent = tl.where(target < 0, NONE, float("nan"))
    first = tl.load(student + offset, mask=offset < columns, other=NONE).to(tl.float32)
    student_max = tl.max(first, 1)  # [LANES] raw
    student_target = tl.load(student + target, mask=is_here, other=NONE).to(tl.float32)
    student_frame = tl.maximum(tl.max(student_max), student_target) * student_scale
    tl.store(sums + 3 * sums_stride + row, tl.where(is_here, student_target * student_scale, absent).to(tl.float64))
    teacher_max = student_max
    teacher_frame = student_frame
    if HAS_TEACHER:
        first = tl.load(teacher + offset, mask=offset < columns, other=NONE).to(tl.float32)
        teacher_max = tl.max(first, 1)
        teacher_target = tl.load(teacher + target, mask=is_here, other=NONE).to(tl.float32)
        teacher_frame = tl.maximum(tl.max(teacher_max), teacher_target) * teacher_scale
        tl.store(sums + 7 * sums_stride + row, tl.where(is_here, teacher_target * teacher_scale, absent).to(tl.float64))

    total_s = tl.zeros([LANES], tl.float32)
    centred_s = tl.zeros([LANES], tl.float32)
    total_t = tl.zeros([LANES], tl.float32)
    centred_t = tl.zeros([LANES], tl.float32)
    gap_s = tl.zeros([LANES], tl.float32)
    gap_t = tl.zeros([LANES], tl.float32)
    excess_s = tl.zeros([LANES], tl.float32)
    excess_t = tl.zeros([LANES], tl.float32)
    for start in range(0, full, TILE):
        s = tl.load(student + start + offset).to(tl.float32)
        a = s * student_scale - student_frame
        student_max = tl.maximum(student_max, tl.max(s, 1))
        if HAS_TEACHER:
            t = tl.load(teacher + start + offset).to(tl.float32)
            teacher_max = tl.maximum(teacher_max, tl.max(t, 1))
            if IS_PACKING:
                _pack(s * student_scale, t * teacher_scale, packed_student, packed_gap, start + offset, None)
            d0, d1, d2, d3, d4, d5, d6, d7 = _pair_sums(a, t * teacher_scale - teacher_frame, HAS_SERIES, False)
            total_s += d0
            centred_s += d1
            total_t += d2
            centred_t += d3
            gap_s += d4
            gap_t += d5
            excess_s += d6
            excess_t += d7
        else:
            d0, d1 = _student_sums(a, False)
            total_s += d0
            centred_s += d1
    if full < columns:  # absent columns are -inf: guarded
        mask = full + offset < columns
        s = tl.load(student + full + offset, mask=mask, other=NONE).to(tl.float32)
        a = s * student_scale - student_frame
        student_max = tl.maximum(student_max, tl.max(s, 1))
        if HAS_TEACHER:
            t = tl.load(teacher + full + offset, mask=mask, other=NONE).to(tl.float32)
            teacher_max = tl.maximum(teacher_max, tl.max(t, 1))
            if IS_PACKING:
                _pack(s * student_scale, t * teacher_scale, packed_student, packed_gap, full + offset, mask)
            d0, d1, d2, d3, d4, d5, d6, d7 = _pair_sums(a, t * teacher_scale - teacher_frame, HAS_SERIES, True)
            total_s += d0
            centred_s += d1
            total_t += d2
            centred_t += d3
            gap_s += d4
            gap_t += d5
            excess_s += d6
            excess_t += d7
        else:
            d0, d1 = _student_sums(a, True)
            total_s += d0
            centred_s += d1

    student_raw = tl.max(student_max)
    teacher_raw = tl.max(teacher_max)
    student_top = student_raw * student_scale
    teacher_top = teacher_raw * teacher_scale
    # NaN and infinity anywhere leave these two not finite, or not a number
    all_sums = tl.sum(total_s + tl.abs(centred_s) + total_t + tl.abs(centred_t), 0)
    all_sums += tl.sum(tl.abs(gap_s) + tl.abs(gap_t) + tl.abs(excess_s) + tl.abs(excess_t), 0)
    is_good = (all_sums < 1e38) & (student_top - student_frame <= HEADROOM)
    if HAS_TEACHER:
        is_good = is_good & (teacher_top - teacher_frame <= HEADROOM)
    if not is_good:
        student_frame = _frame_of(student_top)
        teacher_frame = _frame_of(teacher_top)
        total_s = tl.zeros([LANES], tl.float32)
        centred_s = tl.zeros([LANES], tl.float32)
        total_t = tl.zeros([LANES], tl.float32)
        centred_t = tl.zeros([LANES], tl.float32)
        gap_s = tl.zeros([LANES], tl.float32)
        gap_t = tl.zeros([LANES], tl.float32)
        excess_s = tl.zeros([LANES], tl.float32)
        excess_t = tl.zeros([LANES], tl.float32)
        for start in range(0, columns, TILE):
            mask = start + offset < columns
            s = tl.load(student + start + offset, mask=mask, other=NONE).to(tl.float32)
            a = s * student_scale - student_frame
            if HAS_TEACHER:
                t = tl.load(teacher + start + offset, mask=mask, other=NONE).to(tl.float32)
                d0, d1, d2, d3, d4, d5, d6, d7 = _pair_sums(a, t * teacher_scale - teacher_frame, HAS_SERIES, True)
                total_s += d0
                centred_s += d1
                total_t += d2
                centred_t += d3
                gap_s += d4
                gap_t += d5
                excess_s += d6
                excess_t += d7
            else:
                d0, d1 = _student_sums(a, True)
                total_s += d0
                centred_s += d1

    z_s = tl.sum(total_s.to(tl.float64), 0)
    c_s = tl.sum(centred_s.to(tl.float64), 0)
    student_shift = tl.where(is_good, student_frame.to(tl.float64) - student_top.to(tl.float64), 0.0)
    factor_s = tl.exp(student_shift)
    tl.store(sums + row, tl.where(z_s == z_s, student_top.to(tl.float64), z_s))
    tl.store(sums + sums_stride + row, factor_s * z_s)
    tl.store(sums + 2 * sums_stride + row, factor_s * (c_s + student_shift * z_s))
    if HAS_TEACHER:
        z_t = tl.sum(total_t.to(tl.float64), 0)
        c_t = tl.sum(centred_t.to(tl.float64), 0)
        g_s = tl.sum(gap_s.to(tl.float64), 0)
        g_t = tl.sum(gap_t.to(tl.float64), 0)
        e_s = tl.sum(excess_s.to(tl.float64), 0)
        e_t = tl.sum(excess_t.to(tl.float64), 0)
        teacher_shift = tl.where(is_good, teacher_frame.to(tl.float64) - teacher_top.to(tl.float64), 0.0)
        shift = student_shift - teacher_shift
        is_near = tl.abs(shift) < 0.5
        has_digits = is_near & (tl.abs(g_s) + e_s < 0.5 * z_s)
        z_t = tl.where(has_digits, z_s + (e_s - g_s), z_t)
        less = _expm1(-shift)
        factor_t = tl.exp(teacher_shift)
        moved_s = factor_s * (e_s + z_s * shift + z_t * less)
        moved_t = factor_t * (e_t - z_t * shift + z_s * _expm1(shift))
        g_s = factor_s * (g_s + shift * z_s)
        g_t = factor_t * (g_t + shift * z_t)
        c_t = factor_t * (c_t + teacher_shift * z_t)
        z_s = factor_s * z_s
        z_t = factor_t * z_t
        e_s = tl.where(is_near, moved_s, z_t - z_s + g_s)
        e_t = tl.where(is_near, moved_t, z_s - z_t - g_t)
        tl.store(sums + 4 * sums_stride + row, tl.where(z_t == z_t, teacher_top.to(tl.float64), z_t))
        tl.store(sums + 5 * sums_stride + row, z_t)
        tl.store(sums + 6 * sums_stride + row, c_t)
        tl.store(sums + 8 * sums_stride + row, g_s)
        tl.store(sums + 9 * sums_stride + row, g_t)
        tl.store(sums + 10 * sums_stride + row, _not_below_bound(e_s, z_s, z_t - z_s))
        tl.store(sums + 11 * sums_stride + row, _not_below_bound(e_t, z_t, z_s - z_t))
        # only a lane that met both maxima can have met them in one column
        student_raw = tl.where(student_raw > NONE, student_raw, float("nan"))
        teacher_raw = tl.where(teacher_raw > NONE, teacher_raw, float("nan"))
        met_both = (student_max == student_raw) & (teacher_max == teacher_raw)
        step = tl.arange(0, SCANNED)[:, None] * TILE + tl.arange(0, VECTOR)[None, :]
        is_shared = 0
        for _ in range(tl.sum(met_both.to(tl.int32), 0)):
            lane = tl.min(tl.where(met_both, lanes, LANES), 0)
            met_both = met_both & (lanes != lane)
            for start in range(0, columns, SCANNED * TILE):
                at = start + lane * VECTOR + step
                s = tl.load(student + at, mask=at < columns, other=NONE).to(tl.float32)
                t = tl.load(teacher + at, mask=at < columns, other=NONE).to(tl.float32)
                is_shared += tl.sum(((s == student_raw) & (t == teacher_raw)).to(tl.int32))
        tl.store(sums + 12 * sums_stride + row, tl.where(is_shared > 0, 1.0, 0.0).to(tl.float64))


@triton.jit
def _shifted(s, t, student_scale, teacher_scale, student_max, teacher_max, offset, IS_PACKED: tl.constexpr):
    """Shifted logits, and log p_T - log p_S, which is `offset` beside them."""
    a = s * student_scale - student_max
    if IS_PACKED:
        b = (s - t) - teacher_max
        delta = offset - t
    else:
        b = t * teacher_scale - teacher_max
        delta = offset - (a - b)
    return a, b, delta


@triton.jit
def _row_table(table, table_stride, IS_PACKED: tl.constexpr):
    """float64 maximum and log-total of student and teacher, and the constant part of log p_T - log p_S."""
    max_s = tl.load(table)
    log_total_s = tl.load(table + table_stride)
    max_t = tl.load(table + 2 * table_stride)
    log_total_t = tl.load(table + 3 * table_stride)
    offset = log_total_s - log_total_t
    if IS_PACKED:
        offset += max_s - max_t
    return max_s, log_total_s, max_t, log_total_t, offset


@triton.jit
def _log_mixture_series(delta, beta):
    """log(1 - beta + beta e^delta) for small delta: the cumulants of a coin, to the fourth power."""
    variance = beta * (1 - beta)
    third = variance * (1 - 2 * beta) * (1 / 6)
    fourth = variance * (1 - 6 * variance) * (1 / 24)
    return delta * (beta + delta * (variance * 0.5 + delta * (third + delta * fourth)))


@triton.jit
def _mixture_sums(a, b, delta, log2_total_s, log2_total_t, beta, HAS_SERIES: tl.constexpr, HAS_FAST_LOG: tl.constexpr):
    """One tile's sums of p_S log2(m / p_S) and p_T log2(m / p_T) of each lane, by the larger and the smaller of a pair."""
    log2_p = a * LOG2E - log2_total_s
    log2_q = b * LOG2E - log2_total_t
    big = tl.exp2(tl.maximum(log2_p, log2_q, propagate_nan=tl.PropagateNan.ALL))
    difference = tl.abs(delta) * LOG2E
    difference = tl.where(difference < 1000, difference, 1000.0)  # also where both logits are -inf
    ratio = tl.exp2(-difference)
    is_teacher_big = delta > 0
    share = tl.where(is_teacher_big, 1 - beta, beta)  # of the smaller
    y = _log2((1 - share) + share * ratio, HAS_FAST_LOG)  # log2(m / big)
    if HAS_SERIES:
        series = _log_mixture_series(delta, beta) - tl.where(is_teacher_big, delta, 0.0)
        y = tl.where(tl.abs(delta) < SMALL_DELTA, series * LOG2E, y)
    of_big = big * y
    of_small = big * ratio * (y + difference)
    from_student = tl.where(is_teacher_big, of_small, of_big)
    from_teacher = tl.where(is_teacher_big, of_big, of_small)
    return tl.sum(from_student, 1), tl.sum(from_teacher, 1)


@triton.jit
def mixture_sums_kernel(
    student,
    teacher,
    table,
    sums,
    student_stride,
    teacher_stride,
    table_stride,
    sums_stride,
    columns,
    student_scale,
    teacher_scale,
    beta,
    IS_PACKED: tl.constexpr,
    HAS_SERIES: tl.constexpr,
    HAS_FAST_LOG: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    max_s, log_total_s, max_t, log_total_t, offset_of_delta = _row_table(table + row, table_stride, IS_PACKED)
    student_max = max_s.to(tl.float32)
    teacher_max = max_t.to(tl.float32)
    beside = offset_of_delta.to(tl.float32)
    log2_total_s = (log_total_s * LOG2E).to(tl.float32)
    log2_total_t = (log_total_t * LOG2E).to(tl.float32)
    TILE: tl.constexpr = LANES * VECTOR
    offset = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]
    full = columns // TILE * TILE
    from_student = tl.zeros([LANES], tl.float32)
    from_teacher = tl.zeros([LANES], tl.float32)
    for start in range(0, full, TILE):
        s = tl.load(student + start + offset).to(tl.float32)
        t = tl.load(teacher + start + offset).to(tl.float32)
        a, b, delta = _shifted(s, t, student_scale, teacher_scale, student_max, teacher_max, beside, IS_PACKED)
        d0, d1 = _mixture_sums(a, b, delta, log2_total_s, log2_total_t, beta, HAS_SERIES, HAS_FAST_LOG)
        from_student += d0
        from_teacher += d1
    if full < columns:
        mask = full + offset < columns
        s = tl.load(student + full + offset, mask=mask, other=NONE).to(tl.float32)
        t = tl.load(teacher + full + offset, mask=mask, other=0.0 if IS_PACKED else NONE).to(tl.float32)
        a, b, delta = _shifted(s, t, student_scale, teacher_scale, student_max, teacher_max, beside, IS_PACKED)
        d0, d1 = _mixture_sums(a, b, delta, log2_total_s, log2_total_t, beta, HAS_SERIES, HAS_FAST_LOG)
        from_student += d0
        from_teacher += d1
    tl.store(sums + row, tl.sum(from_student.to(tl.float64), 0) * -LN2)
    tl.store(sums + sums_stride + row, tl.sum(from_teacher.to(tl.float64), 0) * -LN2)


@triton.jit
def logits_gradient_kernel(
    student,
    teacher,
    table,
    row_scale,
    column,
    out,
    student_stride,
    teacher_stride,
    table_stride,
    out_stride,
    columns,
    student_scale,
    teacher_scale,
    beta,
    KIND: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_SERIES: tl.constexpr,
    HAS_FAST_LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    out += row * out_stride
    columns_of_block = tl.arange(0, BLOCK)
    scale = tl.load(row_scale + row)
    if scale == 0:
        zeros = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(0, columns, BLOCK):
            tl.store(out + start + columns_of_block, zeros, mask=start + columns_of_block < columns)
    else:
        max_s, log_total_s, max_t, log_total_t, offset_of_delta = _row_table(table + row, table_stride, IS_PACKED)
        centre = tl.load(table + 4 * table_stride + row)
        student_max = max_s.to(tl.float32)
        teacher_max = max_t.to(tl.float32)
        weight = (scale.to(tl.float64) * tl.exp(-log_total_s)).to(tl.float32)
        teacher_weight = (scale.to(tl.float64) * tl.exp(-log_total_t)).to(tl.float32)
        offset = offset_of_delta.to(tl.float32)
        if KIND == "reverse_kl":
            offset = -weight * (offset_of_delta + centre).to(tl.float32)
        if KIND == "jsd":
            weight = weight * (beta - 1)
        centre = centre.to(tl.float32)
        either = weight + offset
        zero = tl.where(either == either, 0.0, either)  # of a column without weight; NaN where the row is
        if KIND == "nll":
            target = tl.load(column + row).to(tl.int32)
        else:
            teacher += row * teacher_stride
        for start in range(0, columns, BLOCK):
            at = start + columns_of_block
            mask = at < columns
            a = tl.load(student + at, mask=mask, other=0.0).to(tl.float32)
            if KIND == "nll":
                a = a * student_scale - student_max
                value = tl.exp2(a * LOG2E) * weight - tl.where(at == target, scale, 0.0)
            else:
                t = tl.load(teacher + at, mask=mask, other=0.0).to(tl.float32)
                if IS_PACKED:
                    b = (a - t) - teacher_max
                    a = a - student_max
                    gap = t
                else:
                    b = t * teacher_scale - teacher_max
                    a = a * student_scale - student_max
                    gap = a - b
                exp_a = tl.exp2(a * LOG2E)
                if KIND == "forward_kl":
                    value = exp_a * weight - tl.exp2(b * LOG2E) * teacher_weight
                elif KIND == "reverse_kl":
                    value = tl.where(exp_a == 0, zero, exp_a * (gap * weight + offset))
                else:
                    delta = offset - gap  # log p_T - log p_S
                    power = delta * LOG2E
                    ratio = tl.exp2(tl.where(power < 126, power, 126.0))  # also where both logits are -inf
                    log_mixture = _log2((1 - beta) + beta * ratio, HAS_FAST_LOG) * LN2  # log(m / p_S)
                    if HAS_SERIES:
                        log_mixture = tl.where(tl.abs(delta) < SMALL_DELTA, _log_mixture_series(delta, beta), log_mixture)
                    value = exp_a * (log_mixture * weight + centre * weight)
            tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)
