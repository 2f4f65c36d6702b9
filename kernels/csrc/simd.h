/* Sixteen float lanes on AVX-512F, AVX2 + FMA, or plain C.
 *
 * vf: 16 floats. vu: 16 uint32, or 16 pairs of int16 in the low and high halves of the lanes. Every operation rounds
 * once per lane; vf_fma is fused on the two vector paths and a multiply followed by an addition in plain C, so results
 * may differ between machines, never between calls on one. vu_lookup_pairs takes the low four bits of each half into a
 * table of 16 that is given twice over, vu_dot2 adds low * low + high * high, vf_store_int16 rounds to nearest even.
 * Element types of stored tensors (enum elem): F32, BF16, F16, for KV caches and rank pages E4M3, for rank pages I8,
 * which is only loaded; functions that take one are always inlined with a constant.
 */
#ifndef LORRY_SIMD_H
#define LORRY_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define LANES 16

enum elem { F32 = 0, BF16 = 1, F16 = 2, E4M3 = 3, I8 = 4 };

INLINE int elem_size(enum elem type) { return type == F32 ? 4 : type >= E4M3 ? 1 : 2; }

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent == 0) {
        float small = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &small, 4);
        bits |= sign;
    } else {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (magnitude < 0x38800000u) {                                   /* below 2^-14: a multiple of 2^-24 */
        float scaled;
        memcpy(&scaled, &magnitude, 4);
        scaled = scaled + 0.5f; /* ulp of 0.5 is 2^-24: the addition rounds to nearest even */
        memcpy(&magnitude, &scaled, 4);
        return (uint16_t)(sign | (magnitude - 0x3f000000u));
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((magnitude - 0x38000000u) >> 13));
}

INLINE float e4m3_to_float(uint8_t b) {
    const uint16_t magnitude = b & 0x7fu; /* as a half's, it is the number times 2^-8 */
    const uint16_t nan = (uint16_t)(magnitude + 1) & 0x80u;
    return f16_to_float((uint16_t)((b & 0x80u) << 8 | (magnitude | nan) << 7)) * 0x1p8f;
}

INLINE uint8_t float_to_e4m3(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 24 & 0x80u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (magnitude > 0x43e00000u) magnitude = 0x43e00000u; /* 448 */
    if (magnitude < 0x3c800000u) {                        /* below 2^-6: a multiple of 2^-9 */
        float scaled;
        memcpy(&scaled, &magnitude, 4);
        scaled = scaled + 0x1p14f; /* whose ulp is 2^-9: the addition rounds to nearest even */
        memcpy(&magnitude, &scaled, 4);
        return (uint8_t)(sign | (magnitude - 0x46800000u));
    }
    magnitude += 0x7ffffu + ((magnitude >> 20) & 1u);
    return (uint8_t)(sign | ((magnitude - 0x3c000000u) >> 20));
}

INLINE float elem_load(enum elem type, const void *base, int64_t i) {
    if (type == F32) return ((const float *)base)[i];
    if (type == E4M3) return e4m3_to_float(((const uint8_t *)base)[i]);
    if (type == I8) return (float)((const int8_t *)base)[i];
    uint16_t h = ((const uint16_t *)base)[i];
    return type == BF16 ? bf16_to_float(h) : f16_to_float(h);
}

INLINE void elem_store(enum elem type, void *base, int64_t i, float f) {
    if (type == F32)
        ((float *)base)[i] = f;
    else if (type == E4M3)
        ((uint8_t *)base)[i] = float_to_e4m3(f);
    else
        ((uint16_t *)base)[i] = type == BF16 ? float_to_bf16(f) : float_to_f16(f);
}

INLINE const void *elem_at(enum elem type, const void *base, int64_t i) {
    return (const char *)base + i * elem_size(type);
}

#if defined(__AVX512F__)

#include <immintrin.h>
#define LORRY_SIMD "avx512"
typedef __m512 vf;
typedef __m512i vu;

INLINE vf vf_set1(float f) { return _mm512_set1_ps(f); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vu vu_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
INLINE vu vu_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vu vu_add(vu a, vu b) { return _mm512_add_epi32(a, b); }
INLINE vu vu_sub(vu a, vu b) { return _mm512_sub_epi32(a, b); }
INLINE vu vu_set1(uint32_t u) { return _mm512_set1_epi32((int)u); }
INLINE vu vu_srl(vu v, int count) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(count)); }
#define VU_SRLI(v, count) _mm512_srli_epi32(v, count)
INLINE vf vf_lookup16(vf table, vu index) { return _mm512_permutexvar_ps(index, table); }
INLINE vf vf_lookup32(const float *table, vu index) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + LANES));
}
INLINE vf vf_lookup256(const float *table, vu index) { /* permutes: a gather costs about 50 cycles where GDS is mitigated */
    __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
    vf quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        quarter[i] = _mm512_mask_blend_ps(bit5, vf_lookup32(table + i * 64, index), vf_lookup32(table + i * 64 + 32, index));
    vf low = _mm512_mask_blend_ps(bit6, quarter[0], quarter[1]), high = _mm512_mask_blend_ps(bit6, quarter[2], quarter[3]);
    return _mm512_mask_blend_ps(bit7, low, high);
}
INLINE vf vf_where_below(vf x, vf limit, vf then, vf otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), otherwise, then);
}
INLINE vf vf_times_pow2(vf v, vf n) { /* n integral in -126..127 */
    return _mm512_mul_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(
                                _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)));
}
INLINE vf vf_load_as(enum elem type, const void *p) {
    if (type == F32) return _mm512_loadu_ps(p);
    if (type == I8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
    if (type == E4M3) { /* as e4m3_to_float; the product is exact */
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
        const __m256i magnitude = _mm256_and_si256(b, _mm256_set1_epi16(0x7f));
        const __m256i nan = _mm256_and_si256(_mm256_add_epi16(magnitude, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x80));
        const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(b, magnitude), 8);
        const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_or_si256(magnitude, nan), 7));
        return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(0x1p8f));
    }
    __m256i h = _mm256_loadu_si256((const __m256i *)p);
    if (type == BF16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    return _mm512_cvtph_ps(h);
}
INLINE void vf_store_as(enum elem type, void *p, vf v) {
    if (type == F32) {
        _mm512_storeu_ps(p, v);
    } else if (type == BF16) {
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded));
    } else if (type == E4M3) {
        float wide[LANES];
        _mm512_storeu_ps(wide, v);
        for (int i = 0; i < LANES; i++) elem_store(type, p, i, wide[i]);
    } else {
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
}

typedef vu pair_table;
INLINE pair_table pair_table_load(const int16_t *table) { return _mm512_loadu_si512(table); }
INLINE vu vu_lookup_pairs(pair_table table, vu index) { return _mm512_permutexvar_epi16(index, table); }
INLINE vu vu_dot2(vu a, vu b, vu acc) {
#ifdef __AVX512VNNI__
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); /* GCC 12 copies the intrinsic's acc forth and back */
    return acc;
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
#ifdef __AVX512VNNI__
#define LORRY_DOT2_ALL
INLINE vu vu_dot2_all(vu a, const int16_t *pair, vu acc) {
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*(const int16_t(*)[2])pair));
    return acc;
}
#endif
INLINE void vu_store(uint32_t *p, vu v) { _mm512_storeu_si512(p, v); }
INLINE vf vf_from_int(vu v) { return _mm512_cvtepi32_ps(v); }
INLINE void vf_store_int16(int16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}

#elif defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#define LORRY_SIMD "avx2"
typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vu;

#define VF_EACH(op, x, y) ((vf){op((x).a, (y).a), op((x).b, (y).b)})
INLINE vf vf_set1(float f) { return (vf){_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vf_store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
INLINE vf vf_add(vf x, vf y) { return VF_EACH(_mm256_add_ps, x, y); }
INLINE vf vf_sub(vf x, vf y) { return VF_EACH(_mm256_sub_ps, x, y); }
INLINE vf vf_mul(vf x, vf y) { return VF_EACH(_mm256_mul_ps, x, y); }
INLINE vf vf_div(vf x, vf y) { return VF_EACH(_mm256_div_ps, x, y); }
INLINE vf vf_max(vf x, vf y) { return VF_EACH(_mm256_max_ps, x, y); }
INLINE vf vf_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE vu vu_load(const uint32_t *p) {
    return (vu){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}
INLINE vu vu_load_u8(const uint8_t *p) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (vu){_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
INLINE vu vu_add(vu x, vu y) { return (vu){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE vu vu_sub(vu x, vu y) { return (vu){_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE vu vu_set1(uint32_t u) { return (vu){_mm256_set1_epi32((int)u), _mm256_set1_epi32((int)u)}; }
INLINE vu vu_srl(vu v, int count) {
    __m128i c = _mm_cvtsi32_si128(count);
    return (vu){_mm256_srl_epi32(v.a, c), _mm256_srl_epi32(v.b, c)};
}
#define VU_SRLI(v, count) ((vu){_mm256_srli_epi32((v).a, count), _mm256_srli_epi32((v).b, count)})
INLINE __m256 lookup_half(vf table, __m256i index) {
    __m256 low = _mm256_permutevar8x32_ps(table.a, index), high = _mm256_permutevar8x32_ps(table.b, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE vf vf_lookup16(vf table, vu index) {
    return (vf){lookup_half(table, index.a), lookup_half(table, index.b)};
}
#define LORRY_SCALAR_LOOKUP
INLINE vf vf_where_below(vf x, vf limit, vf then, vf otherwise) {
    return (vf){_mm256_blendv_ps(otherwise.a, then.a, _mm256_cmp_ps(x.a, limit.a, _CMP_LT_OQ)),
                _mm256_blendv_ps(otherwise.b, then.b, _mm256_cmp_ps(x.b, limit.b, _CMP_LT_OQ))};
}
INLINE __m256 pow2_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vf vf_times_pow2(vf v, vf n) {
    return (vf){_mm256_mul_ps(v.a, pow2_half(n.a)), _mm256_mul_ps(v.b, pow2_half(n.b))};
}
INLINE __m256 widen_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE __m256 widen_int8(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE __m256 widen_e4m3(const void *p) { /* a float's bits of the number times 2^-120; the product is exact */
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    const __m256i magnitude = _mm256_and_si256(b, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(b, magnitude), 24);
    const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
    const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)), _mm256_set1_ps(0x1p120f));
    const __m256i bits = _mm256_or_si256(_mm256_castps_si256(value), _mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000)));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, sign));
}
INLINE vf vf_load_as(enum elem type, const void *p) {
    if (type == F32) return vf_load(p);
    if (type == BF16) return (vf){widen_bf16(p), widen_bf16((const char *)p + 16)};
    if (type == I8) return (vf){widen_int8(p), widen_int8((const char *)p + 8)};
    if (type == E4M3) return (vf){widen_e4m3(p), widen_e4m3((const char *)p + 8)};
    float wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = elem_load(type, p, i);
    return vf_load(wide);
}
INLINE void vf_store_as(enum elem type, void *p, vf v) {
    float wide[LANES];
    vf_store(wide, v);
    for (int i = 0; i < LANES; i++) elem_store(type, p, i, wide[i]);
}

typedef struct {
    __m256i low, high; /* bytes of the 16 values, in both 128-bit lanes */
} pair_table;
INLINE pair_table pair_table_load(const int16_t *table) {
    uint8_t low[32], high[32];
    for (int i = 0; i < 32; i++) low[i] = (uint8_t)table[i], high[i] = (uint8_t)((uint16_t)table[i] >> 8);
    return (pair_table){_mm256_loadu_si256((const __m256i *)low), _mm256_loadu_si256((const __m256i *)high)};
}
INLINE __m256i lookup_pairs_half(pair_table table, __m256i index) { /* an index byte of 128 and above gives 0 */
    const __m256i nibble = _mm256_and_si256(index, _mm256_set1_epi16(15));
    const __m256i low = _mm256_or_si256(nibble, _mm256_set1_epi16((short)0x8000));
    const __m256i high = _mm256_or_si256(_mm256_slli_epi16(nibble, 8), _mm256_set1_epi16(0x80));
    return _mm256_or_si256(_mm256_shuffle_epi8(table.low, low), _mm256_shuffle_epi8(table.high, high));
}
INLINE vu vu_lookup_pairs(pair_table table, vu index) {
    return (vu){lookup_pairs_half(table, index.a), lookup_pairs_half(table, index.b)};
}
INLINE vu vu_dot2(vu a, vu b, vu acc) {
    return (vu){_mm256_add_epi32(acc.a, _mm256_madd_epi16(a.a, b.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(a.b, b.b))};
}
INLINE void vu_store(uint32_t *p, vu v) {
    _mm256_storeu_si256((__m256i *)p, v.a);
    _mm256_storeu_si256((__m256i *)(p + 8), v.b);
}
INLINE vf vf_from_int(vu v) { return (vf){_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
INLINE void vf_store_int16(int16_t *p, vf v) {
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
}

#else

#define LORRY_SIMD "plain"
typedef float vf __attribute__((vector_size(64))); /* the compiler cuts them to what the machine has */
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

INLINE vf vf_set1(float f) { return f - (vf){0}; }
INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_where_below(vf x, vf limit, vf then, vf otherwise) {
    const vi mask = x < limit;
    return (vf)(((vi)then & mask) | ((vi)otherwise & ~mask));
}
INLINE vf vf_max(vf a, vf b) { return vf_where_below(b, a, a, b); }
INLINE vf vf_times_pow2(vf v, vf n) { return v * (vf)((__builtin_convertvector(n, vi) + 127) << 23); }
INLINE vu vu_load(const uint32_t *p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vu vu_load_u8(const uint8_t *p) {
    vu v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
}
INLINE vu vu_add(vu a, vu b) { return a + b; }
INLINE vu vu_sub(vu a, vu b) { return a - b; }
INLINE vu vu_set1(uint32_t u) { return u + (vu){0}; }
INLINE vu vu_srl(vu v, int count) { return v >> (uint32_t)count; }
#define VU_SRLI(v, count) vu_srl(v, count)
INLINE vf vf_lookup16(vf table, vu index) {
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = table[index[i] & 15u];
    return v;
}
typedef struct {
    int16_t values[LANES];
} pair_table;
INLINE pair_table pair_table_load(const int16_t *table) {
    pair_table t;
    memcpy(t.values, table, sizeof t.values);
    return t;
}
INLINE vu vu_lookup_pairs(pair_table table, vu index) {
    vu v;
    for (int i = 0; i < LANES; i++)
        v[i] = (uint16_t)table.values[index[i] & 15u] | (uint32_t)(uint16_t)table.values[index[i] >> 16 & 15u] << 16;
    return v;
}
INLINE vu vu_dot2(vu a, vu b, vu acc) {
    const vi low = ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16), high = ((vi)a >> 16) * ((vi)b >> 16);
    return acc + (vu)low + (vu)high;
}
INLINE void vu_store(uint32_t *p, vu v) { memcpy(p, &v, sizeof v); }
INLINE vf vf_from_int(vu v) { return __builtin_convertvector((vi)v, vf); }
INLINE void vf_store_int16(int16_t *p, vf v) {
    for (int i = 0; i < LANES; i++) {
        const float bounded = v[i] < 32767.0f ? v[i] : 32767.0f; /* also for a NaN */
        p[i] = (int16_t)lrintf(bounded > -32768.0f ? bounded : -32768.0f);
    }
}
#define LORRY_SCALAR_LOOKUP
INLINE vf vf_load_as(enum elem type, const void *p) {
    if (type == F32) return vf_load(p);
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = elem_load(type, p, i);
    return v;
}
INLINE void vf_store_as(enum elem type, void *p, vf v) {
    if (type == F32)
        vf_store(p, v);
    else
        for (int i = 0; i < LANES; i++) elem_store(type, p, i, v[i]);
}

#endif

#ifdef LORRY_SCALAR_LOOKUP
INLINE vf vf_lookup256(const float *table, vu index) {
    uint32_t at[LANES];
    float lanes[LANES];
    memcpy(at, &index, sizeof at);
    for (int i = 0; i < LANES; i++) lanes[i] = table[at[i]];
    return vf_load(lanes);
}
INLINE vf vf_lookup32(const float *table, vu index) { return vf_lookup256(table, index); }
#endif

#ifndef LORRY_DOT2_ALL
/* acc + pair . pair: the two of `pair` with those of every lane. */
INLINE vu vu_dot2_all(vu a, const int16_t *pair, vu acc) {
    uint32_t both;
    memcpy(&both, pair, sizeof both);
    return vu_dot2(a, vu_set1(both), acc);
}
#endif

/* 0, step, 2 step, ... */
INLINE vu vu_lanes(uint32_t step) {
    uint32_t lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = step * (uint32_t)i;
    return vu_load(lanes);
}

/* First `count` lanes; the others are 0 when loaded and untouched when stored. */
INLINE vf vf_load_some(enum elem type, const void *p, int count) {
    if (count >= LANES) return vf_load_as(type, p);
    float lanes[LANES] = {0};
    for (int i = 0; i < count; i++) lanes[i] = elem_load(type, p, i);
    return vf_load(lanes);
}
INLINE void vf_store_some(enum elem type, void *p, vf v, int count) {
    if (count >= LANES) {
        vf_store_as(type, p, v);
        return;
    }
    float lanes[LANES];
    vf_store(lanes, v);
    for (int i = 0; i < count; i++) elem_store(type, p, i, lanes[i]);
}

/* rows[i] lane j <-> rows[j] lane i */
INLINE void vf_transpose(vf rows[LANES]) {
#if defined(__AVX512F__)
    vf a[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) { /* 4 x 4 blocks inside each 128-bit lane */
        vf ab = _mm512_unpacklo_ps(rows[i], rows[i + 1]), AB = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        vf cd = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), CD = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
        a[i] = _mm512_shuffle_ps(ab, cd, 0x44);
        a[i + 1] = _mm512_shuffle_ps(ab, cd, 0xee);
        a[i + 2] = _mm512_shuffle_ps(AB, CD, 0x44);
        a[i + 3] = _mm512_shuffle_ps(AB, CD, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* then the 4 x 4 matrix of those lanes */
        vf ab = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), AB = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        vf cd = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88), CD = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(ab, cd, 0x88);
        rows[i + 4] = _mm512_shuffle_f32x4(AB, CD, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(ab, cd, 0xdd);
        rows[i + 12] = _mm512_shuffle_f32x4(AB, CD, 0xdd);
    }
#else
    float m[LANES][LANES], t[LANES][LANES];
    for (int i = 0; i < LANES; i++) vf_store(m[i], rows[i]);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) t[j][i] = m[i][j];
    for (int i = 0; i < LANES; i++) rows[i] = vf_load(t[i]);
#endif
}

/* Halving tree: lane i with lane i + 8, then 4, 2, 1. */
INLINE float vf_sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float f[LANES];
    vf_store(f, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) f[i] += f[i + half];
    return f[0];
#endif
}
INLINE float vf_peak(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float f[LANES];
    vf_store(f, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) f[i] = f[i] > f[i + half] ? f[i] : f[i + half];
    return f[0];
#endif
}

/* exp(x) within 2 ulp; exp(0) = 1 exactly, 0 below -87 (also at -inf), bounded by exp(88) above.
 * Range reduction by ln 2 in two parts, Taylor-like polynomial of degree 6 on |r| <= ln 2 / 2. */
INLINE vf vf_exp(vf x) {
    const vf lowest = vf_set1(-87.0f), magic = vf_set1(12582912.0f);
    vf bounded = vf_where_below(x, lowest, lowest, x);
    bounded = vf_where_below(bounded, vf_set1(88.0f), bounded, vf_set1(88.0f));
    vf n = vf_sub(vf_add(vf_mul(bounded, vf_set1(1.44269504088896341f)), magic), magic);
    vf r = vf_fma(n, vf_set1(-0.693359375f), bounded);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set1(1.0f));
    return vf_where_below(x, lowest, vf_set1(0.0f), vf_times_pow2(p, n));
}

#endif
