#include "common.h"

/* The lanes this build uses: "avx512", "avx2" or "plain". */
EXPORT const char *simd_name(void) { return LORRY_SIMD; }

/* Threads a kernel would use now. */
EXPORT int thread_count(void) { return omp_get_max_threads(); }
