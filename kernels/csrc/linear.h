/* What the products of linear.c (float32) and linear_int16.c (16-bit integers) share: the weights and their tiles. */
#ifndef LORRY_LINEAR_H
#define LORRY_LINEAR_H

#include "tile.h"

enum kind { DENSE_F32 = F32, DENSE_BF16 = BF16, DENSE_F16 = F16, NF4 = 3, NF4_INT16 = 4 };

struct part {
    const void *words;           /* NF4 uint32 [tiles][K/8][16], dense [tiles][K][16] */
    const uint8_t *absmax_codes; /* [tiles][K/64][16] when double-quantized, else NULL */
    const float *absmax;         /* [tiles][K/64][16] when not */
    const float *nested_absmax;  /* [ceil(blocks / 2^nested_shift) + 32] */
    const float *nested_code;    /* [256] */
    float nested_offset;
    int32_t nested_shift;
    int64_t tiles;
};

struct linear {
    const struct part *parts;
    int64_t part_count, in_features, out_features, tiles;
    const float *bias; /* [out_features] or NULL */
    const float *code; /* NF4: [16] */
    const int16_t *code_int16; /* NF4_INT16: [32], code * unit rounded, twice */
    float unit;
    int64_t kind;
};

/* absmax of 16 columns at block kb; blocks are numbered along the part's own rows: n * (K / 64) + kb. The nested
 * groups of a tile lie within 32 of the first one (the caller sees to it), nested_absmax is padded by 32.
 * `lanes` is vu_lanes(K / 64). */
INLINE vf block_scale(const struct part *p, int64_t tile, int64_t kb, int64_t blocks_per_row, vu lanes) {
    const int64_t at = (tile * blocks_per_row + kb) * LANES;
    if (!p->absmax_codes) return vf_load(p->absmax + at);
    const uint32_t first = (uint32_t)(tile * LANES * blocks_per_row + kb), group = first >> p->nested_shift;
    const vu index = vu_sub(vu_srl(vu_add(vu_set1(first), lanes), p->nested_shift), vu_set1(group));
    const vf scale = vf_lookup32(p->nested_absmax + group, index);
    const vf code = vf_lookup256(p->nested_code, vu_load_u8(p->absmax_codes + at));
    return vf_add(vf_mul(code, scale), vf_set1(p->nested_offset));
}

INLINE vf bias_or_zero(const struct linear *l, int64_t column) {
    if (!l->bias) return vf_set1(0.0f);
    return vf_load_some(F32, l->bias + column, (int)MIN(LANES, l->out_features - column));
}

/* Bytes that a row's stream is prefetched ahead; all linears of a 135M model: 8.4 ms without, 4.8 ms with. */
#define STREAM_AHEAD 4096

/* Distance of the prefetch while a group is decoded: the same place in the next group, if the cache can hold that. */
INLINE int64_t group_ahead(int64_t tile_bytes) {
    return GROUP_TILES * tile_bytes <= 128 << 10 ? GROUP_TILES * tile_bytes : 2048;
}

#define ROW_BLOCK 10   /* row tiles whose totals are kept while a group's k are walked */
#define SUPERBLOCK 512 /* rows packed at once */

struct rows {
    int64_t count, tiles, base, longer; /* at most `most` in a tile: the first `longer` row tiles have base + 1 rows, the others base */
};
INLINE struct rows rows_of(int64_t count, int64_t most) {
    const int64_t tiles = (count + most - 1) / most;
    return (struct rows){count, tiles, count / tiles, count % tiles};
}
INLINE int64_t rows_start(const struct rows *r, int64_t i) { return i * r->base + MIN(i, r->longer); }

/* linear_forward for kind NF4_INT16; in_features is a multiple of BLOCK_K. */
int linear_int16(const struct linear *l, const float *x, int64_t m, int64_t ldx, float *y, int64_t ldy);

#endif
