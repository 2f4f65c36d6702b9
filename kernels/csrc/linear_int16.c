/* y = x W^T + bias for NF4 weights, in 16-bit integers: two products an instruction where float32 has one.
 *
 * For 64 k of one row, x = step * X + rounding with integers |X| < 2^15, and code = C / unit + rounding with C the
 * table's 16 values times `unit`. Then
 *
 *     y[m][n] = bias[n] + sum over blocks b of absmax[n][b] * (step[m][b] / unit) * (sum over the block's k of C * X)
 *
 * step is the smallest with which the inner sum cannot leave 32 bits, by the block's sum of |x|; the sum is exact.
 * The outer chain is float32 and the same for one row and for many, so that a row has the same bits in every batch.
 *
 * Weights lie as in linear.c: a word holds the eight nibbles k = 0, 2, 4, 6, 1, 3, 5, 7 of a column, lowest first, so
 * that one shift brings k and k + 1 to the low ends of the word's halves.
 */
#include "linear.h"

#define PAIRS (BLOCK_K / 2)
#define WORD_PAIRS 4
#if defined(__AVX512F__)
#define STREAM_ROWS 8 /* with more, a panel in the cache is as fast */
#define TILE_ROWS 8
#else
#define STREAM_ROWS 3
#define TILE_ROWS TILE_MAX_ROWS
#endif

/* X of one block, and step / unit. The bound on the sum of |X| leaves room for 64 roundings of 1/2, and for those of
 * the float32 sum. A block that holds an Inf or a NaN gets a step that is none either. */
INLINE float round_block(const float *x, float unit, int16_t *out) {
    const vf zero = vf_set1(0.0f);
    vf sum = zero, peak = zero;
    for (int k = 0; k < BLOCK_K; k += LANES) {
        const vf value = vf_load(x + k), magnitude = vf_max(value, vf_sub(zero, value));
        sum = vf_add(sum, magnitude);
        peak = vf_max(peak, magnitude);
    }
    const float most = 2147483647.0f / unit - 48.0f;
    const float by_sum = vf_sum(sum) / most, by_peak = vf_peak(peak) / 32767.0f;
    const float step = (by_sum > by_peak || by_sum != by_sum ? by_sum : by_peak) + 1e-35f;
    const vf scale = vf_set1(1.0f / step);
    for (int k = 0; k < BLOCK_K; k += LANES) vf_store_int16(out + k, vf_mul(vf_load(x + k), scale));
    return step / unit;
}

/* packed[row tile][block of k][row of the tile][BLOCK_K], steps[row tile][block of k][row of the tile] */
static void round_rows(const struct linear *l, const struct rows *r, const float *x, int64_t ldx, int16_t *packed,
                       float *steps, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        const int64_t first = rows_start(r, t), rows = rows_start(r, t + 1) - first;
        int64_t at = first * (l->in_features / BLOCK_K);
        for (int64_t k = 0; k < l->in_features; k += BLOCK_K)
            for (int64_t m = 0; m < rows; m++, at++)
                steps[at] = round_block(x + (first + m) * ldx + k, l->unit, packed + at * BLOCK_K);
    }
}

INLINE vf block_add(vu sum, float step, vf absmax, vf total) {
    return vf_fma(vf_mul(vf_from_int(sum), vf_set1(step)), absmax, total);
}

INLINE uint32_t pair_at(const int16_t *x, int pair) {
    uint32_t both;
    memcpy(&both, x + 2 * pair, sizeof both);
    return both;
}

/* acc[j][m]: sums of `blocks` consecutive blocks, in the order they lie in memory, for each of `rows` rows; x[j] is the
 * j-th block's [rows][BLOCK_K]. */
INLINE void block_dots(const uint32_t *words, const int16_t *const *x, pair_table table, vu (*acc)[STREAM_ROWS],
                       const int blocks, const int rows) {
#pragma GCC unroll 4
    for (int j = 0; j < blocks; j++)
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) acc[j][m] = vu_set1(0);
    for (int step = 0; step < BLOCK_K / 8; step++)
#pragma GCC unroll 4
        for (int j = 0; j < blocks; j++) {
            const uint32_t *at = words + (j * BLOCK_K / 8 + step) * LANES;
            __builtin_prefetch((const char *)at + STREAM_AHEAD);
            const vu word = vu_load(at);
#pragma GCC unroll 4
            for (int i = 0; i < WORD_PAIRS; i++) {
                const vu weight = vu_lookup_pairs(table, VU_SRLI(word, 4 * i));
                const int16_t *pair = x[j] + 2 * (WORD_PAIRS * step + i);
#pragma GCC unroll 8
                for (int m = 0; m < rows; m++) acc[j][m] = vu_dot2_all(weight, pair + m * BLOCK_K, acc[j][m]);
            }
        }
}

/* A few rows, `packed` as one row tile: tiles [begin, end) of a part, whose columns start at `column`. Weights go from
 * memory through registers, `width` blocks side by side, so that there are enough chains. */
INLINE void stream_rows(const struct linear *l, const struct part *p, int64_t begin, int64_t end, int64_t column,
                        const int16_t *packed, const float *steps, float *y, int64_t ldy, const int rows,
                        const int width) {
    const pair_table table = pair_table_load(l->code_int16);
    const int64_t per_row = l->in_features / BLOCK_K, last = end * per_row;
    const vu lanes = vu_lanes((uint32_t)per_row);
    vf totals[STREAM_ROWS];
    int64_t kb = 0, tile = begin;
    for (int64_t i = begin * per_row; i < last;) {
        const int blocks = (int)MIN(width, last - i);
        const uint32_t *words = (const uint32_t *)p->words + i * (BLOCK_K / 8 * LANES);
        const int16_t *x[4];
        vu acc[4][STREAM_ROWS];
        for (int j = 0, at = (int)kb; j < blocks; j++) {
            x[j] = packed + at * rows * BLOCK_K;
            at = at + 1 == per_row ? 0 : at + 1;
        }
        if (blocks == width) {
            block_dots(words, x, table, acc, width, rows);
        } else {
            for (int j = 0; j < blocks; j++)
                block_dots(words + j * (BLOCK_K / 8 * LANES), x + j, table, acc + j, 1, rows);
        }
        for (int j = 0; j < blocks; j++) {
            const vf absmax = block_scale(p, tile, kb, per_row, lanes);
            if (kb == 0)
                for (int m = 0; m < rows; m++) totals[m] = bias_or_zero(l, column + tile * LANES);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) totals[m] = block_add(acc[j][m], steps[kb * rows + m], absmax, totals[m]);
            if (++kb < per_row) continue;
            for (int m = 0; m < rows; m++) vf_store(y + m * ldy + column + tile * LANES, totals[m]);
            kb = 0;
            tile++;
        }
        i += blocks;
    }
}

static void stream(const struct linear *l, const struct part *p, int64_t begin, int64_t end, int64_t column,
                   const int16_t *packed, const float *steps, float *y, int64_t ldy, int64_t rows) {
#define STREAM(r)                                                                                                  \
    case r:                                                                                                        \
        stream_rows(l, p, begin, end, column, packed, steps, y, ldy, MIN(r, STREAM_ROWS), r <= 4 ? 4 : r <= 8 ? 2 : 1); \
        break;
    switch (rows) {
        STREAM(1) STREAM(2) STREAM(3) STREAM(4) STREAM(5) STREAM(6) STREAM(7) STREAM(8)
    }
}

/* panel[pair][n * 16 ..] of one tile and one block. */
INLINE void decode(const struct linear *l, const struct part *p, int64_t tile, int64_t kb, pair_table table, uint32_t *panel) {
    const int64_t ahead = group_ahead(l->in_features * LANES / 2);
    const uint32_t *w = (const uint32_t *)p->words + (tile * l->in_features + kb * BLOCK_K) / 8 * LANES;
    for (int step = 0; step < BLOCK_K / 8; step++, w += LANES, panel += WORD_PAIRS * GROUP_COLUMNS) {
        const vu word = vu_load(w);
        __builtin_prefetch((const char *)w + ahead);
#pragma GCC unroll 4
        for (int i = 0; i < WORD_PAIRS; i++)
            vu_store(panel + i * GROUP_COLUMNS, vu_lookup_pairs(table, VU_SRLI(word, 4 * i)));
    }
}

/* total[m][n] += absmax[n] * steps[m] * sum over pairs of w . x; w [pair][GROUP_COLUMNS], x [rows][BLOCK_K]. */
INLINE void tile(const uint32_t *restrict w, const int16_t *restrict x, const float *restrict steps,
                 const float *restrict absmax, float *restrict total, const int rows, const int columns) {
    vu acc[TILE_MAX_ROWS][GROUP_TILES];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) acc[m][n] = vu_set1(0);
    for (int pair = 0; pair < PAIRS; pair++, w += GROUP_COLUMNS) {
        vu weight[GROUP_TILES];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) weight[n] = vu_load(w + n * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            const vu both = vu_set1(pair_at(x + m * BLOCK_K, pair));
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) acc[m][n] = vu_dot2(weight[n], both, acc[m][n]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            float *t = total + m * GROUP_COLUMNS + n * LANES;
            vf_store(t, block_add(acc[m][n], steps[m], vf_load(absmax + n * LANES), vf_load(t)));
        }
}

static void tile_add_int16(const uint32_t *w, const int16_t *x, const float *steps, const float *absmax, float *total,
                           int rows, int columns) {
#define TILE(r, c) tile(w, x, steps, absmax, total, r, c), w += (c) * LANES, absmax += (c) * LANES, total += (c) * LANES
    EACH_TILE(TILE)
}

struct workspace {
    uint32_t panel[PAIRS * GROUP_COLUMNS];
    float totals[ROW_BLOCK * TILE_MAX_ROWS * GROUP_COLUMNS];
    float absmax[GROUP_COLUMNS];
};

/* Tiles [begin, begin + columns) of a part, columns <= GROUP_TILES, over all packed rows. */
static void group_rows(const struct linear *l, const struct part *p, int64_t begin, int columns, int64_t column,
                       const struct rows *r, const int16_t *packed, const float *steps, float *y, int64_t ldy,
                       struct workspace *ws) {
    const pair_table table = pair_table_load(l->code_int16);
    const int64_t per_row = l->in_features / BLOCK_K;
    const vu lanes = vu_lanes((uint32_t)per_row);
    for (int64_t t0 = 0; t0 < r->tiles; t0 += ROW_BLOCK) {
        const int64_t t1 = MIN(r->tiles, t0 + ROW_BLOCK), m0 = rows_start(r, t0), m1 = rows_start(r, t1);
        for (int n = 0; n < columns; n++) {
            const vf start = bias_or_zero(l, column + (begin + n) * LANES);
            for (int64_t m = 0; m < m1 - m0; m++) vf_store(ws->totals + m * GROUP_COLUMNS + n * LANES, start);
        }
        for (int64_t kb = 0; kb < per_row; kb++) {
            for (int n = 0; n < columns; n++) {
                decode(l, p, begin + n, kb, table, ws->panel + n * LANES);
                vf_store(ws->absmax + n * LANES, block_scale(p, begin + n, kb, per_row, lanes));
            }
            for (int64_t t = t0; t < t1; t++) {
                const int64_t first = rows_start(r, t), rows = rows_start(r, t + 1) - first;
                const int64_t at = first * per_row + kb * rows;
                tile_add_int16(ws->panel, packed + at * BLOCK_K, steps + at, ws->absmax,
                               ws->totals + (first - m0) * GROUP_COLUMNS, (int)rows, columns);
            }
        }
        for (int64_t m = m0; m < m1; m++)
            for (int n = 0; n < columns; n++)
                vf_store(y + m * ldy + column + (begin + n) * LANES,
                         vf_load(ws->totals + (m - m0) * GROUP_COLUMNS + n * LANES));
    }
}

/* One thread's part of rounding the rows, where they are many, and of multiplying them. */
static void rows_forward(const struct linear *l, const struct rows *r, const float *x, int64_t ldx, int16_t *packed,
                         float *steps, float *y, int64_t ldy) {
    struct workspace ws __attribute__((aligned(64)));
    int64_t begin, end, first = 0;
    if (r->count > STREAM_ROWS) {
        split(r->tiles, 1, omp_get_num_threads(), omp_get_thread_num(), &begin, &end);
        round_rows(l, r, x, ldx, packed, steps, begin, end);
#pragma omp barrier
    }
    split(l->tiles, 1, omp_get_num_threads(), omp_get_thread_num(), &begin, &end);
    for (int64_t i = 0; i < l->part_count; first += l->parts[i++].tiles) {
        const struct part *p = l->parts + i;
        const int64_t from = MAX(begin - first, 0), to = MIN(end - first, p->tiles);
        if (from >= to) continue;
        if (r->count <= STREAM_ROWS) {
            stream(l, p, from, to, first * LANES, packed, steps, y, ldy, r->count);
        } else {
            for (int64_t t = from; t < to; t += GROUP_TILES)
                group_rows(l, p, t, (int)MIN(GROUP_TILES, to - t), first * LANES, r, packed, steps, y, ldy, &ws);
        }
    }
}

int linear_int16(const struct linear *l, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy) {
    static __thread struct scratch memory;
    const int threads = threads_for(l->in_features * l->out_features / 32 * m / 2);
    for (int64_t m0 = 0; m0 < m; m0 += SUPERBLOCK) {
        const int64_t count = MIN(SUPERBLOCK, m - m0);
        const struct rows r = count <= STREAM_ROWS ? (struct rows){count, 1, count, 0} : rows_of(count, TILE_ROWS);
        const size_t numbers = (size_t)(r.count * l->in_features);
        int16_t *packed = scratch_get(&memory, numbers * sizeof(int16_t) + numbers / BLOCK_K * sizeof(float));
        if (!packed) return -1;
        float *steps = (float *)(packed + numbers);
        if (count <= STREAM_ROWS) round_rows(l, &r, x + m0 * ldx, ldx, packed, steps, 0, 1); /* a barrier costs more */
        if (threads == 1) {
            rows_forward(l, &r, x + m0 * ldx, ldx, packed, steps, y + m0 * ldy, ldy);
        } else {
#pragma omp parallel num_threads(threads)
            rows_forward(l, &r, x + m0 * ldx, ldx, packed, steps, y + m0 * ldy, ldy);
        }
    }
    return 0;
}
