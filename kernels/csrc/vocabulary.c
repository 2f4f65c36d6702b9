/* Reductions along the vocabulary, a row in one thread, so that its bits depend on no other row.
 *
 *     w[t] = exp((z[t] - max z) / T)       sums of SPAN elements in float32, over spans in float64
 */
#include "vocabulary.h"

#include <float.h>

#include "kernels.h"

static float peak_of(const float *z, int64_t n) {
    vf peaks = vf_set1(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) peaks = vf_max(peaks, vf_load(z + i));
    float peak = vf_peak(peaks);
    for (; i < n; i++) peak = z[i] > peak ? z[i] : peak;
    return isinf(peak) ? 0.0f : peak;
}

/* The next LANES elements, of which `count` are there; the others are -inf. */
INLINE vf load_row(const float *z, int64_t count) {
    if (count >= LANES) return vf_load(z);
    float f[LANES];
    for (int i = 0; i < LANES; i++) f[i] = i < count ? z[i] : -INFINITY;
    return vf_load(f);
}

INLINE vf scaled(vf z, vf peak, vf temperature, int divides) {
    const vf below = vf_sub(z, peak);
    return divides ? vf_div(below, temperature) : below;
}

/* Σ w and, where asked for, Σ w log w over `count` <= SPAN elements; in two chains, as the additions wait for each other. */
INLINE double span_weights(const float *z, int64_t count, vf peak, vf temperature, int divides, double *energy) {
    const vf least = vf_set1(-1e30f);
    vf sums[2] = {vf_set1(0.0f), vf_set1(0.0f)}, energies[2] = {vf_set1(0.0f), vf_set1(0.0f)};
#pragma GCC unroll 8
    for (int64_t i = 0; i < SPAN; i += LANES) {
        if (i >= count) break;
        const int chain = (int)(i / LANES % 2);
        const vf x = scaled(load_row(z + i, count - i), peak, temperature, divides), w = vf_exp(x);
        sums[chain] = vf_add(sums[chain], w);
        if (energy) energies[chain] = vf_fma(w, vf_max(x, least), energies[chain]);
    }
    if (energy) *energy += vf_sum(vf_add(energies[0], energies[1]));
    return vf_sum(vf_add(sums[0], sums[1]));
}

INLINE double weights_of(const float *z, int64_t n, float t, int divides, double *cumulative, double *energy) {
    const vf peak = vf_set1(peak_of(z, n)), temperature = vf_set1(t);
    double mass = 0, total = 0, *energies = energy ? &total : NULL;
    int64_t start = 0;
    for (; start + SPAN <= n; start += SPAN) {
        mass += span_weights(z + start, SPAN, peak, temperature, divides, energies);
        if (cumulative) cumulative[start / SPAN] = mass;
    }
    if (start < n) {
        mass += span_weights(z + start, n - start, peak, temperature, divides, energies);
        if (cumulative) cumulative[start / SPAN] = mass;
    }
    if (energy) *energy = total;
    return mass;
}

double row_weights(const float *z, int64_t n, float t, double *cumulative, double *energy) {
    return t == 1.0f ? weights_of(z, n, t, 0, cumulative, energy) : weights_of(z, n, t, 1, cumulative, energy);
}

int64_t first_above(const double *cumulative, int64_t n, double target) {
    int64_t place = 0;
    while (place < n && cumulative[place] <= target) place++;
    if (place < n) return place;
    while (place > 1 && cumulative[place - 2] == cumulative[n - 1]) place--;
    return place - 1;
}

int64_t row_draw(const float *z, int64_t n, float t, double uniform, double *cumulative) {
    const int64_t spans = ROW_SPANS(n);
    const double target = uniform * row_weights(z, n, t, cumulative, NULL);
    const int64_t span = first_above(cumulative, spans, target), start = span * SPAN, end = MIN(n, start + SPAN);
    const vf peak = vf_set1(peak_of(z, n)), temperature = vf_set1(t);
    float weights[SPAN];
    double inside[SPAN], sum = 0;
    for (int64_t i = start; i < end; i += LANES)
        vf_store(weights + i - start, vf_exp(scaled(load_row(z + i, end - i), peak, temperature, t != 1.0f)));
    for (int64_t i = 0; i < end - start; i++) inside[i] = sum += weights[i];
    return start + first_above(inside, end - start, target - (span ? cumulative[span - 1] : 0.0));
}

static int draw_rows(const float *z, int64_t n, const float *temperatures, const double *uniforms, int64_t *tokens,
                     int64_t begin, int64_t end) {
    static _Thread_local struct scratch scratch;
    double *cumulative = scratch_get(&scratch, (size_t)ROW_SPANS(n) * sizeof(double));
    for (int64_t row = begin; row < end; row++) {
        if (!cumulative) return -1;
        tokens[row] = row_draw(z + row * n, n, temperatures[row], uniforms[row], cumulative);
    }
    return 0;
}

/* The inverse of the cumulative distribution p ∝ w in the order of the token ids, at uniforms [rows]. Returns -1 when
 * memory is out. */
EXPORT int vocabulary_draw(const float *z, int64_t rows, int64_t n, const float *temperatures, const double *uniforms,
                           int64_t *tokens) {
    int failed = 0;
    OVER_ITEMS(rows, rows * n / 4, {
        if (draw_rows(z, n, temperatures, uniforms, tokens, begin, end)) failed = -1;
    });
    return failed;
}

static void total_rows(const float *z, int64_t n, const float *temperatures, double *masses, int64_t begin,
                       int64_t end) {
    for (int64_t row = begin; row < end; row++)
        masses[row] = row_weights(z + row * n, n, temperatures[row], NULL, NULL);
}

/* Σ w of each row. */
EXPORT int vocabulary_totals(const float *z, int64_t rows, int64_t n, const float *temperatures, double *masses) {
    OVER_ITEMS(rows, rows * n / 4, total_rows(z, n, temperatures, masses, begin, end));
    return 0;
}

double row_deviation(const float *z, int64_t n) {
    const vf least = vf_set1(-FLT_MAX), zero = vf_set1(0.0f), one = vf_set1(1.0f);
    double sum = 0, squares = 0, count = 0;
    for (int64_t start = 0; start < n; start += SPAN) {
        vf sums = zero, counts = zero;
        const int64_t end = MIN(n, start + SPAN);
        for (int64_t i = start; i < end; i += LANES) {
            const vf x = load_row(z + i, end - i);
            sums = vf_add(sums, vf_where_below(x, least, zero, x));
            counts = vf_add(counts, vf_where_below(x, least, zero, one));
        }
        sum += vf_sum(sums);
        count += vf_sum(counts);
    }
    if (count == 0) return 0.0;
    const vf mean = vf_set1((float)(sum / count));
    for (int64_t start = 0; start < n; start += SPAN) {
        vf sums = zero;
        const int64_t end = MIN(n, start + SPAN);
        for (int64_t i = start; i < end; i += LANES) {
            const vf x = load_row(z + i, end - i);
            const vf apart = vf_where_below(x, least, zero, vf_sub(x, mean));
            sums = vf_fma(apart, apart, sums);
        }
        squares += vf_sum(sums);
    }
    const double error = sum / count - (double)(float)(sum / count);
    return sqrt(fmax(squares / count - error * error, 0.0));
}

int64_t row_nth(const float *z, int64_t n, float value, int64_t nth) {
    for (int64_t start = 0; start < n; start += SPAN) {
        const int64_t end = MIN(n, start + SPAN);
        int32_t hits = 0;
        for (int64_t i = start; i < end; i++) hits += z[i] == value;
        if (nth >= hits) {
            nth -= hits;
            continue;
        }
        for (int64_t i = start;; i++)
            if (z[i] == value && nth-- == 0) return i;
    }
    return 0;
}

static void find_rows(const float *z, int64_t n, const float *values, const int64_t *nth, int64_t *places, int64_t begin,
                      int64_t end) {
    for (int64_t row = begin; row < end; row++) places[row] = row_nth(z + row * n, n, values[row], nth[row]);
}

/* The place of the nth element of each row, from 0, that equals its value; 0 where there is none. */
EXPORT int vocabulary_nth(const float *z, int64_t rows, int64_t n, const float *values, const int64_t *nth,
                          int64_t *places) {
    OVER_ITEMS(rows, rows * n / 32, find_rows(z, n, values, nth, places, begin, end));
    return 0;
}

/* The `count` largest of values[0..n) come to the front, in any order. */
static void select_largest(float *values, int64_t n, int64_t count) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const float a = values[low], b = values[low + (high - low) / 2], c = values[high];
        const float pivot = MAX(MIN(a, b), MIN(MAX(a, b), c));
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i > j) break;
            const float moved = values[i];
            values[i++] = values[j];
            values[j--] = moved;
        }
        if (count - 1 <= j)
            high = j;
        else if (count - 1 >= i)
            low = i;
        else
            return;
    }
}

static void insert_falling(float *values, int64_t n) {
    int64_t gap = 1;
    while (gap < n / 9) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (int64_t i = gap; i < n; i++) {
            const float moved = values[i];
            int64_t j = i;
            for (; j >= gap && values[j - gap] < moved; j -= gap) values[j] = values[j - gap];
            values[j] = moved;
        }
}

/* A number that falls where the float rises, as unsigned. */
INLINE uint32_t falling_key(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits ^ (bits >> 31 ? 0 : 0x7fffffffu);
}

/* Three passes of eleven bits. `from` is overwritten. */
static void radix_falling(float *from, int64_t n, float *to) {
    enum { BITS = 11, BUCKETS = 1 << BITS };
    int64_t places[3][BUCKETS] = {{0}};
    for (int64_t i = 0; i < n; i++)
        for (int pass = 0; pass < 3; pass++) places[pass][falling_key(from[i]) >> (pass * BITS) & (BUCKETS - 1)]++;
    for (int pass = 0; pass < 3; pass++) {
        int64_t place = 0;
        for (int b = 0; b < BUCKETS; b++) {
            const int64_t held = places[pass][b];
            places[pass][b] = place;
            place += held;
        }
        for (int64_t i = 0; i < n; i++)
            to[places[pass][falling_key(from[i]) >> (pass * BITS) & (BUCKETS - 1)]++] = from[i];
        float *const other = from;
        from = to;
        to = other;
    }
}

/* maxima[b]: the largest of every blocks-th element of z[0..length) from b on, `blocks` a multiple of LANES. */
static void fold(const float *z, int64_t length, int64_t blocks, float *maxima) {
    for (int64_t b = 0; b < blocks; b += LANES) {
        vf peaks = vf_load(z + b);
        for (int64_t i = b + blocks; i < length; i += blocks) peaks = vf_max(peaks, vf_load(z + i));
        vf_store(maxima + b, peaks);
    }
}

/* Those that may be among the `count` largest of a row, into `out`; how many. An element among these lies in a block
 * whose maximum is among the `count` largest maxima. Half as many blocks again leave few others: so the blocks of
 * LANES elements, which are looked through, are folded to larger ones, whose maxima tell the least. */
static int64_t candidates(const float *z, int64_t n, int64_t count, float *maxima, float *out) {
    const int64_t blocks = n / LANES / LANES * LANES;
    if (2 * blocks < 3 * count) {
        memcpy(out, z, (size_t)n * sizeof(float));
        return n;
    }
    fold(z, LANES * blocks, blocks, maxima);
    int64_t larger = blocks;
    for (int64_t half = blocks / 2; half % LANES == 0 && 2 * half >= 3 * count; half /= 2) larger = half;
    fold(maxima, blocks, larger, out);
    select_largest(out, larger, count);
    float least = out[0];
    for (int64_t i = 1; i < count; i++) least = MIN(least, out[i]);
    int64_t found = 0;
    for (int64_t b = 0; b < blocks; b++)
        if (maxima[b] >= least)
            for (int64_t i = 0; i < LANES; i++)
                if (z[i * blocks + b] >= least) out[found++] = z[i * blocks + b];
    for (int64_t i = LANES * blocks; i < n; i++)
        if (z[i] >= least) out[found++] = z[i];
    return found;
}

void row_largest(const float *z, int64_t n, int64_t count, float *scratch, float *values) {
    const int64_t found = candidates(z, n, count, scratch + n, scratch);
    if (found > count) select_largest(scratch, found, count);
    if (count > 512) {
        radix_falling(scratch, count, values);
        return;
    }
    insert_falling(scratch, count);
    memcpy(values, scratch, (size_t)count * sizeof(float));
}

static int top_rows(const float *z, int64_t n, int64_t count, float *values, int64_t begin, int64_t end) {
    static _Thread_local struct scratch scratch;
    float *own = scratch_get(&scratch, ROW_SCRATCH(n) * sizeof(float));
    for (int64_t row = begin; row < end; row++) {
        if (!own) return -1;
        row_largest(z + row * n, n, count, own, values + row * count);
    }
    return 0;
}

/* The `count` <= n largest elements of each row, falling. Returns -1 when memory is out. */
EXPORT int vocabulary_top(const float *z, int64_t rows, int64_t n, int64_t count, float *values) {
    int failed = 0;
    OVER_ITEMS(rows, rows * n / 8, {
        if (top_rows(z, n, count, values, begin, end)) failed = -1;
    });
    return failed;
}
