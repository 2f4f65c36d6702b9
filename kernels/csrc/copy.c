#include "kernels.h"

#include <string.h>

/* target + offsets[i] ← sizes[i] bytes from sources[i], one after the other in the calling thread. */
EXPORT int copy_pieces(char *target, const int64_t *offsets, const char *const *sources, const int64_t *sizes,
                       int64_t count) {
    for (int64_t i = 0; i < count; i++)
        memcpy(target + offsets[i], sources[i], (size_t)sizes[i]);
    return 0;
}
