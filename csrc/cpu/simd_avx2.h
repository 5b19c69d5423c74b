// The vector operations that rows.inc is written in, 8 floats wide. Included after <immintrin.h>, under a target pragma.

namespace {

constexpr int W = 8;
typedef __m256 V;
typedef __m256 M;  // all bits of a lane or none
typedef int I __attribute__((vector_size(32)));
typedef unsigned U __attribute__((vector_size(32)));
typedef unsigned short H __attribute__((vector_size(16)));

inline V set(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
inline V absolute(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
// The x86 maximum and minimum give their second operand when one is NaN.
inline V larger_ignoring_nan(V x, V best) { return _mm256_max_ps(x, best); }
inline V at_least(V x, V low) { return _mm256_max_ps(low, x); }
inline V at_most(V x, V high) { return _mm256_min_ps(high, x); }
inline M less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline M equal(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline M not_at_most(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }  // NaN is not
inline M is_nan(V x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
inline M both(M a, M b) { return _mm256_and_ps(a, b); }
inline bool any(M m) { return _mm256_movemask_ps(m) != 0; }
inline V select(M m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
inline V product_where(M m, V a, V b, V otherwise) { return select(m, _mm256_mul_ps(a, b), otherwise); }
inline V keep(M m, V x) { return _mm256_and_ps(m, x); }
inline V from_half(H x) { return _mm256_cvtph_ps((__m128i)x); }
inline H to_half(V x) { return (H)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

}  // namespace
