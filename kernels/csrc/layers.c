/* All layers of a decoder of the Llama family in one call: the kernels of the other files, in the order in which
 * server/model/decoder.py calls them one by one. What it saves is a dozen calls from Python a layer, which for one row
 * take as long as the products. */
#include "kernels.h"

#define BLOCK_SIZE 16

enum group { QKV, O, GATE_UP, DOWN, GROUPS };

struct layer {
    const struct linear *linears[GROUPS];
    const float *input_norm, *post_norm, *q_norm, *k_norm; /* [hidden], [hidden], [d] or NULL */
    void *keys, *values;
    int64_t window;
};

struct layers {
    const struct layer *layers;
    int64_t count, hidden, heads, kv_heads, d, intermediate;
    float eps, scale;
    const float *cos_sin; /* [positions][d] */
    int64_t positions;
    int64_t cache_type, cache_blocks;
    const int64_t *called[GROUPS]; /* [called_count][3]: see lora_add */
    int64_t called_count[GROUPS];
};

/* One step: the batch, and the adapters of its rows where segments > 0. */
struct step {
    int64_t tokens, sequences, table_stride;
    const int64_t *positions, *slots;
    const int32_t *block_tables, *cu_seqlens, *kv_lens;
    const void *arena;
    int64_t arena_type;
    const int64_t *offsets; /* [slots][layers][sites][max_pages] */
    const float *scaling;   /* [slots][layers][sites] */
    int64_t sites, max_pages;
    const int32_t *starts, *adapter_slots;
    const float *weights;
    int64_t segments, adapters;
};

struct buffers {
    float *normed, *qkv, *q, *k, *mixed, *gate_up, *gated;
};

enum { OUT_OF_MEMORY = -1, BAD_POSITION = 1, BAD_SLOT = 2 };

/* y [tokens][n] = x [tokens][k] W^T + what the rows' adapters add. */
static int project(const struct layers *m, const struct step *s, int64_t layer, enum group group, const float *x,
                   float *y) {
    const struct linear *l = m->layers[layer].linears[group];
    const int64_t k = l->in_features, n = l->out_features, first = layer * s->sites;
    if (linear_forward(l, x, s->tokens, k, y, n)) return OUT_OF_MEMORY;
    if (s->segments == 0) return 0;
    return lora_add(y, n, x, k, k, s->arena, s->arena_type, s->offsets + first * s->max_pages, s->scaling + first,
                    m->count * s->sites, s->max_pages, m->called[group], m->called_count[group], s->starts,
                    s->adapter_slots, s->weights, s->segments, s->adapters);
}

static int attend(const struct layers *m, const struct step *s, const struct layer *l, const struct buffers *b) {
    const int64_t t = s->tokens, d = m->d, width = (m->heads + 2 * m->kv_heads) * d;
    float *q = b->qkv, *k = q + m->heads * d, *v = k + m->kv_heads * d;
    int64_t q_stride = width, k_stride = width;
    if (l->q_norm && l->k_norm) {
        rms_norm(q, t, m->heads, width, d, d, l->q_norm, m->eps, NULL, b->q);
        rms_norm(k, t, m->kv_heads, width, d, d, l->k_norm, m->eps, NULL, b->k);
        q = b->q, q_stride = m->heads * d;
        k = b->k, k_stride = m->kv_heads * d;
    }
    if (rope(q, q_stride, d, m->heads, k, k_stride, d, m->kv_heads, d, s->positions, t, m->cos_sin, m->positions))
        return BAD_POSITION;
    if (kv_store(k, k_stride, d, v, width, d, l->keys, l->values, m->cache_type, m->cache_blocks, m->kv_heads,
                 BLOCK_SIZE, d, s->slots, t))
        return BAD_SLOT;
    return paged_attention(q, q_stride, d, m->heads, m->kv_heads, d, l->keys, l->values, m->cache_type, s->block_tables,
                           s->table_stride, s->cu_seqlens, s->kv_lens, s->sequences, m->scale, l->window, b->mixed);
}

static int forward(const struct layers *m, const struct step *s, float *residual, float *out, const struct buffers *b) {
    const int64_t t = s->tokens, h = m->hidden;
    int status = 0;
    for (int64_t i = 0; i < m->count && !status; i++) {
        const struct layer *l = m->layers + i;
        rms_norm(i ? out : residual, t, 1, h, 0, h, l->input_norm, m->eps, i ? residual : NULL, b->normed);
        status = project(m, s, i, QKV, b->normed, b->qkv);
        if (!status) status = attend(m, s, l, b);
        if (!status) status = project(m, s, i, O, b->mixed, out);
        if (status) return status;
        rms_norm(out, t, 1, h, 0, h, l->post_norm, m->eps, residual, b->normed);
        status = project(m, s, i, GATE_UP, b->normed, b->gate_up);
        silu_mul(b->gate_up, t, 2 * m->intermediate, m->intermediate, b->gated);
        if (!status) status = project(m, s, i, DOWN, b->gated, out);
    }
    return status;
}

/* residual [tokens][hidden]: the embeddings, and then the stream that out [tokens][hidden], what the last layer adds to
 * it, is not yet part of. Returns 0, BAD_POSITION, BAD_SLOT or OUT_OF_MEMORY. */
EXPORT int layers_forward(const struct layers *m, const struct step *s, float *residual, float *out) {
    static __thread struct scratch memory;
    const int64_t q = m->heads * m->d, k = m->kv_heads * m->d;
    const int64_t widths[] = {m->hidden, q + 2 * k, q, k, q, 2 * m->intermediate, m->intermediate};
    float *at[7];
    int64_t total = 0;
    for (int i = 0; i < 7; i++) total += s->tokens * widths[i];
    at[0] = scratch_get(&memory, (size_t)total * sizeof(float));
    if (!at[0]) return OUT_OF_MEMORY;
    for (int i = 1; i < 7; i++) at[i] = at[i - 1] + s->tokens * widths[i - 1];
    const struct buffers buffers = {at[0], at[1], at[2], at[3], at[4], at[5], at[6]};
    return forward(m, s, residual, out, &buffers);
}
