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

/* Adds `columns` 16-column tiles of a block to the totals of `rows` rows.
 * w: [k][GROUP_COLUMNS], x: [rows][BLOCK_K], scale: [GROUP_COLUMNS], total: [rows][GROUP_COLUMNS]; k <= BLOCK_K.
 * One FMA chain per output in ascending k whatever the shape of the tile, so an output's bits depend on its row and
 * its column only. */
void tile_add(const float *w, const float *x, int64_t k, const float *scale, float *total, int rows, int columns);

#endif
