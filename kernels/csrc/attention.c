/* Causal attention over a paged cache, decode and prefill in one call.
 *
 * Keys and values are walked in panels of 64 tokens and chunks of 256, both aligned to the sequence's first token:
 * within a chunk the softmax is online over panels, chunks are merged in ascending order. A row's bits therefore
 * depend on its own tokens only, not on the batch, on how a prompt was cut, or on which thread did what.
 * Where many query rows share a panel, it is decoded to float32 once for all of them; a few rows read it as it lies,
 * with the same operations in the same order.
 *
 * In a block of 16 tokens the keys lie as [d][16], so that one load brings a dimension of all 16, the values as [16][d].
 */
#include "kernels.h"

#define PANEL GROUP_COLUMNS
#define CHUNK (4 * PANEL)
#define BLOCK 16 /* tokens of a cache block */
#define MAX_QUERIES 64
#define MAX_HEAD 256
#define TASK_QUERIES 48 /* four register tiles share a decoded panel */
#define DIRECT_QUERIES (TILE_ACCUMULATORS / 4) /* at most so many rows read the cache itself */

struct attention {
    const float *q;
    int64_t q_stride, q_head_stride, q_heads, kv_heads, d;
    const void *k_cache, *v_cache;
    int64_t type;
    const int32_t *block_tables;
    int64_t table_stride;
    const int32_t *cu_seqlens, *kv_lens;
    int64_t sequences;
    float scale;
    int64_t window;
    float *out;
};

/* Query rows [row, row + rows) of a sequence and one key head; chunk >= 0: that chunk only, left to be merged. */
struct task {
    int32_t sequence, head, row, rows, chunk;
    float *partial;
};

/* Softmax state of `queries` rows over part of the tokens: peak, sum and unnormalized output. */
struct state {
    float peak[MAX_QUERIES], sum[MAX_QUERIES];
    float out[MAX_HEAD / PANEL][MAX_QUERIES][PANEL];
};

struct workspace {
    float keys[MAX_HEAD][PANEL];                         /* [d][token] */
    float values[MAX_HEAD / PANEL][PANEL][PANEL];        /* [column group][token][column] */
    float queries[MAX_HEAD / BLOCK_K][MAX_QUERIES][BLOCK_K]; /* scaled */
    float scores[MAX_QUERIES][PANEL];
    struct state chunk, total;
};

INLINE float exp_of(float x) {
    float lanes[LANES];
    vf_store(lanes, vf_exp(vf_set1(x)));
    return lanes[0];
}

/* Tokens [first, first + PANEL) of one head. Values outside [low, high) become zeros; keys there may be anything, as
 * the scores are overwritten. Blocks that lie outside as a whole are not read. */
INLINE void decode_panel(const enum elem type, const struct attention *a, const int32_t *table, int64_t head,
                         int64_t first, int64_t low, int64_t high, struct workspace *ws) {
    const int64_t d = a->d;
    for (int64_t t0 = 0; t0 < PANEL; t0 += BLOCK) {
        const int64_t token = first + t0;
        const int live = token + BLOCK > low ? (int)MAX(0, MIN(BLOCK, high - token)) : 0;
        if (live) {
            const int64_t at = ((int64_t)table[token / BLOCK] * a->kv_heads + head) * BLOCK * d;
            for (int64_t c = 0; c < d; c++)
                vf_store(&ws->keys[c][t0], vf_load_as(type, elem_at(type, a->k_cache, at + c * BLOCK)));
            for (int64_t c = 0; c < d; c += LANES)
                for (int t = 0; t < live; t++)
                    vf_store(&ws->values[c / PANEL][t0 + t][c % PANEL],
                             vf_load_as(type, elem_at(type, a->v_cache, at + t * d + c)));
        }
        for (int t = live; t < BLOCK; t++)
            for (int64_t c = 0; c < d; c += LANES)
                vf_store(&ws->values[c / PANEL][t0 + t][c % PANEL], vf_set1(0.0f));
    }
}

/* Brings the blocks of the panel that comes next towards the core while this one is computed. */
INLINE void prefetch_panel(const struct attention *a, const int32_t *table, int64_t head, int64_t first, int64_t high) {
    const int64_t bytes = BLOCK * a->d * elem_size((enum elem)a->type);
    for (int64_t token = first; token < MIN(high, first + PANEL); token += BLOCK) {
        const int64_t at = ((int64_t)table[token / BLOCK] * a->kv_heads + head) * bytes;
        for (int64_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch((const char *)a->k_cache + at + i, 0, 2);
            __builtin_prefetch((const char *)a->v_cache + at + i, 0, 2);
        }
    }
}

/* Where the blocks of a panel lie in the caches, for one head; those with no live token repeat one that has. */
struct blocks {
    int64_t at[PANEL / BLOCK];
};

INLINE struct blocks blocks_of(const struct attention *a, const int32_t *table, int64_t head, int64_t first, int64_t low,
                               int64_t high) {
    const int64_t begin = MAX(0, low - first) / BLOCK, last = (MIN(PANEL, high - first) - 1) / BLOCK;
    struct blocks b;
    for (int64_t i = 0; i < PANEL / BLOCK; i++) {
        const int64_t live = MAX(begin, MIN(i, last));
        b.at[i] = ((int64_t)table[first / BLOCK + live] * a->kv_heads + head) * BLOCK * a->d;
    }
    return b;
}

/* scores[m][16 n ..] += sum over k of x[m][k] * keys[k] of `columns` blocks from `at` on. */
INLINE void direct_scores(const enum elem type, const void *cache, const int64_t *at, const float *x, int64_t count,
                          float *scores, const int rows, const int columns) {
    vf acc[DIRECT_QUERIES][4];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) acc[m][n] = vf_set1(0.0f);
    for (int64_t k = 0; k < count; k++) {
        vf key[4];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) key[n] = vf_load_as(type, elem_at(type, cache, at[n] + k * BLOCK));
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) acc[m][n] = vf_fma(key[n], vf_set1(x[m * BLOCK_K + k]), acc[m][n]);
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            float *s = scores + m * PANEL + n * BLOCK;
            vf_store(s, vf_add(acc[m][n], vf_load(s)));
        }
}

/* out[m][16 n ..] += sum over the panel's tokens [low, high) of weights[m][token] * values[token], columns from c on. */
INLINE void direct_values(const enum elem type, const void *cache, const int64_t *at, int64_t low, int64_t high,
                          int64_t d, int64_t c, const float *weights, float *out, const int rows, const int columns) {
    vf acc[DIRECT_QUERIES][4];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) acc[m][n] = vf_set1(0.0f);
    for (int64_t t = low; t < high; t++) {
        const void *token = elem_at(type, cache, at[t / BLOCK] + t % BLOCK * d + c);
        vf value[4];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) value[n] = vf_load_as(type, elem_at(type, token, n * LANES));
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++)
                acc[m][n] = vf_fma(value[n], vf_set1(weights[m * PANEL + t]), acc[m][n]);
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) {
            float *o = out + m * PANEL + n * LANES;
            vf_store(o, vf_add(acc[m][n], vf_load(o)));
        }
}

enum step { SCORES, VALUES };

/* One step of `rows` query rows over a panel whose tokens [low, high) are live. */
INLINE void direct_rows(const enum step step, const enum elem type, const struct attention *a, const struct blocks *b,
                        int64_t low, int64_t high, struct workspace *ws, const int rows) {
    for (int64_t c = 0; c < a->d; c += BLOCK_K) {
        const int64_t left = MIN(BLOCK_K, a->d - c);
        float *out = ws->chunk.out[c / PANEL][0];
        if (step == SCORES) {
            direct_scores(type, elem_at(type, a->k_cache, c * BLOCK), b->at, ws->queries[c / BLOCK_K][0], left,
                          ws->scores[0], rows, PANEL / BLOCK);
        } else if (left == BLOCK_K) {
            direct_values(type, a->v_cache, b->at, low, high, a->d, c, ws->scores[0], out, rows, BLOCK_K / LANES);
        } else {
            for (int64_t i = 0; i < left; i += LANES)
                direct_values(type, a->v_cache, b->at, low, high, a->d, c + i, ws->scores[0], out + i, rows, 1);
        }
    }
}

INLINE void direct_typed(const enum step step, const enum elem type, const struct attention *a, const struct blocks *b,
                         int64_t low, int64_t high, struct workspace *ws, int queries) {
#define DIRECT_CASE(rows) \
    case rows: direct_rows(step, type, a, b, low, high, ws, MIN(rows, DIRECT_QUERIES)); break;
    switch (queries) {
        DIRECT_CASE(1) DIRECT_CASE(2) DIRECT_CASE(3) DIRECT_CASE(4) DIRECT_CASE(5) DIRECT_CASE(6)
    }
}

static void direct(const enum step step, const struct attention *a, const struct blocks *b, int64_t low, int64_t high,
                   struct workspace *ws, int queries) {
    switch (a->type) {
        case BF16: direct_typed(step, BF16, a, b, low, high, ws, queries); break;
        case F16: direct_typed(step, F16, a, b, low, high, ws, queries); break;
        case E4M3: direct_typed(step, E4M3, a, b, low, high, ws, queries); break;
        default: direct_typed(step, F32, a, b, low, high, ws, queries);
    }
}

static void decode_panel_typed(const struct attention *a, const int32_t *table, int64_t head, int64_t first, int64_t low,
                               int64_t high, struct workspace *ws) {
    switch (a->type) {
        case BF16: decode_panel(BF16, a, table, head, first, low, high, ws); break;
        case F16: decode_panel(F16, a, table, head, first, low, high, ws); break;
        case E4M3: decode_panel(E4M3, a, table, head, first, low, high, ws); break;
        default: decode_panel(F32, a, table, head, first, low, high, ws);
    }
}

/* scores [64] of one query -> weights in place; visible tokens are [low, high) of the panel. */
INLINE void soften(float *scores, int64_t low, int64_t high, struct state *s, int query, int64_t d) {
    const float old = s->peak[query];
    for (int64_t t = 0; t < low; t++) scores[t] = -INFINITY;
    for (int64_t t = high; t < PANEL; t++) scores[t] = -INFINITY;
    vf peak = vf_load(scores);
    for (int t = LANES; t < PANEL; t += LANES) peak = vf_max(peak, vf_load(scores + t));
    const float now = MAX(old, vf_peak(peak));
    vf sum = vf_set1(0.0f);
    for (int t = 0; t < PANEL; t += LANES) {
        vf weight = vf_exp(vf_sub(vf_load(scores + t), vf_set1(now)));
        vf_store(scores + t, weight);
        sum = vf_add(sum, weight);
    }
    const float keep = old == now ? 1.0f : exp_of(old - now);
    s->peak[query] = now;
    s->sum[query] = s->sum[query] * keep + vf_sum(sum);
    if (keep != 1.0f)
        for (int64_t c = 0; c < d; c += LANES) {
            float *o = &s->out[c / PANEL][query][c % PANEL];
            vf_store(o, vf_mul(vf_load(o), vf_set1(keep)));
        }
}

INLINE void tiles_add(const float *w, const float *x, int64_t k, float *total, int queries, int columns) {
    static const float ones[GROUP_COLUMNS] = {
#define ONES8 1, 1, 1, 1, 1, 1, 1, 1
        ONES8, ONES8, ONES8, ONES8, ONES8, ONES8, ONES8, ONES8};
    const int tiles = (queries + TILE_MAX_ROWS - 1) / TILE_MAX_ROWS;
    for (int t = 0; t < tiles; t++) {
        const int from = queries * t / tiles, rows = queries * (t + 1) / tiles - from;
        tile_add(w, x + from * BLOCK_K, k, ones, total + from * GROUP_COLUMNS, rows, columns);
    }
}

static void reset(struct state *s, int queries, int64_t d) {
    for (int i = 0; i < queries; i++) {
        s->peak[i] = -INFINITY;
        s->sum[i] = 0.0f;
    }
    for (int64_t g = 0; g * PANEL < d; g++) memset(s->out[g], 0, (size_t)queries * PANEL * sizeof(float));
}

/* Softmax state of the task's queries over the tokens of one chunk. */
static void attend_chunk(const struct attention *a, const struct task *t, int64_t chunk, struct workspace *ws) {
    const int64_t group = a->q_heads / a->kv_heads, queries = t->rows * group, d = a->d;
    const int64_t q_len = a->cu_seqlens[t->sequence + 1] - a->cu_seqlens[t->sequence];
    const int64_t position = a->kv_lens[t->sequence] - q_len + t->row; /* of the task's first row */
    const int64_t high = MIN(position + t->rows, (chunk + 1) * CHUNK);
    const int64_t low = a->window > 0 ? MAX(0, position - a->window + 1) : 0;
    const int32_t *table = a->block_tables + t->sequence * a->table_stride;
    reset(&ws->chunk, (int)queries, d);
    for (int64_t first = MAX(chunk * CHUNK, low / PANEL * PANEL); first < high; first += PANEL) {
        const struct blocks b = blocks_of(a, table, t->head, first, low, high);
        const int64_t from = MAX(0, low - first), to = MIN(PANEL, high - first);
        prefetch_panel(a, table, t->head, first + PANEL, position + t->rows);
        memset(ws->scores, 0, (size_t)queries * sizeof ws->scores[0]);
        if (queries <= DIRECT_QUERIES) {
            direct(SCORES, a, &b, from, to, ws, (int)queries);
        } else {
            decode_panel_typed(a, table, t->head, first, low, high, ws);
            for (int64_t c = 0; c < d; c += BLOCK_K)
                tiles_add(ws->keys[c], ws->queries[c / BLOCK_K][0], MIN(BLOCK_K, d - c), ws->scores[0], (int)queries,
                          PANEL / LANES);
        }
        for (int64_t i = 0; i < queries; i++) {
            const int64_t p = position + i / group, end = MIN(p + 1, high) - first;
            const int64_t begin = a->window > 0 ? MAX(0, p - a->window + 1 - first) : 0;
            if (begin >= MIN(end, PANEL))
                memset(ws->scores[i], 0, sizeof ws->scores[i]); /* nothing visible: weights of zero */
            else
                soften(ws->scores[i], begin, end, &ws->chunk, (int)i, d);
        }
        if (queries <= DIRECT_QUERIES) {
            direct(VALUES, a, &b, from, to, ws, (int)queries);
            continue;
        }
        for (int64_t c = 0; c < d; c += PANEL)
            tiles_add(ws->values[c / PANEL][0], ws->scores[0], PANEL, ws->chunk.out[c / PANEL][0], (int)queries,
                      (int)(MIN(PANEL, d - c) / LANES));
    }
}

/* Folds one query's part (its out at `stride` floats per 64 columns) into the state. */
INLINE void merge(struct state *s, int query, float peak, float sum, const float *out, int64_t stride, int64_t d) {
    if (peak == -INFINITY) return;
    const float now = MAX(s->peak[query], peak);
    const vf keep = vf_set1(exp_of(s->peak[query] - now)), take = vf_set1(exp_of(peak - now));
    for (int64_t c = 0; c < d; c += LANES) {
        float *o = &s->out[c / PANEL][query][c % PANEL];
        vf_store(o, vf_fma(vf_load(o), keep, vf_mul(vf_load(out + c / PANEL * stride + c % PANEL), take)));
    }
    float lanes[LANES];
    vf_store(lanes, vf_fma(vf_set1(s->sum[query]), keep, vf_mul(vf_set1(sum), take)));
    s->sum[query] = lanes[0];
    s->peak[query] = now;
}

static void write_out(const struct attention *a, const struct task *t, const struct state *s) {
    const int64_t group = a->q_heads / a->kv_heads, first = a->cu_seqlens[t->sequence] + t->row;
    for (int64_t i = 0; i < t->rows * group; i++) {
        float *out = a->out + ((first + i / group) * a->q_heads + t->head * group + i % group) * a->d;
        const vf inverse = vf_set1(1.0f / s->sum[i]);
        for (int64_t c = 0; c < a->d; c += LANES)
            vf_store(out + c, vf_mul(vf_load(&s->out[c / PANEL][i][c % PANEL]), inverse));
    }
}

static void pack_queries(const struct attention *a, const struct task *t, struct workspace *ws) {
    const int64_t group = a->q_heads / a->kv_heads, first = a->cu_seqlens[t->sequence] + t->row;
    for (int64_t i = 0; i < t->rows * group; i++) {
        const float *q = a->q + (first + i / group) * a->q_stride + (t->head * group + i % group) * a->q_head_stride;
        for (int64_t c = 0; c < a->d; c += LANES)
            vf_store(&ws->queries[c / BLOCK_K][i][c % BLOCK_K], vf_mul(vf_load(q + c), vf_set1(a->scale)));
    }
}

static void run_task(const struct attention *a, const struct task *t, struct workspace *ws) {
    const int64_t group = a->q_heads / a->kv_heads, d = a->d;
    const int queries = (int)(t->rows * group);
    pack_queries(a, t, ws);
    if (t->chunk >= 0) {
        attend_chunk(a, t, t->chunk, ws);
        float *partial = t->partial;
        for (int i = 0; i < queries; i++) {
            *partial++ = ws->chunk.peak[i];
            *partial++ = ws->chunk.sum[i];
            for (int64_t c = 0; c < d; c += LANES, partial += LANES)
                vf_store(partial, vf_load(&ws->chunk.out[c / PANEL][i][c % PANEL]));
        }
        return;
    }
    const int64_t q_len = a->cu_seqlens[t->sequence + 1] - a->cu_seqlens[t->sequence];
    const int64_t position = a->kv_lens[t->sequence] - q_len + t->row;
    const int64_t low = a->window > 0 ? MAX(0, position - a->window + 1) : 0;
    reset(&ws->total, queries, d);
    for (int64_t chunk = low / CHUNK; chunk * CHUNK < position + t->rows; chunk++) {
        attend_chunk(a, t, chunk, ws);
        for (int i = 0; i < queries; i++)
            merge(&ws->total, i, ws->chunk.peak[i], ws->chunk.sum[i], ws->chunk.out[0][i], MAX_QUERIES * PANEL, d);
    }
    write_out(a, t, &ws->total);
}

/* Chunks of a decoding row of one head, in ascending order, the first task of which is `t`. */
static void merge_tasks(const struct attention *a, const struct task *t, const struct task *end, struct workspace *ws) {
    const int64_t group = a->q_heads / a->kv_heads, d = a->d;
    reset(&ws->total, (int)group, d);
    for (const struct task *u = t; u < end && u->sequence == t->sequence && u->head == t->head; u++)
        for (int i = 0; i < group; i++) {
            const float *partial = u->partial + i * (2 + d);
            merge(&ws->total, i, partial[0], partial[1], partial + 2, PANEL, d);
        }
    write_out(a, t, &ws->total);
}

/* Fills tasks (or only counts them where it is NULL): prefill by row tiles, decode by chunks. */
static int64_t plan(const struct attention *a, struct task *tasks, float *partials) {
    const int64_t group = a->q_heads / a->kv_heads, rows = MAX(1, TASK_QUERIES / group);
    int64_t count = 0;
    for (int32_t s = 0; s < a->sequences; s++) {
        const int64_t q_len = a->cu_seqlens[s + 1] - a->cu_seqlens[s], kv_len = a->kv_lens[s];
        const int64_t low = a->window > 0 ? MAX(0, kv_len - a->window) : 0;
        for (int32_t h = 0; q_len > 0 && h < a->kv_heads; h++) {
            if (q_len == 1) {
                for (int64_t chunk = low / CHUNK; chunk * CHUNK < kv_len; chunk++, count++)
                    if (tasks)
                        tasks[count] = (struct task){s, h, 0, 1, (int32_t)chunk, partials + count * group * (2 + a->d)};
            } else {
                for (int64_t row = 0; row < q_len; row += rows, count++)
                    if (tasks)
                        tasks[count] = (struct task){s, h, (int32_t)row, (int32_t)MIN(rows, q_len - row), -1, NULL};
            }
        }
    }
    return count;
}

/* One thread's part of all tasks. Returns -1 when memory is out. */
static int run_tasks(const struct attention *a, const struct task *tasks, int64_t count) {
    static __thread struct scratch mine;
    struct workspace *ws = scratch_get(&mine, sizeof *ws);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++)
        if (ws) run_task(a, tasks + i, ws);
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < count; i++) {
        const struct task *t = tasks + i;
        const int first = t->chunk >= 0 && (i == 0 || t[-1].sequence != t->sequence || t[-1].head != t->head);
        if (ws && first) merge_tasks(a, t, tasks + count, ws);
    }
    return ws ? 0 : -1;
}

/* Returns -1 when memory is out. */
EXPORT int paged_attention(const float *q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, int64_t kv_heads,
                           int64_t d, const void *k_cache, const void *v_cache, int64_t type,
                           const int32_t *block_tables, int64_t table_stride, const int32_t *cu_seqlens,
                           const int32_t *kv_lens, int64_t sequences, float scale, int64_t window, float *out) {
    static __thread struct scratch task_list, partial_list;
    const struct attention a = {q,          q_stride, q_head_stride, q_heads, kv_heads, d,
                                k_cache,    v_cache,  type,          block_tables, table_stride,
                                cu_seqlens, kv_lens,  sequences,     scale,   window,   out};
    const int64_t count = plan(&a, NULL, NULL), group = q_heads / kv_heads;
    if (count == 0) return 0;
    struct task *tasks = scratch_get(&task_list, (size_t)count * sizeof *tasks);
    float *partials = scratch_get(&partial_list, (size_t)(count * group * (2 + d)) * sizeof(float));
    if (!tasks || !partials) return -1;
    plan(&a, tasks, partials);
    if (count == 1) return run_tasks(&a, tasks, count);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    failed |= run_tasks(&a, tasks, count);
    return failed;
}
