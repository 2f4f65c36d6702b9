#include "tile.h"

INLINE void tile(const float *restrict w, const float *restrict x, int64_t count, const float *restrict scale,
                 float *restrict total, const int rows, const int columns) {
    vf acc[TILE_MAX_ROWS][GROUP_TILES];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) acc[m][n] = vf_set1(0.0f);
    for (int64_t k = 0; k < count; k++, w += GROUP_COLUMNS, x++) {
        vf weight[GROUP_TILES];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) weight[n] = vf_load(w + n * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            vf value = vf_set1(x[m * BLOCK_K]);
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) acc[m][n] = vf_fma(weight[n], value, acc[m][n]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            float *t = total + m * GROUP_COLUMNS + n * LANES;
            vf_store(t, vf_fma(acc[m][n], vf_load(scale + n * LANES), vf_load(t)));
        }
}

#define FITS(rows, columns) ((rows) <= TILE_MAX_ROWS && (rows) * (columns) <= TILE_ACCUMULATORS)
#define ROWS(r)                                                                   \
    case r:                                                                       \
        for (; FITS(r, 4) && columns >= 4; columns -= 4, w += 4 * LANES)          \
            tile(w, x, k, scale, total, r, 4), scale += 4 * LANES, total += 4 * LANES; \
        for (; FITS(r, 2) && columns >= 2; columns -= 2, w += 2 * LANES)          \
            tile(w, x, k, scale, total, r, 2), scale += 2 * LANES, total += 2 * LANES; \
        for (; FITS(r, 1) && columns >= 1; columns -= 1, w += LANES)              \
            tile(w, x, k, scale, total, r, 1), scale += LANES, total += LANES;    \
        break;

void tile_add(const float *w, const float *x, int64_t k, const float *scale, float *total, int rows, int columns) {
    switch (rows) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
        ROWS(5)
        ROWS(6)
#if TILE_MAX_ROWS > 6
        ROWS(7)
        ROWS(8)
        ROWS(9)
        ROWS(10)
        ROWS(11)
        ROWS(12)
#endif
    }
}
