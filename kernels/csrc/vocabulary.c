/* Reductions along the vocabulary, a row in one thread, so that its bits depend on no other row.
 *
 *     w[t] = exp((z[t] - max z) / T)       sums of SPAN elements in float32, over spans in float64
 */
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define SPAN 128

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

/* cumulative[s]: the sum of w up to the end of span s, where it is given; the sum of all w, and of w log w in *energy. */
static double sum_weights(const float *z, int64_t n, float t, double *cumulative, double *energy) {
    const vf peak = vf_set1(peak_of(z, n)), temperature = vf_set1(t), least = vf_set1(-1e30f);
    const int divides = t != 1.0f;
    double mass = 0, total = 0;
    for (int64_t start = 0; start < n; start += SPAN) {
        vf sums[2] = {vf_set1(0.0f), vf_set1(0.0f)}, energies[2] = {vf_set1(0.0f), vf_set1(0.0f)};
        const int64_t end = MIN(n, start + SPAN);
        for (int64_t i = start; i < end; i += LANES) {
            const int chain = (int)(i / LANES % 2);
            const vf x = scaled(load_row(z + i, end - i), peak, temperature, divides), w = vf_exp(x);
            sums[chain] = vf_add(sums[chain], w);
            if (energy) energies[chain] = vf_fma(w, vf_max(x, least), energies[chain]);
        }
        mass += vf_sum(vf_add(sums[0], sums[1]));
        if (energy) total += vf_sum(vf_add(energies[0], energies[1]));
        if (cumulative) cumulative[start / SPAN] = mass;
    }
    if (energy) *energy = total;
    return mass;
}

/* The first place whose sum exceeds the target; if rounding left none, the last that adds. */
static int64_t first_above(const double *cumulative, int64_t n, double target) {
    int64_t place = 0;
    while (place < n && cumulative[place] <= target) place++;
    if (place < n) return place;
    while (place > 1 && cumulative[place - 2] == cumulative[n - 1]) place--;
    return place - 1;
}

static int64_t draw_row(const float *z, int64_t n, float t, double uniform, double *cumulative) {
    const int64_t spans = (n + SPAN - 1) / SPAN;
    const double target = uniform * sum_weights(z, n, t, cumulative, NULL);
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
    double *cumulative = scratch_get(&scratch, (size_t)((n + SPAN - 1) / SPAN) * sizeof(double));
    for (int64_t row = begin; row < end; row++) {
        if (!cumulative) return -1;
        tokens[row] = draw_row(z + row * n, n, temperatures[row], uniforms[row], cumulative);
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

static void total_rows(const float *z, int64_t n, const float *temperatures, double *masses, double *energies,
                       int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        masses[row] = sum_weights(z + row * n, n, temperatures[row], NULL, energies ? energies + row : NULL);
}

/* Σ w and, where asked for, Σ w log w of each row. */
EXPORT int vocabulary_totals(const float *z, int64_t rows, int64_t n, const float *temperatures, double *masses,
                             double *energies) {
    OVER_ITEMS(rows, rows * n / 4, total_rows(z, n, temperatures, masses, energies, begin, end));
    return 0;
}

static double deviation_of(const float *z, int64_t n) {
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

static void deviate_rows(const float *z, int64_t n, double *deviations, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) deviations[row] = deviation_of(z + row * n, n);
}

/* The standard deviation of each row's finite elements, 0 where there are none. */
EXPORT int vocabulary_deviations(const float *z, int64_t rows, int64_t n, double *deviations) {
    OVER_ITEMS(rows, rows * n / 8, deviate_rows(z, n, deviations, begin, end));
    return 0;
}

static int64_t nth_of(const float *z, int64_t n, float value, int64_t nth) {
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
    for (int64_t row = begin; row < end; row++) places[row] = nth_of(z + row * n, n, values[row], nth[row]);
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

static void sort_falling(float *values, int64_t n) {
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

/* Those that may be among the `count` largest of a row, into `out`; how many. Block b is every blocks-th element from b
 * on, so that its maximum is a vertical one: an element among the largest lies in a block whose maximum is among the
 * `count` largest of these. */
static int64_t candidates(const float *z, int64_t n, int64_t count, float *maxima, float *out) {
    const int64_t blocks = n / LANES / LANES * LANES;
    if (blocks < 4 * count) {
        memcpy(out, z, (size_t)n * sizeof(float));
        return n;
    }
    for (int64_t b = 0; b < blocks; b += LANES) {
        vf peaks = vf_load(z + b);
        for (int64_t i = 1; i < LANES; i++) peaks = vf_max(peaks, vf_load(z + i * blocks + b));
        vf_store(maxima + b, peaks);
    }
    memcpy(out, maxima, (size_t)blocks * sizeof(float));
    select_largest(out, blocks, count);
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

static int top_rows(const float *z, int64_t n, int64_t count, float *values, int64_t begin, int64_t end) {
    static _Thread_local struct scratch scratch;
    float *out = scratch_get(&scratch, (size_t)(n + n / LANES + LANES) * sizeof(float));
    for (int64_t row = begin; row < end; row++) {
        if (!out) return -1;
        const int64_t found = candidates(z + row * n, n, count, out + n, out);
        select_largest(out, found, count);
        sort_falling(out, count);
        memcpy(values + row * count, out, (size_t)count * sizeof(float));
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
