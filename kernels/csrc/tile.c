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

void tile_add(const float *w, const float *x, int64_t k, const float *scale, float *total, int rows, int columns) {
#define TILE(r, c) tile(w, x, k, scale, total, r, c), w += (c) * LANES, scale += (c) * LANES, total += (c) * LANES
    EACH_TILE(TILE)
}
