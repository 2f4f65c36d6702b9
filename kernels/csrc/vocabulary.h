/* One row of logits: sums over it, its largest elements, a draw.
 *
 *     w[t] = exp((z[t] - max z) / T)       sums of SPAN elements in float32, over spans in float64
 */
#ifndef LORRY_VOCABULARY_H
#define LORRY_VOCABULARY_H

#include "common.h"

#define SPAN 128
#define ROW_SPANS(n) (((n) + SPAN - 1) / SPAN)
#define ROW_SCRATCH(n) ((size_t)((n) + (n) / LANES + LANES))

/* Σ w; Σ w log w in *energy and in cumulative[s] the sum up to the end of span s, where they are given. */
double row_weights(const float *z, int64_t n, float t, double *cumulative, double *energy);

/* The standard deviation of the finite elements, 0 where there are none. */
double row_deviation(const float *z, int64_t n);

/* The place of the nth element, from 0, that equals `value`; 0 where there is none. */
int64_t row_nth(const float *z, int64_t n, float value, int64_t nth);

/* The `count` <= n largest elements, falling; scratch: ROW_SCRATCH(n) floats. */
void row_largest(const float *z, int64_t n, int64_t count, float *scratch, float *values);

/* The inverse of the cumulative distribution p ∝ w in the order of the token ids; cumulative: ROW_SPANS(n) doubles. */
int64_t row_draw(const float *z, int64_t n, float t, double uniform, double *cumulative);

/* The first place whose sum exceeds the target; if rounding left none, the last that adds. */
int64_t first_above(const double *cumulative, int64_t n, double target);

#endif
