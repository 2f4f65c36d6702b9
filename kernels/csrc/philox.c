/* Philox4x32-10, as lorry/kernels/philox.py describes it. */
#include "kernels.h"

/* numbers[i]: the first 53 bits of the block of counter (positions[i], indices[i], stream) under the key seeds[i], as a
 * fraction of 1. */
EXPORT int philox_uniforms(const uint64_t *seeds, const uint64_t *indices, const uint64_t *positions, int64_t stream,
                           int64_t count, double *numbers) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t word[4] = {(uint32_t)positions[i], (uint32_t)(positions[i] >> 32), (uint32_t)indices[i],
                            (uint32_t)stream};
        uint32_t key[2] = {(uint32_t)seeds[i], (uint32_t)(seeds[i] >> 32)};
        for (int round = 0; round < 10; round++) {
            const uint64_t first = (uint64_t)word[0] * 0xD2511F53u, second = (uint64_t)word[2] * 0xCD9E8D57u;
            word[0] = (uint32_t)(second >> 32) ^ word[1] ^ key[0];
            word[1] = (uint32_t)second;
            word[2] = (uint32_t)(first >> 32) ^ word[3] ^ key[1];
            word[3] = (uint32_t)first;
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
        numbers[i] = (double)(((uint64_t)word[0] << 32 | word[1]) >> 11) * 0x1p-53;
    }
    return 0;
}
