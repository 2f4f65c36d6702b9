/* Scratch memory and the split of work over threads. */
#ifndef LORRY_COMMON_H
#define LORRY_COMMON_H

#include <omp.h>
#include <stdlib.h>

#include "simd.h"

#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Threads for work of `cost` (about nanoseconds on one core): waking a second thread must pay. */
INLINE int threads_for(int64_t cost) { return cost < 8000 ? 1 : omp_get_max_threads(); }

/* Part `index` of `parts` of the range [0, count), in multiples of `unit`. */
INLINE void split(int64_t count, int64_t unit, int parts, int index, int64_t *begin, int64_t *end) {
    int64_t units = (count + unit - 1) / unit;
    *begin = MIN(count, units * index / parts * unit);
    *end = MIN(count, units * (index + 1) / parts * unit);
}

/* Runs `statement`, which works on items [begin, end) of `count`, on one thread or on all; a team of one is not even
 * entered, as that alone would cost more than a small row's work. */
#define OVER_ITEMS(count, cost, statement)                                                  \
    do {                                                                                    \
        const int over_threads = (count) < 2 ? 1 : threads_for(cost);                       \
        int64_t begin = 0, end = (count);                                                   \
        if (over_threads == 1) {                                                            \
            statement;                                                                      \
        } else {                                                                            \
            _Pragma("omp parallel num_threads(over_threads) private(begin, end)") {         \
                split((count), 1, omp_get_num_threads(), omp_get_thread_num(), &begin, &end); \
                statement;                                                                  \
            }                                                                               \
        }                                                                                   \
    } while (0)

/* Grow-only, 64-byte aligned, one per thread and purpose; NULL when memory is out. */
struct scratch {
    void *memory;
    size_t size;
};
static inline __attribute__((unused)) void *scratch_get(struct scratch *s, size_t size) {
    if (size > s->size) {
        free(s->memory);
        s->size = 0;
        s->memory = NULL;
        size_t rounded = (size + size / 4 + 4095) / 4096 * 4096;
        if (posix_memalign(&s->memory, 64, rounded) != 0) return s->memory = NULL;
        s->size = rounded;
    }
    return s->memory;
}

#endif
