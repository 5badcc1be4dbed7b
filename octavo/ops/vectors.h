/* Vectors of sixteen words: sums of products, numbers from codes, rows to columns, numbers to 16 bits. */
#ifndef OCTAVO_VECTORS_H
#define OCTAVO_VECTORS_H

#include "product.h"

#if defined(__x86_64__)

#define AVX512_DOTS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni" WIDE)))
enum { LANES = 16, LOT = 48 }; /* LOT: rows of B that a thread takes at a time */

/* Sums of either kind, as 32-bit words. */
INLINE AVX512_DOTS __m512i dot(int kind, __m512i sum, __m512i a, __m512i b) {
    if (kind == INTEGERS) return _mm512_dpbusd_epi32(sum, a, b);
    if (kind == REALS)
        return _mm512_castps_si512(
            _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(sum)));
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
}

INLINE AVX512_DOTS __m512i sum_of(int kind, __m512i a, __m512i b) {
    return kind == INTEGERS ? _mm512_add_epi32(a, b)
                            : _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

INLINE AVX512_DOTS __m512 number(int kind, __m512i sum) {
    return kind == INTEGERS ? _mm512_cvtepi32_ps(sum) : _mm512_castsi512_ps(sum);
}

/* Up to 32 bfloat16s from codes, by a table in eight registers of 32. */
typedef struct { __m512i part[8]; } Table;

INLINE AVX512_DOTS Table table_of(const uint16_t *table) {
    Table t;
    UNROLL for (int i = 0; i < 8; i++) t.part[i] = _mm512_loadu_si512(table + 32 * i);
    return t;
}

INLINE AVX512_DOTS __m512i look_up(Table t, __m256i codes) {
    const __m512i i = _mm512_cvtepu8_epi16(codes);
    const __mmask32 upper = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64));
    const __mmask32 negative = _mm512_test_epi16_mask(i, _mm512_set1_epi16(128));
    const __m512i y0 = _mm512_permutex2var_epi16(t.part[0], i, t.part[1]);
    const __m512i y1 = _mm512_permutex2var_epi16(t.part[2], i, t.part[3]);
    const __m512i y2 = _mm512_permutex2var_epi16(t.part[4], i, t.part[5]);
    const __m512i y3 = _mm512_permutex2var_epi16(t.part[6], i, t.part[7]);
    return _mm512_mask_blend_epi16(negative, _mm512_mask_blend_epi16(upper, y0, y1),
                                   _mm512_mask_blend_epi16(upper, y2, y3));
}

/* 16 words: up to 32 elements, or 64 bytes; zeros beyond n elements. */
INLINE AVX512_DOTS __m512i load16(const uint16_t *p, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
}
INLINE AVX512_DOTS __m512i load8(const uint8_t *p, int64_t n) {
    return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(n > 0 ? ((uint64_t)1 << n) - 1 : 0, p);
}
INLINE AVX512_DOTS __m512i load_codes(Table t, const uint8_t *p, int64_t n) {
    if (n >= 32) return look_up(t, _mm256_loadu_si256((const void *)p));
    const __mmask32 mask = n > 0 ? (1u << n) - 1 : 0;
    return _mm512_maskz_mov_epi16(mask, look_up(t, _mm256_maskz_loadu_epi8(mask, p)));
}

/* Up to 16 float32s from codes; int8 where there is no table. */
INLINE AVX512_DOTS __m512i load_reals(int coded, Table t, const uint8_t *p, int64_t n) {
    const __mmask16 mask = n >= 16 ? 0xFFFF : n > 0 ? (1u << n) - 1 : 0;
    const __m128i codes = _mm_maskz_loadu_epi8(mask, p);
    if (!coded) return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
    const __m512i numbers = look_up(t, _mm256_castsi128_si256(codes));
    return _mm512_maskz_slli_epi32(mask, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers)), 16);
}
INLINE AVX512_DOTS __m512i load_floats(const float *p, int64_t n) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(n >= 16 ? 0xFFFF : n > 0 ? (1u << n) - 1 : 0, p));
}

/* Turns rows into columns, for 16 by 16 words: by ones and twos within quarters, then the quarters. */
INLINE AVX512_DOTS void transpose(__m512i r[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
#define QUARTERS(a, b, which) _mm512_shuffle_i32x4(a, b, which) /* 0x88: the even ones of a, then of b; 0xDD: the odd */
        const __m512i even0 = QUARTERS(r[i], r[i + 4], 0x88), even1 = QUARTERS(r[i + 8], r[i + 12], 0x88);
        const __m512i odd0 = QUARTERS(r[i], r[i + 4], 0xDD), odd1 = QUARTERS(r[i + 8], r[i + 12], 0xDD);
        t[i] = QUARTERS(even0, even1, 0x88);
        t[i + 4] = QUARTERS(odd0, odd1, 0x88);
        t[i + 8] = QUARTERS(even0, even1, 0xDD);
        t[i + 12] = QUARTERS(odd0, odd1, 0xDD);
    }
    UNROLL for (int i = 0; i < 16; i++) r[i] = t[i];
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t words_of(int kind, int64_t n) { return kind == INTEGERS ? (n + 3) / 4 : (n + 1) / 2; }
INLINE int64_t stretches_of(const Product *p) { return p->k ? (p->k + p->stretch - 1) / p->stretch : 1; }

INLINE AVX512_DOTS __m256i to_bfloat16s(__m512 y) {
    /* the instruction takes subnormals for zero: 0, normal, infinite and quiet NaN are its own */
    if (!_mm512_fpclass_ps_mask(y, 0x20 | 0x80)) return (__m256i)_mm512_cvtneps_pbh(y);
    const __m512i u = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(1 << 22));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}

/* Two vectors as 16-bit numbers. */
INLINE AVX512_DOTS __m512i two_halves(int out, __m512 a, __m512 b) {
    if (out == BF16 && !(_mm512_fpclass_ps_mask(a, 0x20 | 0x80) | _mm512_fpclass_ps_mask(b, 0x20 | 0x80)))
        return (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m256i first = out == BF16 ? to_bfloat16s(a) : _mm512_cvtps_ph(a, 0);
    const __m256i second = out == BF16 ? to_bfloat16s(b) : _mm512_cvtps_ph(b, 0);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

INLINE AVX512_DOTS void store(void *c, int out, int64_t at, __mmask16 mask, __m512 y) {
    if (out == F32) {
        _mm512_mask_storeu_ps((float *)c + at, mask, y);
        return;
    }
    _mm256_mask_storeu_epi16((uint16_t *)c + at, mask, out == BF16 ? to_bfloat16s(y) : _mm512_cvtps_ph(y, 0));
}

/* Sixteen vectors of 16-bit numbers, two in a register, turned: rows of 32 bytes, i and i + 4 of every 8 in r[i]. */
INLINE AVX512_DOTS void transpose_halves(__m512i r[8]) {
    __m512i t[8];
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    UNROLL for (int i = 0; i < 8; i++) r[i] = _mm512_permutexvar_epi16(pairs, r[i]);
    UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_permutex2var_epi64(r[i], front, r[i + 4]);
        t[i + 4] = _mm512_permutex2var_epi64(r[i], back, r[i + 4]);
    }
    UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

#endif
#endif
