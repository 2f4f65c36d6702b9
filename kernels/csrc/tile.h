/* Register tiles: total[m][n] += scale[n] * sum_k x[k][m] * w[k][n] over one block of k. */
#ifndef LORRY_TILE_H
#define LORRY_TILE_H

#include "common.h"

#define BLOCK_K 64  /* k of one block: what one absmax covers */
#define GROUP_TILES 4 /* 16-column tiles decoded together: 64 x 64 floats, half of a 32 KiB first-level cache */
#define GROUP_COLUMNS (GROUP_TILES * LANES)

#if defined(__AVX512F__)
#define TILE_ACCUMULATORS 24 /* of 32 registers */
#define TILE_MAX_ROWS 12
#else
#define TILE_ACCUMULATORS 6 /* a vf is two of 16 registers */
#define TILE_MAX_ROWS 6
#endif

/* Covers `rows` rows and `columns` 16-column tiles with register tiles, the widest first: TILE(rows, columns) multiplies
 * one and moves on by its columns. */
#define TILE_FITS(rows, columns) ((rows) <= TILE_MAX_ROWS && (rows) * (columns) <= TILE_ACCUMULATORS)
#define TILE_CASE(TILE, r)                                          \
    case r:                                                         \
        for (; TILE_FITS(r, 4) && columns >= 4; columns -= 4) TILE(r, 4); \
        for (; TILE_FITS(r, 2) && columns >= 2; columns -= 2) TILE(r, 2); \
        for (; TILE_FITS(r, 1) && columns >= 1; columns -= 1) TILE(r, 1); \
        break;
#if TILE_MAX_ROWS > 6
#define TILE_CASES(TILE)                                                                                \
    TILE_CASE(TILE, 7) TILE_CASE(TILE, 8) TILE_CASE(TILE, 9) TILE_CASE(TILE, 10) TILE_CASE(TILE, 11) \
    TILE_CASE(TILE, 12)
#else
#define TILE_CASES(TILE)
#endif
#define EACH_TILE(TILE)                                                                                              \
    switch (rows) {                                                                                                  \
        TILE_CASE(TILE, 1) TILE_CASE(TILE, 2) TILE_CASE(TILE, 3) TILE_CASE(TILE, 4) TILE_CASE(TILE, 5) TILE_CASE(TILE, 6) \
        TILE_CASES(TILE)                                                                                             \
    }

/* Adds `columns` 16-column tiles of a block to the totals of `rows` rows.
 * w: [k][GROUP_COLUMNS], x: [rows][BLOCK_K], scale: [GROUP_COLUMNS], total: [rows][GROUP_COLUMNS]; k <= BLOCK_K.
 * One FMA chain per output in ascending k whatever the shape of the tile, so an output's bits depend on its row and
 * its column only. */
void tile_add(const float *w, const float *x, int64_t k, const float *scale, float *total, int rows, int columns);

#endif
