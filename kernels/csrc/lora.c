/* y += sum over adapters of a segment of weight * (gain y + shift) + scale * (sum over their rank pages of (x A^T) B).
 *
 * A page is A [16][K] followed by B [16][N], of 8-bit numbers behind the ranks' scales in float32; a vector page is gain
 * [N] and shift [N] in float32. First all shrink products u = x A^T of the batch, then, after one barrier, all
 * expansions; both are cut so that every core has work when one segment holds all rows. An output's chain runs over
 * vectors, adapters, pages and ranks in their order, so its bits depend on its row only.
 */
#include "kernels.h"

#define RANK 16
#define VECTORS 1 /* added to the offset of a vector page */
#define COLUMNS 512 /* of a small expand task: B's share of it is 16 KiB in 16 bits */
#if defined(__AVX512F__)
#define SHRINK_ROWS 4
#define EXPAND_ROWS 8
#else
#define SHRINK_ROWS 1
#define EXPAND_ROWS 2
#endif
#define RANKS_AT_ONCE 4

struct page {
    const void *a, *b;
    const float *x;     /* [rows][K]; NULL: */
    const int64_t *ids; /* [rows], each stands for the vector that is one there and else zero */
    float *u; /* [rows][RANK], scaled */
    float scale;
    const float *scales; /* of the ranks, of 8-bit numbers */
    int64_t rows;
};

struct vectors {
    const float *gain, *shift;
    float weight;
};

/* Vectors [first_vectors, last_vectors) and pages [first, last) update `size` columns from `column` on of rows
 * [row, row + rows). */
struct target {
    int64_t first_vectors, last_vectors, first, last, row, rows, column, size;
};

INLINE int64_t header_size(enum elem type) { return elem_size(type) == 1 ? RANK * (int64_t)sizeof(float) : 0; }

INLINE float scale_of(const enum elem type, const struct page *p, int rank) {
    return elem_size(type) == 1 ? p->scale * p->scales[rank] : p->scale;
}

INLINE void shrink(const enum elem type, const struct page *p, int64_t k_count, int64_t ldx, int rank, int64_t row,
                   const int rows) {
    vf acc[SHRINK_ROWS][RANKS_AT_ONCE];
    for (int m = 0; m < rows; m++)
        for (int r = 0; r < RANKS_AT_ONCE; r++) acc[m][r] = vf_set1(0.0f);
    const float *x = p->x + row * ldx;
    int64_t k = 0;
    for (; k + LANES <= k_count; k += LANES) {
        vf value[SHRINK_ROWS];
        for (int m = 0; m < rows; m++) value[m] = vf_load(x + m * ldx + k);
#pragma GCC unroll 4
        for (int r = 0; r < RANKS_AT_ONCE; r++) {
            const vf a = vf_load_as(type, elem_at(type, p->a, (rank + r) * k_count + k));
            if (rows <= 2) __builtin_prefetch(elem_at(type, p->a, (rank + r + RANKS_AT_ONCE) * k_count + k));
            for (int m = 0; m < rows; m++) acc[m][r] = vf_fma(a, value[m], acc[m][r]);
        }
    }
    if (k < k_count)
        for (int r = 0; r < RANKS_AT_ONCE; r++) {
            const vf a = vf_load_some(type, elem_at(type, p->a, (rank + r) * k_count + k), (int)(k_count - k));
            for (int m = 0; m < rows; m++)
                acc[m][r] = vf_fma(a, vf_load_some(F32, x + m * ldx + k, (int)(k_count - k)), acc[m][r]);
        }
    for (int m = 0; m < rows; m++)
        for (int r = 0; r < RANKS_AT_ONCE; r++)
            p->u[(row + m) * RANK + rank + r] = vf_sum(acc[m][r]) * scale_of(type, p, rank + r);
}

INLINE void gather(const enum elem type, const struct page *p, int64_t k_count, int rank) {
    for (int64_t row = 0; row < p->rows; row++)
        for (int r = rank; r < rank + RANKS_AT_ONCE; r++)
            p->u[row * RANK + r] = elem_load(type, p->a, r * k_count + p->ids[row]) * scale_of(type, p, r);
}

INLINE void shrink_all(const enum elem type, const struct page *p, int64_t k_count, int64_t ldx, int rank) {
    if (p->ids) {
        gather(type, p, k_count, rank);
        return;
    }
    int64_t row = 0;
    for (; row + SHRINK_ROWS <= p->rows; row += SHRINK_ROWS) shrink(type, p, k_count, ldx, rank, row, SHRINK_ROWS);
    if (SHRINK_ROWS > 2 && row + 2 <= p->rows) {
        shrink(type, p, k_count, ldx, rank, row, 2);
        row += 2;
    }
    for (; row < p->rows; row++) shrink(type, p, k_count, ldx, rank, row, 1);
}

/* Few rows: ranks outside, columns inside, so that B is read in the order it lies in memory. */
INLINE void expand_step(const enum elem type, const struct page *p, int64_t row, int rank, int64_t n, int64_t n_count,
                        int count, float *y, int64_t ldy, const int rows) {
    vf sum[2];
    for (int m = 0; m < rows; m++) sum[m] = vf_load_some(F32, y + m * ldy + n, count);
#pragma GCC unroll 4
    for (int r = rank; r < rank + RANKS_AT_ONCE; r++) {
        const vf b = vf_load_some(type, elem_at(type, p->b, r * n_count + n), count);
        __builtin_prefetch(elem_at(type, p->b, (r + RANKS_AT_ONCE) * n_count + n));
        for (int m = 0; m < rows; m++) sum[m] = vf_fma(b, vf_set1(p->u[(row + m) * RANK + r]), sum[m]);
    }
    for (int m = 0; m < rows; m++) vf_store_some(F32, y + m * ldy + n, sum[m], count);
}

INLINE void expand_rows(const enum elem type, const struct page *p, int64_t row, int64_t from, int64_t to,
                        int64_t n_count, float *y, int64_t ldy, const int rows) {
    for (int rank = 0; rank < RANK; rank += RANKS_AT_ONCE) {
        int64_t n = from;
        for (; n + LANES <= to; n += LANES) expand_step(type, p, row, rank, n, n_count, LANES, y, ldy, rows);
        if (n < to) expand_step(type, p, row, rank, n, n_count, (int)(to - n), y, ldy, rows);
    }
}

/* Many rows: a register tile of rows by 32 columns over the ranks of one page. */
INLINE void expand_tile(const enum elem type, const struct page *p, int64_t row, int64_t from, int64_t to,
                        int64_t n_count, float *y, int64_t ldy, const int rows) {
    int64_t n = from;
    for (; n + 2 * LANES <= to; n += 2 * LANES) {
        vf sum[EXPAND_ROWS][2];
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < 2; j++) sum[m][j] = vf_load(y + m * ldy + n + j * LANES);
        for (int r = 0; r < RANK; r++) {
            const vf b0 = vf_load_as(type, elem_at(type, p->b, r * n_count + n));
            const vf b1 = vf_load_as(type, elem_at(type, p->b, r * n_count + n + LANES));
            for (int m = 0; m < rows; m++) {
                const vf u = vf_set1(p->u[(row + m) * RANK + r]);
                sum[m][0] = vf_fma(b0, u, sum[m][0]);
                sum[m][1] = vf_fma(b1, u, sum[m][1]);
            }
        }
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < 2; j++) vf_store(y + m * ldy + n + j * LANES, sum[m][j]);
    }
    if (n < to)
        for (int m = 0; m < rows; m++) expand_rows(type, p, row + m, n, to, n_count, y + m * ldy, ldy, 1);
}

/* y += sum of weight (gain y + shift) in columns [from, to). */
static void add_vectors(const struct vectors *vectors, const struct target *t, int64_t from, int64_t to, float *y,
                        int64_t ldy) {
    for (int64_t n = from; n < to; n += LANES) {
        const int count = (int)MIN(LANES, to - n);
        vf gain = vf_set1(0.0f), shift = gain;
        for (int64_t i = t->first_vectors; i < t->last_vectors; i++) {
            const vf weight = vf_set1(vectors[i].weight);
            gain = vf_fma(weight, vf_load_some(F32, vectors[i].gain + n, count), gain);
            shift = vf_fma(weight, vf_load_some(F32, vectors[i].shift + n, count), shift);
        }
        for (int64_t row = 0; row < t->rows; row++) {
            float *at = y + row * ldy + n;
            const vf before = vf_load_some(F32, at, count);
            vf_store_some(F32, at, vf_fma(gain, before, vf_add(before, shift)), count);
        }
    }
}

INLINE void expand_all(const enum elem type, const struct page *pages, const struct target *t, int64_t from, int64_t to,
                       float *y, int64_t ldy) {
    for (int64_t i = t->first; i < t->last; i++) {
        int64_t row = 0;
        for (; row + EXPAND_ROWS <= t->rows; row += EXPAND_ROWS)
            expand_tile(type, pages + i, row, from, to, t->size, y + row * ldy, ldy, EXPAND_ROWS);
        for (; row + 2 <= t->rows; row += 2)
            expand_rows(type, pages + i, row, from, to, t->size, y + row * ldy, ldy, 2);
        if (row < t->rows) expand_rows(type, pages + i, row, from, to, t->size, y + row * ldy, ldy, 1);
    }
}

static void shrink_typed(int64_t type, const struct page *p, int64_t k_count, int64_t ldx, int rank) {
    switch (type) {
        case BF16: shrink_all(BF16, p, k_count, ldx, rank); break;
        case F16: shrink_all(F16, p, k_count, ldx, rank); break;
        case E4M3: shrink_all(E4M3, p, k_count, ldx, rank); break;
        case I8: shrink_all(I8, p, k_count, ldx, rank); break;
        default: shrink_all(F32, p, k_count, ldx, rank);
    }
}

static void expand_typed(int64_t type, const struct page *pages, const struct target *t, int64_t from, int64_t to,
                         float *y, int64_t ldy) {
    switch (type) {
        case BF16: expand_all(BF16, pages, t, from, to, y, ldy); break;
        case F16: expand_all(F16, pages, t, from, to, y, ldy); break;
        case E4M3: expand_all(E4M3, pages, t, from, to, y, ldy); break;
        case I8: expand_all(I8, pages, t, from, to, y, ldy); break;
        default: expand_all(F32, pages, t, from, to, y, ldy);
    }
}

struct work {
    const struct page *pages;
    const struct vectors *vectors;
    const struct target *targets;
    int64_t page_count, target_count, k_count, ldx, type;
    float *y;
    int64_t ldy;
};

/* One thread's part: shrink, a barrier, expand. A task is a whole page, or a whole site of a segment, where these are
 * enough to go round, so that memory is read in long runs; else four ranks and 512 columns. */
static void run(const struct work *w) {
    const int64_t plenty = 4 * omp_get_num_threads();
    const int ranks = w->page_count >= plenty ? RANK : RANKS_AT_ONCE, parts = RANK / ranks;
    int64_t widest = 0;
    for (int64_t i = 0; i < w->target_count; i++) widest = MAX(widest, w->targets[i].size);
    const int64_t cuts = w->target_count >= plenty ? 1 : (widest + COLUMNS - 1) / COLUMNS;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < w->page_count * parts; i++)
        for (int r = 0; r < ranks; r += RANKS_AT_ONCE)
            shrink_typed(w->type, w->pages + i / parts, w->k_count, w->ldx, (int)(i % parts) * ranks + r);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < w->target_count * cuts; i++) {
        const struct target *t = w->targets + i / cuts;
        int64_t from, to;
        split(t->size, 2 * LANES, (int)cuts, (int)(i % cuts), &from, &to);
        if (from >= to) continue;
        float *y = w->y + t->row * w->ldy + t->column;
        if (t->first_vectors < t->last_vectors) add_vectors(w->vectors, t, from, to, y, w->ldy);
        expand_typed(w->type, w->pages, t, from, to, y, w->ldy);
    }
}

/* x, or ids where x is NULL; arena of `type`; offsets [slots][layers][sites][max_pages] and scaling [slots][layers][sites] begin at the wanted
 * layer, `slot_stride` sites apart from slot to slot; called: [called_count][3] of site index, first column of y,
 * width; starts [segments + 1], slots and weights [segments][adapters]. Returns -1 when memory is out. */
static int add(float *y, int64_t ldy, const float *x, int64_t ldx, const int64_t *ids, int64_t k_count,
               const void *arena, int64_t type, const int64_t *offsets, const float *scaling, int64_t slot_stride,
               int64_t max_pages, const int64_t *called, int64_t called_count, const int32_t *starts,
               const int32_t *slots, const float *weights, int64_t segments, int64_t adapters) {
    static __thread struct scratch page_list, vector_list, target_list, shrunk;
    int64_t page_count = 0, vector_count = 0, target_count = 0, u_count = 0, cost = 0;
    struct page *pages = NULL;
    struct vectors *vectors = NULL;
    struct target *targets = NULL;
    float *u = NULL;
    for (int fill = 0; fill < 2; fill++) {
        if (fill) {
            if (target_count == 0) return 0;
            pages = scratch_get(&page_list, (size_t)(page_count + 1) * sizeof *pages);
            vectors = scratch_get(&vector_list, (size_t)(vector_count + 1) * sizeof *vectors);
            targets = scratch_get(&target_list, (size_t)target_count * sizeof *targets);
            u = scratch_get(&shrunk, (size_t)(u_count + 1) * sizeof *u);
            if (!pages || !vectors || !targets || !u) return -1;
            page_count = vector_count = target_count = u_count = 0;
        }
        for (int64_t s = 0; s < segments; s++) {
            const int64_t row = starts[s], rows = starts[s + 1] - row;
            if (rows <= 0) continue;
            for (int64_t c = 0; c < called_count; c++) {
                const int64_t site = called[3 * c], size = called[3 * c + 2];
                const int64_t first = page_count, first_vectors = vector_count;
                for (int64_t j = 0; j < adapters; j++) {
                    const int64_t slot = slots[s * adapters + j], at = slot * slot_stride + site;
                    if (slot < 0) continue;
                    for (int64_t i = 0; i < max_pages && offsets[at * max_pages + i] >= 0; i++) {
                        const int64_t offset = offsets[at * max_pages + i];
                        const float weight = weights[s * adapters + j];
                        const void *start = elem_at((enum elem)type, arena, offset & ~(int64_t)VECTORS);
                        if (offset & VECTORS) {
                            if (fill) {
                                const float *gain = start;
                                vectors[vector_count] = (struct vectors){gain, gain + size, weight};
                            }
                            vector_count++;
                            continue;
                        }
                        if (fill) {
                            const void *a = elem_at((enum elem)type, start, header_size((enum elem)type));
                            pages[page_count] = (struct page){a,
                                                              elem_at((enum elem)type, a, RANK * k_count),
                                                              x ? x + row * ldx : NULL,
                                                              ids ? ids + row : NULL,
                                                              u + u_count,
                                                              weight * scaling[at],
                                                              start,
                                                              rows};
                            cost += RANK * (k_count + size) / 8 * MAX(rows, 4) / 4;
                        }
                        page_count++;
                        u_count += rows * RANK;
                    }
                }
                if (page_count == first && vector_count == first_vectors) continue;
                if (fill)
                    targets[target_count] = (struct target){first_vectors, vector_count,       first, page_count, row,
                                                            rows,          called[3 * c + 1], size};
                target_count++;
            }
        }
    }
    const struct work work = {pages, vectors, targets, page_count, target_count, k_count, ldx, type, y, ldy};
    const int threads = threads_for(cost);
    if (threads == 1) {
        run(&work);
    } else {
#pragma omp parallel num_threads(threads)
        run(&work);
    }
    return 0;
}

EXPORT int lora_add(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t k_count, const void *arena, int64_t type,
                    const int64_t *offsets, const float *scaling, int64_t slot_stride, int64_t max_pages,
                    const int64_t *called, int64_t called_count, const int32_t *starts, const int32_t *slots,
                    const float *weights, int64_t segments, int64_t adapters) {
    return add(y, ldy, x, ldx, NULL, k_count, arena, type, offsets, scaling, slot_stride, max_pages, called, called_count,
               starts, slots, weights, segments, adapters);
}

/* The same for x of one-hot vectors, each 1 at one of `ids`, which are in [0, k_count). */
EXPORT int lora_embed(float *y, int64_t ldy, const int64_t *ids, int64_t k_count, const void *arena, int64_t type,
                      const int64_t *offsets, const float *scaling, int64_t slot_stride, int64_t max_pages,
                      const int64_t *called, int64_t called_count, const int32_t *starts, const int32_t *slots,
                      const float *weights, int64_t segments, int64_t adapters) {
    return add(y, ldy, NULL, 0, ids, k_count, arena, type, offsets, scaling, slot_stride, max_pages, called, called_count,
               starts, slots, weights, segments, adapters);
}
