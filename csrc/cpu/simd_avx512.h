// The vector operations that rows.inc is written in, 16 floats wide. Included after <immintrin.h>, under a target pragma.

namespace {

constexpr int W = 16;
typedef __m512 V;
typedef __mmask16 M;
typedef int I __attribute__((vector_size(64)));
typedef unsigned U __attribute__((vector_size(64)));
typedef unsigned short H __attribute__((vector_size(32)));

inline V set(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
inline V absolute(V x) { return _mm512_abs_ps(x); }
// The x86 maximum and minimum give their second operand when one is NaN.
inline V larger_ignoring_nan(V x, V best) { return _mm512_max_ps(x, best); }
inline V at_least(V x, V low) { return _mm512_max_ps(low, x); }
inline V at_most(V x, V high) { return _mm512_min_ps(high, x); }
inline M less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline M not_at_most(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }  // NaN is not
inline M is_nan(V x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline M both(M a, M b) { return a & b; }
inline bool any(M m) { return m != 0; }
inline V select(M m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
inline V product_where(M m, V a, V b, V otherwise) { return _mm512_mask_mul_ps(otherwise, m, a, b); }
inline V keep(M m, V x) { return _mm512_maskz_mov_ps(m, x); }
inline V from_half(H x) { return _mm512_cvtph_ps((__m256i)x); }
inline H to_half(V x) { return (H)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

}  // namespace
