/* What the library offers, one function an operation; the definitions say what each does. */
#ifndef LORRY_KERNELS_H
#define LORRY_KERNELS_H

#include "linear.h"

EXPORT int linear_forward(const struct linear *l, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy);
EXPORT int rms_norm(const float *x, int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t d,
                    const float *weight, float eps, float *residual, float *y);
EXPORT int rope(float *q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, float *k, int64_t k_stride,
                int64_t k_head_stride, int64_t k_heads, int64_t d, const int64_t *positions, int64_t t,
                const float *cos_sin, int64_t max_pos);
EXPORT int silu_mul(const float *gate_up, int64_t m, int64_t stride, int64_t n, float *y);
EXPORT int kv_store(const float *k, int64_t k_stride, int64_t k_head_stride, const float *v, int64_t v_stride,
                    int64_t v_head_stride, void *k_cache, void *v_cache, int64_t type, int64_t blocks, int64_t heads,
                    int64_t block_size, int64_t d, const int64_t *slots, int64_t t);
EXPORT int paged_attention(const float *q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, int64_t kv_heads,
                           int64_t d, const void *k_cache, const void *v_cache, int64_t type,
                           const int32_t *block_tables, int64_t table_stride, const int32_t *cu_seqlens,
                           const int32_t *kv_lens, int64_t sequences, float scale, int64_t window, float *out);
EXPORT int lora_add(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t k_count, const void *arena, int64_t type,
                    const int64_t *offsets, const float *scaling, int64_t slot_stride, int64_t max_pages,
                    const int64_t *called, int64_t called_count, const int32_t *starts, const int32_t *slots,
                    const float *weights, int64_t segments, int64_t adapters);
EXPORT int copy_pieces(char *target, const int64_t *offsets, const char *const *sources, const int64_t *sizes,
                       int64_t count);
EXPORT int penalize(float *z, int64_t rows, int64_t n, const int32_t *bias_starts, const int32_t *bias_ids,
                    const float *bias_values, const int32_t *count_starts, const int32_t *count_ids,
                    const float *count_values, const float *repetition, const float *presence, const float *frequency,
                    const int64_t *last);
EXPORT int philox_uniforms(const uint64_t *seeds, const uint64_t *indices, const uint64_t *positions, int64_t stream,
                           int64_t count, double *numbers);
EXPORT int vocabulary_draw(const float *z, int64_t rows, int64_t n, const float *temperatures, const double *uniforms,
                           int64_t *tokens);
EXPORT int vocabulary_totals(const float *z, int64_t rows, int64_t n, const float *temperatures, double *masses);
EXPORT int vocabulary_nth(const float *z, int64_t rows, int64_t n, const float *values, const int64_t *nth,
                          int64_t *places);
EXPORT int vocabulary_top(const float *z, int64_t rows, int64_t n, int64_t count, float *values);
EXPORT int truncated_draw(const float *z, int64_t rows, int64_t n, const double *cuts, const double *uniforms,
                          int64_t *tokens);

#endif
