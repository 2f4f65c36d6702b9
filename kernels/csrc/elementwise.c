/* Row-wise operations around the matrix products: norm, rotary embedding, gated activation, cache scatter.
 * Strides are in elements; the last dimension is always contiguous. */
#include "kernels.h"

static void norm_rows(const float *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t d,
                      const float *weight, float eps, float *residual, float *y, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float *in = x + row / inner * outer_stride + row % inner * inner_stride;
        float *sum = residual ? residual + row * d : NULL, *out = y + row * d;
        vf squares[4] = {vf_set1(0.0f), vf_set1(0.0f), vf_set1(0.0f), vf_set1(0.0f)};
        for (int64_t i = 0; i < d; i += LANES) {
            const int count = (int)MIN(LANES, d - i);
            vf v = vf_load_some(F32, in + i, count);
            if (sum) {
                v = vf_add(vf_load_some(F32, sum + i, count), v);
                vf_store_some(F32, sum + i, v, count);
            }
            vf_store_some(F32, out + i, v, count);
            vf *acc = squares + i / LANES % 4;
            *acc = vf_fma(v, v, *acc);
        }
        const float total = vf_sum(vf_add(vf_add(squares[0], squares[1]), vf_add(squares[2], squares[3])));
        const vf inverse = vf_set1(1.0f / sqrtf(total / (float)d + eps));
        for (int64_t i = 0; i < d; i += LANES) {
            const int count = (int)MIN(LANES, d - i);
            vf normed = vf_mul(vf_load_some(F32, out + i, count), inverse);
            vf_store_some(F32, out + i, vf_mul(vf_load_some(F32, weight + i, count), normed), count);
        }
    }
}

/* residual += x (where given), y = x / sqrt(mean(x^2) + eps) * weight; x is [outer][inner][d], the others contiguous. */
EXPORT int rms_norm(const float *x, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t d,
                    const float *weight, float eps, float *residual, float *y) {
    OVER_ITEMS(outer * inner, outer * inner * d / 8,
               norm_rows(x, inner, outer_stride, inner_stride, d, weight, eps, residual, y, begin, end));
    return 0;
}

static void rotate(float *x, int64_t half, const float *cosine, const float *sine) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int count = (int)MIN(LANES, half - i);
        vf a = vf_load_some(F32, x + i, count), b = vf_load_some(F32, x + half + i, count);
        vf c = vf_load_some(F32, cosine + i, count), s = vf_load_some(F32, sine + i, count);
        vf_store_some(F32, x + i, vf_sub(vf_mul(a, c), vf_mul(b, s)), count);
        vf_store_some(F32, x + half + i, vf_add(vf_mul(b, c), vf_mul(a, s)), count);
    }
}

static void rotate_rows(float *x, int64_t stride, int64_t head_stride, int64_t heads, int64_t d, const int64_t *positions,
                        const float *cos_sin, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        const float *cosine = cos_sin + positions[i] * d, *sine = cosine + d / 2;
        for (int64_t h = 0; h < heads; h++) rotate(x + i * stride + h * head_stride, d / 2, cosine, sine);
    }
}

/* Half-split rotation of q [t][q_heads][d] and k [t][k_heads][d] in place; cos_sin [max_pos][d], cosines first.
 * Returns 1 when a position is out of range. */
EXPORT int rope(float *q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, float *k, int64_t k_stride,
                int64_t k_head_stride, int64_t k_heads, int64_t d, const int64_t *positions, int64_t t,
                const float *cos_sin, int64_t max_pos) {
    for (int64_t i = 0; i < t; i++)
        if (positions[i] < 0 || positions[i] >= max_pos) return 1;
    const int64_t cost = t * (q_heads + k_heads) * d / 8;
    OVER_ITEMS(t, cost, rotate_rows(q, q_stride, q_head_stride, q_heads, d, positions, cos_sin, begin, end);
               rotate_rows(k, k_stride, k_head_stride, k_heads, d, positions, cos_sin, begin, end));
    return 0;
}

static void silu_rows(const float *gate_up, int64_t stride, int64_t n, float *y, int64_t begin, int64_t end) {
    const vf one = vf_set1(1.0f), zero = vf_set1(0.0f);
    for (int64_t row = begin; row < end; row++) {
        const float *gate = gate_up + row * stride;
        for (int64_t i = 0; i < n; i += LANES) {
            const int count = (int)MIN(LANES, n - i);
            vf g = vf_load_some(F32, gate + i, count), up = vf_load_some(F32, gate + n + i, count);
            vf silu = vf_div(g, vf_add(one, vf_exp(vf_sub(zero, g))));
            vf_store_some(F32, y + row * n + i, vf_mul(silu, up), count);
        }
    }
}

/* y = gate / (1 + exp(-gate)) * up; gate_up [m][stride], gate in the first n columns. */
EXPORT int silu_mul(const float *gate_up, int64_t m, int64_t stride, int64_t n, float *y) {
    OVER_ITEMS(m, m * n, silu_rows(gate_up, stride, n, y, begin, end));
    return 0;
}

struct cache {
    void *memory; /* [blocks][heads][block_size tokens of d, at these strides] */
    int64_t heads, block_size, d, token_stride, stride;
};

INLINE void store_row(const enum elem type, const float *x, const struct cache *c, int64_t at) {
    for (int64_t i = 0; i < c->d; i += LANES) {
        const int count = (int)MIN(LANES, c->d - i);
        const vf values = vf_load_some(F32, x + i, count);
        if (c->stride == 1) {
            vf_store_some(type, (char *)c->memory + (at + i) * elem_size(type), values, count);
            continue;
        }
        uint32_t lanes[LANES];
        vf_store_as(type, lanes, values);
        for (int j = 0; j < count; j++) {
            const int64_t to = at + (i + j) * c->stride;
            if (elem_size(type) == 4)
                ((uint32_t *)c->memory)[to] = lanes[j];
            else if (elem_size(type) == 1)
                ((uint8_t *)c->memory)[to] = ((const uint8_t *)lanes)[j];
            else
                ((uint16_t *)c->memory)[to] = ((const uint16_t *)lanes)[j];
        }
    }
}

static void store_rows(const enum elem type, const float *x, int64_t stride, int64_t head_stride, const struct cache *c,
                       const int64_t *slots, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        if (slots[i] < 0) continue;
        for (int64_t h = 0; h < c->heads; h++) {
            const int64_t block = (slots[i] / c->block_size * c->heads + h) * c->block_size * c->d;
            const int64_t at = block + slots[i] % c->block_size * c->token_stride;
            const float *row = x + i * stride + h * head_stride;
            switch (type) {
                case BF16: store_row(BF16, row, c, at); break;
                case F16: store_row(F16, row, c, at); break;
                case E4M3: store_row(E4M3, row, c, at); break;
                default: store_row(F32, row, c, at);
            }
        }
    }
}

/* Rows of k and v [t][heads][d] to slots of the caches, keys [blocks][heads][d][block_size] and values
 * [blocks][heads][block_size][d]; slot -1 skips the row. Returns 1 when a slot is out of range. */
EXPORT int kv_store(const float *k, int64_t k_stride, int64_t k_head_stride, const float *v, int64_t v_stride,
                    int64_t v_head_stride, void *k_cache, void *v_cache, int64_t type, int64_t blocks, int64_t heads,
                    int64_t block_size, int64_t d, const int64_t *slots, int64_t t) {
    for (int64_t i = 0; i < t; i++)
        if (slots[i] < -1 || slots[i] >= blocks * block_size) return 1;
    const struct cache keys = {k_cache, heads, block_size, d, 1, block_size};
    const struct cache values = {v_cache, heads, block_size, d, d, 1};
    const enum elem e = (enum elem)type;
    OVER_ITEMS(t, t * heads * d / 2, store_rows(e, k, k_stride, k_head_stride, &keys, slots, begin, end);
               store_rows(e, v, v_stride, v_head_stride, &values, slots, begin, end));
    return 0;
}
