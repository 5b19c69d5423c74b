// The vector operations that rows.inc is written in, 4 floats wide, in the compiler's own vector types: any machine.

namespace {

constexpr int W = 4;
typedef float V __attribute__((vector_size(16)));
typedef int I __attribute__((vector_size(16)));
typedef unsigned U __attribute__((vector_size(16)));
typedef unsigned short H __attribute__((vector_size(8)));
typedef I M;  // all bits of a lane or none

inline V set(float x) { return V{x, x, x, x}; }

inline V load(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V fnma(V a, V b, V c) { return c - a * b; }
inline V select(M m, V yes, V no) { return (V)((m & (I)yes) | (~m & (I)no)); }
inline V product_where(M m, V a, V b, V otherwise) { return select(m, a * b, otherwise); }
inline V keep(M m, V x) { return (V)(m & (I)x); }
inline V absolute(V x) { return (V)((I)x & 0x7fffffff); }
inline V larger_ignoring_nan(V x, V best) { return select(x > best, x, best); }
inline V at_least(V x, V low) { return select(x < low, low, x); }
inline V at_most(V x, V high) { return select(x > high, high, x); }
inline M less(V a, V b) { return a < b; }
inline M equal(V a, V b) { return a == b; }
inline M not_at_most(V a, V b) { return ~(a <= b); }  // NaN is not
inline M is_nan(V x) { return x != x; }
inline M both(M a, M b) { return a & b; }
inline bool any(M m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }

inline V from_half(H x) {
  const U bits = __builtin_convertvector(x, U);
  const U magnitude = (bits & 0x7fffu) << 13;
  const I value = (I)((V)magnitude * set(0x1p112f));  // moves the exponent, and makes small halves normal
  const I is_special = (I)(magnitude >= (0x7c00u << 13));
  return (V)(value | (is_special & 0x7f800000) | (I)((bits & 0x8000u) << 16));
}

inline H to_half(V x) {
  const U bits = (U)x;
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U tiny = (U)((V)magnitude + set(0.5f)) - (126u << 23);  // the addition rounds to units of 2^-24
  const U large = (U)(magnitude > 0x7f800000u) & 0x0200u;       // a NaN stays one
  const U is_tiny = (U)(magnitude < (113u << 23)), is_large = (U)(magnitude >= (143u << 23));
  const U finite = (is_tiny & tiny) | (~is_tiny & normal);
  return __builtin_convertvector((is_large & (0x7c00u | large)) | (~is_large & finite) | sign, H);
}

}  // namespace
