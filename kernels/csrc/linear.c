/* y = x W^T + bias for NF4 weights and for dense 16- and 32-bit ones.
 *
 * Both are stored in tiles of 16 output columns, so that one vector load brings the same k of 16 columns: NF4 as
 * [N/16][K/8][16] words of eight nibbles, dense as [N/16][K][16]. One row streams the weights through registers;
 * more rows decode a group of tiles into the cache, 64 k at a time, and run register tiles over it.
 * An output is sum over blocks of 64 k of absmax * (sum of code * x): the same chain on both ways.
 */
#include "kernels.h"

/* The eight elements of a word in the order of its nibbles: 0, 2, 4, 6, 1, 3, 5, 7 (linear_int16.c says why). */
#define NF4_WEIGHT(table, word, i) vf_lookup16(table, VU_SRLI(word, ((i) % 2 * 4 + (i) / 2) * 4))

INLINE vf nf4_step8(vf table, vu word, const float *x, vf acc) {
    acc = vf_fma(NF4_WEIGHT(table, word, 0), vf_set1(x[0]), acc);
    acc = vf_fma(NF4_WEIGHT(table, word, 1), vf_set1(x[1]), acc);
    acc = vf_fma(NF4_WEIGHT(table, word, 2), vf_set1(x[2]), acc);
    acc = vf_fma(NF4_WEIGHT(table, word, 3), vf_set1(x[3]), acc);
    acc = vf_fma(NF4_WEIGHT(table, word, 4), vf_set1(x[4]), acc);
    acc = vf_fma(NF4_WEIGHT(table, word, 5), vf_set1(x[5]), acc);
    acc = vf_fma(NF4_WEIGHT(table, word, 6), vf_set1(x[6]), acc);
    return vf_fma(NF4_WEIGHT(table, word, 7), vf_set1(x[7]), acc);
}

/* Sums of `blocks` consecutive blocks of BLOCK_K k in the order they lie in memory; one chain each. */
INLINE void block_sums(const int kind, const void *words, int64_t first, const float *const *x, vf table, vf *acc,
                       const int blocks) {
    for (int j = 0; j < blocks; j++) acc[j] = vf_set1(0.0f);
    if (kind == NF4) {
        const uint32_t *w = (const uint32_t *)words + first * (BLOCK_K / 8 * LANES);
        for (int step = 0; step < BLOCK_K / 8; step++)
#pragma GCC unroll 4
            for (int j = 0; j < blocks; j++) {
                const uint32_t *word = w + (j * BLOCK_K / 8 + step) * LANES;
                __builtin_prefetch(word + STREAM_AHEAD / sizeof *word);
                acc[j] = nf4_step8(table, vu_load(word), x[j] + step * 8, acc[j]);
            }
    } else {
        const void *w = elem_at(kind, words, first * BLOCK_K * LANES);
        for (int k = 0; k < BLOCK_K; k++)
#pragma GCC unroll 4
            for (int j = 0; j < blocks; j++)
                acc[j] = vf_fma(vf_load_as(kind, elem_at(kind, w, (j * BLOCK_K + k) * LANES)), vf_set1(x[j][k]), acc[j]);
    }
}

/* One row: tiles [begin, end) of a part, whose columns start at `column`. */
INLINE void stream_row(const int kind, const struct linear *l, const struct part *p, int64_t begin, int64_t end,
                       int64_t column, const float *x, float *y) {
    const vf table = kind == NF4 ? vf_load(l->code) : vf_set1(0.0f);
    const int64_t per_row = l->in_features / BLOCK_K, last = end * per_row;
    const vu lanes = vu_lanes((uint32_t)per_row);
    int64_t kb = 0, tile = begin;
    vf total = bias_or_zero(l, column + tile * LANES);
    for (int64_t i = begin * per_row; i < last;) {
        const int blocks = (int)MIN(4, last - i);
        const float *rows[4];
        vf acc[4];
        for (int j = 0, at = (int)kb; j < blocks; j++) {
            rows[j] = x + at * BLOCK_K;
            at = at + 1 == per_row ? 0 : at + 1;
        }
        if (blocks == 4) {
            block_sums(kind, p->words, i, rows, table, acc, 4);
        } else {
            for (int j = 0; j < blocks; j++) block_sums(kind, p->words, i + j, rows + j, table, acc + j, 1);
        }
        for (int j = 0; j < blocks; j++) {
            vf scale = kind == NF4 ? block_scale(p, tile, kb, per_row, lanes) : vf_set1(1.0f);
            total = vf_fma(acc[j], scale, total);
            if (++kb == per_row) {
                int64_t at = column + tile * LANES;
                vf_store_some(F32, y + at, total, (int)MIN(LANES, l->out_features - at));
                kb = 0;
                if (++tile < end) total = bias_or_zero(l, column + tile * LANES);
            }
        }
        i += blocks;
    }
}

/* panel[k][n * 16 ..] of one tile and one block of `count` k. */
INLINE void decode(const int kind, const struct linear *l, const struct part *p, int64_t tile, int64_t kb, int64_t count,
                   float *panel) {
    const int64_t ahead = group_ahead(l->in_features * LANES * (kind == NF4 ? 1 : 2 * elem_size(kind)) / 2);
    if (kind == NF4) {
        const vf table = vf_load(l->code);
        const uint32_t *w = (const uint32_t *)p->words + (tile * l->in_features + kb * BLOCK_K) / 8 * LANES;
        for (int step = 0; step < BLOCK_K / 8; step++, w += LANES, panel += 8 * GROUP_COLUMNS) {
            const vu word = vu_load(w);
            __builtin_prefetch((const char *)w + ahead);
            vf_store(panel + 0 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 0));
            vf_store(panel + 1 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 1));
            vf_store(panel + 2 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 2));
            vf_store(panel + 3 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 3));
            vf_store(panel + 4 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 4));
            vf_store(panel + 5 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 5));
            vf_store(panel + 6 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 6));
            vf_store(panel + 7 * GROUP_COLUMNS, NF4_WEIGHT(table, word, 7));
        }
    } else {
        const void *w = elem_at(kind, p->words, (tile * l->in_features + kb * BLOCK_K) * LANES);
        for (int64_t k = 0; k < count; k++) {
            __builtin_prefetch((const char *)elem_at(kind, w, k * LANES) + ahead);
            vf_store(panel + k * GROUP_COLUMNS, vf_load_as(kind, elem_at(kind, w, k * LANES)));
        }
    }
}

INLINE int64_t padded(int64_t k) { return (k + BLOCK_K - 1) / BLOCK_K * BLOCK_K; }

/* packed[row tile][block of k][row of the tile][BLOCK_K] */
static void pack_rows(const struct rows *r, const float *x, int64_t ldx, int64_t k_count, float *packed, int64_t begin,
                      int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        const int64_t first = rows_start(r, t), rows = rows_start(r, t + 1) - first;
        float *out = packed + first * padded(k_count);
        for (int64_t k = 0; k < k_count; k += BLOCK_K)
            for (int64_t m = 0; m < rows; m++, out += BLOCK_K)
                memcpy(out, x + (first + m) * ldx + k, (size_t)MIN(BLOCK_K, k_count - k) * sizeof(float));
    }
}

struct workspace {
    float panel[BLOCK_K * GROUP_COLUMNS];
    float totals[ROW_BLOCK * TILE_MAX_ROWS * GROUP_COLUMNS];
    float scale[GROUP_COLUMNS];
};

/* Tiles [begin, begin + columns) of a part, columns <= GROUP_TILES, over all packed rows. */
INLINE void group_rows(const int kind, const struct linear *l, const struct part *p, int64_t begin, int columns,
                       int64_t column, const struct rows *r, const float *packed, float *y, int64_t ldy,
                       struct workspace *ws) {
    const int64_t k_count = l->in_features, per_row = k_count / BLOCK_K;
    const vu lanes = vu_lanes((uint32_t)per_row);
    for (int64_t t0 = 0; t0 < r->tiles; t0 += ROW_BLOCK) {
        const int64_t t1 = MIN(r->tiles, t0 + ROW_BLOCK), m0 = rows_start(r, t0), m1 = rows_start(r, t1);
        for (int n = 0; n < columns; n++) {
            const vf start = bias_or_zero(l, column + (begin + n) * LANES);
            for (int64_t m = 0; m < m1 - m0; m++) vf_store(ws->totals + m * GROUP_COLUMNS + n * LANES, start);
        }
        for (int64_t k0 = 0; k0 < k_count; k0 += BLOCK_K) {
            const int64_t count = MIN(BLOCK_K, k_count - k0);
            for (int n = 0; n < columns; n++) {
                decode(kind, l, p, begin + n, k0 / BLOCK_K, count, ws->panel + n * LANES);
                vf_store(ws->scale + n * LANES,
                         kind == NF4 ? block_scale(p, begin + n, k0 / BLOCK_K, per_row, lanes) : vf_set1(1.0f));
            }
            for (int64_t t = t0; t < t1; t++) {
                const int64_t first = rows_start(r, t), rows = rows_start(r, t + 1) - first;
                tile_add(ws->panel, packed + first * padded(k_count) + k0 * rows, count, ws->scale,
                         ws->totals + (first - m0) * GROUP_COLUMNS, (int)rows, columns);
            }
        }
        for (int64_t m = m0; m < m1; m++)
            for (int n = 0; n < columns; n++) {
                int64_t at = column + (begin + n) * LANES;
                vf_store_some(F32, y + m * ldy + at, vf_load(ws->totals + (m - m0) * GROUP_COLUMNS + n * LANES),
                              (int)MIN(LANES, l->out_features - at));
            }
    }
}

/* This thread's share of all tiles of all parts. */
INLINE void share(const int kind, const struct linear *l, const struct rows *r, const float *x, const float *packed,
                  float *y, int64_t ldy, struct workspace *ws) {
    int64_t begin, end, first = 0;
    split(l->tiles, 1, omp_get_num_threads(), omp_get_thread_num(), &begin, &end);
    for (int64_t i = 0; i < l->part_count; first += l->parts[i++].tiles) {
        const struct part *p = l->parts + i;
        const int64_t from = MAX(begin - first, 0), to = MIN(end - first, p->tiles);
        if (from >= to) continue;
        if (!packed) {
            stream_row(kind, l, p, from, to, first * LANES, x, y);
        } else {
            for (int64_t t = from; t < to; t += GROUP_TILES)
                group_rows(kind, l, p, t, (int)MIN(GROUP_TILES, to - t), first * LANES, r, packed, y, ldy, ws);
        }
    }
}

static void share_kind(const struct linear *l, const struct rows *r, const float *x, const float *packed, float *y,
                       int64_t ldy, struct workspace *ws) {
    switch (l->kind) {
        case NF4: share(NF4, l, r, x, packed, y, ldy, ws); break;
        case DENSE_BF16: share(DENSE_BF16, l, r, x, packed, y, ldy, ws); break;
        case DENSE_F16: share(DENSE_F16, l, r, x, packed, y, ldy, ws); break;
        default: share(DENSE_F32, l, r, x, packed, y, ldy, ws);
    }
}

/* One thread's part of packing the rows and of multiplying them. */
static void rows_forward(const struct linear *l, const struct rows *r, const float *x, int64_t ldx, float *packed,
                         float *y, int64_t ldy) {
    struct workspace ws __attribute__((aligned(64)));
    int64_t begin, end;
    split(r->tiles, 1, omp_get_num_threads(), omp_get_thread_num(), &begin, &end);
    pack_rows(r, x, ldx, l->in_features, packed, begin, end);
#pragma omp barrier
    share_kind(l, r, x, packed, y, ldy, &ws);
}

/* x [m][ldx] float32, y [m][ldy] float32. Returns 0, or -1 when memory is out. */
EXPORT int linear_forward(const struct linear *l, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy) {
    if (l->kind == NF4_INT16) return linear_int16(l, x, m, ldx, y, ldy);
    static __thread struct scratch packed_rows;
    const int threads = threads_for(l->in_features * l->out_features / 16 * m / 2);
    if (m == 1 && l->in_features % BLOCK_K == 0) {
        if (threads == 1) {
            share_kind(l, NULL, x, NULL, y, ldy, NULL);
        } else {
#pragma omp parallel num_threads(threads)
            share_kind(l, NULL, x, NULL, y, ldy, NULL);
        }
        return 0;
    }
    for (int64_t m0 = 0; m0 < m; m0 += SUPERBLOCK) {
        const struct rows r = rows_of(MIN(SUPERBLOCK, m - m0), TILE_MAX_ROWS);
        float *packed = scratch_get(&packed_rows, (size_t)(r.count * padded(l->in_features)) * sizeof(float));
        if (!packed) return -1;
        if (threads == 1) {
            rows_forward(l, &r, x + m0 * ldx, ldx, packed, y + m0 * ldy, ldy);
        } else {
#pragma omp parallel num_threads(threads)
            rows_forward(l, &r, x + m0 * ldx, ldx, packed, y + m0 * ldy, ldy);
        }
    }
    return 0;
}

static void copy_rows(enum elem type, const void *words, int64_t k_count, const int64_t *ids, float *out, int64_t begin,
                      int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        const void *tile = elem_at(type, words, ids[t] / LANES * k_count * LANES);
        for (int64_t k = 0; k < k_count; k++) out[t * k_count + k] = elem_load(type, tile, k * LANES + ids[t] % LANES);
    }
}

/* out[t] = W[ids[t]] in float32; dense weights only. Returns 0, or 1 when an id is out of range. */
EXPORT int linear_rows(const struct linear *l, const int64_t *ids, int64_t count, float *out) {
    const int64_t k_count = l->in_features;
    const enum elem type = (enum elem)l->kind;
    for (int64_t t = 0; t < count; t++)
        if (ids[t] < 0 || ids[t] >= l->out_features) return 1;
    OVER_ITEMS(count, count * k_count, copy_rows(type, l->parts->words, k_count, ids, out, begin, end));
    return 0;
}
