/* What truncation leaves of a row, and a draw from it: a window over the row's largest values, in falling order, that
 * one cut after the other narrows. A row in one thread, so that its bits depend on no other row.
 *
 *     w[i] = exp((z[i] - max z) / T)      p[i] = w[i] / M       M = Σ w over what is left
 *     H    = -Σ p log p = log M - E / M                         E = Σ w log w over what is left
 *
 * The cuts themselves are described in lorry/server/decoding/cuts/, where they are torch on a sorted vocabulary. Here a
 * row is tried with lists of its largest values only. It is then `whole`, nothing is cut yet; or `exact`, everything
 * that is left is listed; or cut somewhere beyond the list, which a later cut may mend; or `lost`, as a cut needed sums
 * of what is not listed.
 */
#include <math.h>

#include "kernels.h"
#include "vocabulary.h"

/* A row's parameters, as lorry/kernels/truncation.py has them. */
struct cuts {
    double temperature, top_n_sigma, top_k, top_p, min_p, typical_p, epsilon, eta;
};

enum { WIDE = 2048 }; /* tokens from which on a draw goes in the order of their ids */
static const int64_t LISTS[] = {128, WIDE, INT64_MAX}; /* lengths, up to the vocabulary's */

struct left {
    const float *z;
    int64_t n;
    const float *values; /* falling, `listed` of them, as are the next three */
    double *scaled, *weights, *mass_to;
    int64_t listed, start, end;
    int whole, exact, lost;
    double whole_mass, whole_energy; /* NaN until asked for */
    float temperature;
};

static void list(struct left *l, int64_t count, float *values, double *numbers) {
    l->values = values;
    l->listed = count;
    l->scaled = numbers, l->weights = numbers + count, l->mass_to = numbers + 2 * count;
    const float top = isinf(values[0]) ? 0.0f : values[0];
    double mass = 0;
    for (int64_t i = 0; i < count; i++) {
        l->scaled[i] = (double)(values[i] - top) / (double)l->temperature;
        l->weights[i] = exp(l->scaled[i]);
        l->mass_to[i] = mass += l->weights[i];
    }
    l->start = 0, l->end = count;
    l->exact = count == l->n, l->whole = !l->exact, l->lost = 0;
}

static void weigh_whole(struct left *l) {
    if (isnan(l->whole_mass)) l->whole_mass = row_weights(l->z, l->n, l->temperature, NULL, &l->whole_energy);
}

/* M; void where the row is neither exact nor whole. */
static double mass(struct left *l) {
    if (l->whole) {
        weigh_whole(l);
        return l->whole_mass;
    }
    return l->mass_to[l->end - 1] - (l->start ? l->mass_to[l->start - 1] : 0.0);
}

/* E, likewise. What has no weight adds nothing, -inf included. */
static double energy(struct left *l) {
    if (l->whole) {
        weigh_whole(l);
        return l->whole_energy;
    }
    double sum = 0;
    for (int64_t i = l->start; i < l->end && l->weights[i] > 0; i++) sum += l->weights[i] * l->scaled[i];
    return sum;
}

/* How many of the listed have at least this weight, which falls. */
static int64_t weighing(const struct left *l, double least) {
    int64_t low = 0, high = l->listed;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (l->weights[middle] >= least)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* `end` moved behind the last value that equals the one before it. */
static int64_t up_to_equals(const struct left *l, int64_t end) {
    while (end < l->listed && l->values[end] == l->values[end - 1]) end++;
    return end;
}

/* Keep what comes before `end`, and always the largest and its equals. */
static void shorten(struct left *l, int64_t end) {
    end = MAX(end, up_to_equals(l, l->start + 1));
    l->end = MIN(end, l->end);
    l->exact |= l->end < l->listed;
    l->whole = 0;
}

static void cut_top_n_sigma(struct left *l, double n) {
    const double least = -(n * row_deviation(l->z, l->n));
    int64_t end = 0;
    while (end < l->listed && (double)(l->values[end] - l->values[0]) >= least) end++;
    shorten(l, end);
}

static void cut_top_k(struct left *l, double k) {
    shorten(l, up_to_equals(l, k < (double)l->listed ? (int64_t)k : l->listed));
}

static void cut_top_p(struct left *l, double p) {
    const double enough = p * mass(l);
    int64_t nucleus = 1;
    while (nucleus < l->listed && l->mass_to[nucleus] - l->weights[nucleus] < enough) nucleus++;
    shorten(l, up_to_equals(l, nucleus));
}

/* Surprise rises along the list, so that the nearest to the entropy lie side by side: from there the window grows, each
 * time by the nearer of its neighbours, until it has the mass, then by what is as far away as its farthest. */
static void cut_typical(struct left *l, double p) {
    const double total = mass(l), log_total = log(total), entropy = log_total - energy(l) / total;
#define DISTANCE(i) fabs(log_total - l->scaled[i] - entropy)
    int64_t after = l->start;
    while (after < l->end && log_total - l->scaled[after] < entropy) after++;
    int64_t before = after;
    double held = 0, limit = 0;
    do {
        const double up = before > l->start ? DISTANCE(before - 1) : INFINITY;
        const double down = after < l->end ? DISTANCE(after) : INFINITY;
        if (up <= down && before > l->start)
            held += l->weights[--before], limit = up;
        else
            held += l->weights[after++], limit = down;
    } while (held < p * total && (before > l->start || after < l->end));
    while (before > l->start && DISTANCE(before - 1) <= limit) before--;
    while (after < l->end && DISTANCE(after) <= limit) after++;
    /* What is not listed is farther away than the last listed one, where that is cut and lies beyond the entropy. */
    const int64_t last = l->listed - 1;
    if (!l->exact && !(l->whole && log_total - l->scaled[last] >= entropy && DISTANCE(last) > limit)) {
        l->lost = 1;
        return;
    }
#undef DISTANCE
    l->start = before, l->end = after;
    l->exact = 1, l->whole = 0;
}

static void cut_epsilon(struct left *l, double epsilon) { shorten(l, weighing(l, epsilon * mass(l))); }

static void cut_eta(struct left *l, double epsilon) {
    const double total = mass(l), entropy = log(total) - energy(l) / total;
    shorten(l, weighing(l, fmin(epsilon, sqrt(epsilon) * exp(-entropy)) * total));
}

/* Whether the sums that the next cut needs can be told; a list that cannot tell them is lost. */
static int known(struct left *l) {
    l->lost |= !l->exact && !l->whole;
    return !l->lost;
}

/* All cuts in their order. Returns whether everything that they leave is listed. */
static int narrow(struct left *l, const struct cuts *c) {
    if (c->top_n_sigma > 0) cut_top_n_sigma(l, c->top_n_sigma);
    if (c->top_k < (double)l->n) cut_top_k(l, c->top_k);
    if (c->top_p < 1 && known(l)) cut_top_p(l, c->top_p);
    if (c->min_p > 0 && !l->lost) shorten(l, weighing(l, c->min_p));
    if (c->typical_p < 1 && known(l)) cut_typical(l, c->typical_p);
    if (c->epsilon > 0 && known(l)) cut_epsilon(l, c->epsilon);
    if (c->eta > 0 && known(l)) cut_eta(l, c->eta);
    return l->exact && !l->lost;
}

/* A draw through the window. Overwrites mass_to. */
static int64_t draw_falling(struct left *l, double uniform) {
    const int64_t count = l->end - l->start;
    double *cumulative = l->mass_to, sum = 0;
    for (int64_t i = 0; i < count; i++) cumulative[i] = sum += l->weights[l->start + i];
    const int64_t rank = l->start + first_above(cumulative, count, uniform * sum);
    int64_t first = rank;
    while (first && l->values[first - 1] == l->values[rank]) first--;
    return row_nth(l->z, l->n, l->values[rank], rank - first);
}

/* The same in the order of the token ids. scratch: n floats and the doubles of `row_draw`. */
static int64_t draw_rising(const struct left *l, double uniform, float *scratch, double *cumulative) {
    const float low = l->values[l->end - 1], high = l->values[l->start];
    for (int64_t i = 0; i < l->n; i++) scratch[i] = l->z[i] >= low && l->z[i] <= high ? l->z[i] : -INFINITY;
    return row_draw(scratch, l->n, l->temperature, uniform, cumulative);
}

/* One row. Returns the token, -1 when memory is out. */
static int64_t draw_truncated(const float *z, int64_t n, const struct cuts *c, double uniform) {
    static _Thread_local struct scratch for_floats, for_doubles;
    const int extended = c->top_n_sigma > 0 || c->typical_p < 1 || c->epsilon > 0 || c->eta > 0;
    struct left l = {.z = z, .n = n, .whole_mass = NAN, .temperature = (float)c->temperature};
    for (int i = 0;; i++) {
        const int64_t count = MIN(LISTS[i], n);
        float *scratch = scratch_get(&for_floats, (ROW_SCRATCH(n) + (size_t)count) * sizeof(float));
        double *numbers = scratch_get(&for_doubles, (size_t)(3 * count + ROW_SPANS(n)) * sizeof(double));
        if (!scratch || !numbers) return -1;
        row_largest(z, n, count, scratch, scratch + ROW_SCRATCH(n));
        list(&l, count, scratch + ROW_SCRATCH(n), numbers);
        if (!narrow(&l, c)) continue;
        /* A row that is not extended comes to the last list only if WIDE are left, or were left to top-p. */
        const int wide = LISTS[i] == INT64_MAX && (!extended || l.end - l.start >= WIDE);
        return wide ? draw_rising(&l, uniform, scratch, numbers + 3 * count) : draw_falling(&l, uniform);
    }
}

/* One token of each row, [rows]. cuts: a struct of each row; uniforms: in [0, 1). Returns -1 when memory is out. */
EXPORT int truncated_draw(const float *z, int64_t rows, int64_t n, const double *cuts, const double *uniforms,
                          int64_t *tokens) {
    int failed = 0;
    OVER_ITEMS(rows, rows * n / 2, {
        for (int64_t row = begin; row < end; row++) {
            tokens[row] = draw_truncated(z + row * n, n, (const struct cuts *)cuts + row, uniforms[row]);
            if (tokens[row] < 0) failed = -1;
        }
    });
    return failed;
}
