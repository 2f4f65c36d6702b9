/* Quantization of whole blocks to NF4; the equations and their source are in nf4.py. */
#include "common.h"

#define MAX_BLOCK 4096

INLINE void quantize_block(const enum elem type, const void *x, int64_t size, const float *thresholds, uint8_t *packed,
                           float *absmax) {
    float value[MAX_BLOCK], peak = 0.0f;
    int32_t code[MAX_BLOCK];
    for (int64_t i = 0; i < size; i++) value[i] = elem_load(type, x, i);
    for (int64_t i = 0; i < size; i++) peak = MAX(peak, fabsf(value[i]));
    const float inverse = 1.0f / MAX(peak, 1e-38f);
    for (int64_t i = 0; i < size; i++) {
        const float scaled = value[i] * inverse;
        value[i] = MAX(-1.0f, MIN(1.0f, scaled));
        code[i] = 0;
    }
    for (int t = 0; t < 15; t++)
        for (int64_t i = 0; i < size; i++) code[i] += value[i] > thresholds[t];
    for (int64_t i = 0; i < size / 2; i++) packed[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
    *absmax = peak;
}

/* x [blocks * size] of `type`; thresholds [15]; packed [blocks * size / 2]; absmax [blocks]; size even, <= MAX_BLOCK. */
EXPORT int nf4_quantize(const void *x, int64_t type, int64_t blocks, int64_t size, const float *thresholds,
                        uint8_t *packed, float *absmax) {
#pragma omp parallel for schedule(static) num_threads(threads_for(blocks *size))
    for (int64_t b = 0; b < blocks; b++) {
        const void *from = elem_at((enum elem)type, x, b * size);
        uint8_t *to = packed + b * size / 2;
        switch (type) {
            case BF16: quantize_block(BF16, from, size, thresholds, to, absmax + b); break;
            case F16: quantize_block(F16, from, size, thresholds, to, absmax + b); break;
            default: quantize_block(F32, from, size, thresholds, to, absmax + b);
        }
    }
    return 0;
}
