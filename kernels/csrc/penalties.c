/* Bias and penalties on a few logits of each row, as lorry/kernels/sampling.py describes them. */
#include "kernels.h"

/* Row r owns entries starts[r] up to starts[r + 1]. */
struct list {
    const int32_t *starts, *ids;
    const float *values;
};

struct penalty {
    float repetition, presence, frequency;
};

static void punish(float *z, struct penalty p, float count) {
    const float scaled = *z < 0 ? *z * p.repetition : *z / p.repetition;
    *z = scaled - ((count > 0 ? p.presence : 0.0f) + p.frequency * count);
}

static void penalize_row(float *z, int64_t row, struct list bias, struct list counts, struct penalty p, int64_t last) {
    if (bias.starts)
        for (int32_t i = bias.starts[row]; i < bias.starts[row + 1]; i++) z[bias.ids[i]] += bias.values[i];
    if (!counts.starts) return;
    int listed = last < 0;
    for (int32_t i = counts.starts[row]; i < counts.starts[row + 1]; i++) {
        const int once_more = counts.ids[i] == last;
        listed |= once_more;
        punish(z + counts.ids[i], p, counts.values[i] + (float)once_more);
    }
    if (!listed) punish(z + last, p, 1.0f);
}

/* z [rows, n] in place. Lists without starts are empty; last: [rows], or NULL for none. */
EXPORT int penalize(float *z, int64_t rows, int64_t n, const int32_t *bias_starts, const int32_t *bias_ids,
                    const float *bias_values, const int32_t *count_starts, const int32_t *count_ids,
                    const float *count_values, const float *repetition, const float *presence, const float *frequency,
                    const int64_t *last) {
    const struct list bias = {bias_starts, bias_ids, bias_values}, counts = {count_starts, count_ids, count_values};
    for (int64_t row = 0; row < rows; row++) {
        const struct penalty p = {repetition[row], presence[row], frequency[row]};
        penalize_row(z + row * n, row, bias, counts, p, last ? last[row] : -1);
    }
    return 0;
}
