// Row kernels for any machine; on x86-64 that is SSE2.

#include "simd_portable.h"

#define TCOD_ROWS portable_rows
#include "rows.inc"
