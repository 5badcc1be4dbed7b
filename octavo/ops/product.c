/* The product of two matrices of codes. */
#include "product.h"

/* ---- products of codes ------------------------------------------------------------------------------------------
 *
 * C[m, n] = sum over k of A[m, k] * B[n, k], scaled, with a bias, in the type asked for: bfloat16 by vdpbf16ps, two
 * products a lane and step, or 8-bit integers by vpdpbusd, four. Either way the lanes of a vector are rows of A, and
 * a word of B, 32 bits of neighbours in a row, is broadcast to all of them.
 *
 * A, the activations, is packed first: strips of up to PANEL vectors of rows, word by word. Then every thread takes
 * lots of LOT rows of B, reads them where they lie (or decodes 8-bit floats once into a buffer of its own), and runs
 * all strips past them: strip and lot stay in the second-level cache, sums in registers. Sums become numbers while
 * they are at hand: (sum * left[m]) * right[n] + bias[n], each step rounded to float32. Scales that vary along k cut
 * it into stretches, each summed from zero, scaled, and added up in order.
 *
 * vpdpbusd wants A unsigned: 128 is added to signed codes, and with a zero point comes out again as a multiple of the
 * sum of B's row, modulo 2^32. No thread count changes a result; but few rows of floats are summed in another order
 * (dots), so a row's last bits can depend on how many rows come with it. */

#if defined(__x86_64__)

#define AVX512_DOTS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni" WIDE)))
#define UNROLL _Pragma("GCC unroll 16")
enum { LANES = 16, PANEL = 3, STRIP = LANES * PANEL, LOT = 48, DEPTH = 1024, FEW = 4 };
enum { AHEAD = 9216 }; /* bytes of B that are asked for before they are used, for few rows of A */

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

/* The first vector of a strip; strips are as even as whole vectors allow. */
INLINE int64_t strip_start(int64_t strip, int64_t strips, int64_t vectors) { return strip * vectors / strips; }

/* Lays vector v of a strip of A out as panel[stretch][word][v], and its scales and offsets as [stretch][STRIP]; absent
 * rows and what is missing of a stretch's last word are 0. */
AVX512_DOTS static void pack(const Product *p, int64_t i0, int v, int vectors, __m512i *panel, float *lefts,
                             int32_t *offsets) {
    const int64_t m = p->m - i0, words = words_of(p->kind, p->stretch);
    const int64_t per_word = p->kind == INTEGERS ? 4 : 2;
    const __m512i flip = _mm512_set1_epi8((char)p->flip);
    Table table;
    if (p->a_table) table = table_of(p->a_table);
    for (int64_t s = 0; s < stretches_of(p); s++, panel += words * vectors) {
        const int64_t k = least(p->k - s * p->stretch, p->stretch);
        for (int64_t i = v * LANES; i < (v + 1) * LANES; i++) {
            const int64_t at = (i0 + i) * p->left_row + s / p->left_span;
            lefts[s * STRIP + i] = i < m && p->left ? p->left[at] : 0;
            offsets[s * STRIP + i] = i < m ? (p->flip ? 128 : 0) + (p->zeros ? p->zeros[at] : 0) : 0;
        }
        for (int64_t w = 0; w < words; w += LANES) {
            __m512i r[16];
            const int64_t j = w * per_word;
            UNROLL for (int i = 0; i < 16; i++) {
                const int64_t row = v * LANES + i, at = (i0 + row) * p->lda + s * p->stretch + j;
                if (row >= m) r[i] = _mm512_setzero_si512();
                else if (p->a_table) r[i] = load_codes(table, (const uint8_t *)p->a + at, k - j);
                else if (p->kind == FLOATS) r[i] = load16((const uint16_t *)p->a + at, k - j);
                else r[i] = _mm512_xor_si512(load8((const uint8_t *)p->a + at, k - j), flip);
            }
            transpose(r);
            UNROLL for (int i = 0; i < 16; i++)
                if (w + i < words) panel[(w + i) * vectors + v] = r[i];
        }
    }
}

/* What a tile works on: one stretch of a strip and of a lot. */
typedef struct {
    const __m512i *panel;
    const char *b;          /* row by row */
    int64_t ldb;            /* bytes */
    int64_t words;          /* whole ones */
    int tail;               /* bytes of the last, if it is not whole */
    const float *left, *right; /* NULL: unscaled */
    const int32_t *offset, *total; /* of rows of A, and the sums of rows of B; integers with zero points only */
    const int32_t *start;          /* what the sum of each row of B begins with; other integers only */
    int more, add;          /* sums go on from, or numbers are added to, what an earlier call left */
    int last;               /* whether the stretch ends here */
} Stretch;

/* Up to `columns` rows of B: sums[column][STRIP] becomes sums or, at the end of a stretch, numbers. */
INLINE AVX512_DOTS void tile(int kind, int vectors, int columns, const Stretch *s, int64_t j0, int64_t n,
                             __m512i *sums) {
    __m512i sum[12][PANEL]; /* at most 24 of them are live, in registers: both counts are constants once inlined */
    const char *row[12];
    UNROLL for (int j = 0; j < columns; j++) {
        row[j] = s->b + least(j0 + j, n - 1) * s->ldb; /* beyond n, the last again */
        UNROLL for (int v = 0; v < vectors; v++)
            sum[j][v] = s->more                            ? sums[(j0 + j) * PANEL + v]
                        : kind == INTEGERS && s->start != NULL ? _mm512_set1_epi32(s->start[j0 + j])
                                                               : _mm512_setzero_si512();
    }
    const __m512i *panel = s->panel;
    const int64_t words = s->words;
    for (int64_t w = 0; w < words; w++, panel += vectors)
        UNROLL for (int j = 0; j < columns; j++) {
            int32_t word;
            memcpy(&word, row[j] + 4 * w, 4);
            const __m512i words_of_b = _mm512_set1_epi32(word);
            UNROLL for (int v = 0; v < vectors; v++) sum[j][v] = dot(kind, sum[j][v], panel[v], words_of_b);
        }
    if (s->tail)
        UNROLL for (int j = 0; j < columns; j++) {
            uint32_t word = 0;
            for (int i = 0; i < s->tail; i++) word |= (uint32_t)(uint8_t)row[j][4 * words + i] << (8 * i);
            UNROLL for (int v = 0; v < vectors; v++)
                sum[j][v] = dot(kind, sum[j][v], panel[v], _mm512_set1_epi32((int32_t)word));
        }
    UNROLL for (int j = 0; j < columns; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            __m512i *out = sums + (j0 + j) * PANEL + v;
            if (!s->last) {
                *out = sum[j][v];
                continue;
            }
            if (kind == INTEGERS && !s->start)
                sum[j][v] = _mm512_sub_epi32(sum[j][v], _mm512_mullo_epi32(_mm512_loadu_si512(s->offset + v * LANES),
                                                                           _mm512_set1_epi32(s->total[j0 + j])));
            __m512 y = number(kind, sum[j][v]);
            if (s->left) {
                y = _mm512_mul_ps(y, _mm512_loadu_ps(s->left + v * LANES));
                y = _mm512_mul_ps(y, _mm512_set1_ps(s->right[j0 + j]));
            }
            *out = _mm512_castps_si512(s->add ? _mm512_add_ps(_mm512_castsi512_ps(*out), y) : y);
        }
}

INLINE AVX512_DOTS __m256i to_bfloat16s(__m512 y) {
    /* the instruction takes subnormals for zero: 0, normal, infinite and quiet NaN are its own */
    if (!_mm512_fpclass_ps_mask(y, 0x20 | 0x80)) return (__m256i)_mm512_cvtneps_pbh(y);
    const __m512i u = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(1 << 22));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}

INLINE AVX512_DOTS void store(void *c, int out, int64_t at, __mmask16 mask, __m512 y) {
    if (out == F32) _mm512_mask_storeu_ps((float *)c + at, mask, y);
    else _mm256_mask_storeu_epi16((uint16_t *)c + at, mask, out == BF16 ? to_bfloat16s(y) : _mm512_cvtps_ph(y, 0));
}

/* Numbers of a strip and a lot, turned and with the bias, to C. */
AVX512_DOTS static void finish(const Product *p, const __m512i *sums, int64_t i0, int vectors, int64_t j0) {
    for (int64_t j = 0; j < LOT && j0 + j < p->n; j += LANES) {
        const int64_t columns = least(p->n - j0 - j, LANES);
        const __mmask16 mask = (1u << columns) - 1;
        const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(mask, p->bias + j0 + j) : _mm512_setzero_ps();
        for (int v = 0; v < vectors; v++) {
            __m512i r[16];
            UNROLL for (int i = 0; i < 16; i++) r[i] = sums[(j + i) * PANEL + v];
            transpose(r);
            UNROLL for (int i = 0; i < 16; i++) {
                const int64_t row = i0 + v * LANES + i;
                if (row >= p->m) break;
                __m512 y = _mm512_castsi512_ps(r[i]);
                if (p->bias) y = _mm512_add_ps(y, bias);
                store(p->c, p->out, row * p->n + j0 + j, mask, y);
            }
        }
    }
}

/* Decodes n rows of codes of B: words of stretch after stretch, rows `ld` bytes apart. */
AVX512_DOTS static void decode_lot(const Product *p, int64_t j0, int64_t n, char *to, int64_t ld) {
    const Table table = table_of(p->b_table);
    const int64_t words = words_of(FLOATS, p->stretch);
    for (int64_t j = 0; j < n; j++)
        for (int64_t s = 0; s < stretches_of(p); s++) {
            const uint8_t *from = (const uint8_t *)p->b + (j0 + j) * p->ldb + s * p->stretch;
            const int64_t k = least(p->k - s * p->stretch, p->stretch);
            char *out = to + j * ld + 4 * s * words; /* whole vectors: the next stretch, or slack, takes the excess */
            for (int64_t i = 0; i < k; i += 32) _mm512_storeu_si512(out + 2 * i, load_codes(table, from + i, k - i));
        }
}

/* The sums of rows of B over each stretch: totals[stretch][LOT]. */
AVX512_DOTS static void sum_lot(const Product *p, int64_t j0, int64_t n, int32_t *totals) {
    for (int64_t s = 0; s < stretches_of(p); s++)
        for (int64_t j = 0; j < n; j++) {
            const uint8_t *row = (const uint8_t *)p->b + (j0 + j) * p->ldb + s * p->stretch;
            const int64_t k = least(p->k - s * p->stretch, p->stretch);
            __m512i sum = _mm512_setzero_si512();
            for (int64_t i = 0; i < k; i += 64)
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), load8(row + i, k - i));
            totals[s * LOT + j] = _mm512_reduce_add_epi32(sum);
        }
}

/* Where the packed strips are. */
typedef struct {
    __m512i *panels;
    float *lefts;
    int32_t *offsets;
    int64_t vectors, strips, words; /* words: of a whole row */
} Packed;

/* One lot of B against strips first to last. */
INLINE AVX512_DOTS void lot(int kind, const Product *p, const Packed *a, int64_t j0, int64_t first,
                            int64_t last, char *scratch) {
    const int64_t n = least(p->n - j0, LOT), stretches = stretches_of(p), words = words_of(kind, p->stretch);
    const int64_t size = kind == INTEGERS ? 1 : 2;
    __m512i sums[LOT * PANEL];
    float *rights = (float *)scratch;
    int32_t *totals = (int32_t *)(rights + stretches * LOT);
    char *decoded = (char *)(totals + stretches * LOT);
    const char *b = (const char *)p->b + j0 * p->ldb * size;
    const int64_t ld = p->b_table ? (4 * a->words + 64 + 127) / 128 * 128 + 64 : p->ldb * size; /* no power of two */
    if (p->b_table) decode_lot(p, j0, n, decoded, ld);
    if (kind == INTEGERS) sum_lot(p, j0, n, totals);
    for (int64_t s = 0; s < stretches; s++)
        for (int64_t j = 0; j < LOT; j++) {
            rights[s * LOT + j] = j < n && p->right ? p->right[(j0 + j) / p->right_rows * p->right_row + s / p->right_span] : 0;
            if (j >= n) totals[s * LOT + j] = 0;
            if (!p->zeros) totals[s * LOT + j] *= p->flip ? -128 : 0;
        }
    for (int64_t strip = first; strip < last; strip++) {
        const int64_t v0 = strip_start(strip, a->strips, a->vectors);
        const int vectors = (int)(strip_start(strip + 1, a->strips, a->vectors) - v0);
        for (int64_t s = 0; s < stretches; s++) {
            const int64_t k = least(p->k - s * p->stretch, p->stretch);
            const int64_t whole = p->b_table ? words_of(kind, k) : k * size / 4;
            const int64_t depth = stretches == 1 ? DEPTH : whole + 1;
            for (int64_t w = 0; w < whole || w == 0; w += depth) {
                Stretch part = {
                    .panel = a->panels + v0 * a->words + (s * words + w) * vectors,
                    .b = (p->b_table ? decoded + 4 * s * words : b + s * p->stretch * size) + 4 * w,
                    .ldb = ld,
                    .words = least(whole - w, depth),
                    .left = p->left ? a->lefts + (strip * stretches + s) * STRIP : NULL,
                    .right = rights + s * LOT,
                    .offset = a->offsets + (strip * stretches + s) * STRIP,
                    .total = totals + s * LOT,
                    .start = p->zeros ? NULL : totals + s * LOT,
                    .more = w > 0,
                    .add = s > 0,
                    .last = w + depth >= whole,
                };
                part.tail = part.last && !p->b_table ? (int)(k * size % 4) : 0;
#define TILES(V, N) \
    for (int64_t j = 0; j < n; j += N) tile(kind, V, N, &part, j, n, sums)
                switch (vectors) {
                case 1: TILES(1, 12); break;
                case 2: TILES(2, 12); break;
                case 3: TILES(3, 8); break;
                }
            }
        }
        finish(p, sums, v0 * LANES, vectors, j0);
    }
}
AVX512_DOTS static void lot_of_floats(const Product *p, const Packed *a, int64_t j0, int64_t first,
                                      int64_t last, char *scratch) {
    lot(FLOATS, p, a, j0, first, last, scratch);
}
AVX512_DOTS static void lot_of_integers(const Product *p, const Packed *a, int64_t j0, int64_t first,
                                        int64_t last, char *scratch) {
    lot(INTEGERS, p, a, j0, first, last, scratch);
}

/* The sums of sixteen vectors. */
INLINE AVX512_DOTS __m512i sums_of(int kind, __m512i r[16]) {
    transpose(r);
#define FOLD(half) UNROLL for (int i = 0; i < half; i++) r[i] = sum_of(kind, r[i], r[i + half])
    FOLD(8);
    FOLD(4);
    FOLD(2);
    FOLD(1);
    return r[0];
}

/* For few rows of A against some of B, along k, at the speed B comes from memory. rows * columns is at most 16.
 * SIGNED are integers as they are: B's sign bits are turned, and 128 times the sum of A comes out again. */
enum { SIGNED = REALS + 1 };

INLINE AVX512_DOTS void dots(int kind, int coded, int rows, int columns, const Product *p, const char *a, int64_t lda,
                             int64_t j0) {
    const int whole = kind == INTEGERS || kind == SIGNED;
    const int64_t size = whole ? 1 : kind == FLOATS ? 2 : 4, step = 64 / size, n = p->n - j0;
    const int64_t bytes = coded || kind == REALS ? 1 : size;
    const __m512i one = _mm512_set1_epi8(1), flip = _mm512_set1_epi8((char)0x80);
    __m512 y = _mm512_setzero_ps(); /* of i, j at i * columns + j, as all below */
    Table table;
    if (coded) table = table_of(p->b_table);
    for (int64_t s = 0; s < stretches_of(p); s++) {
        __m512i sum[16], total[8], ones[4];
        const char *left[4], *right[16];
        const int64_t k = least(p->k - s * p->stretch, p->stretch);
        UNROLL for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
        UNROLL for (int j = 0; j < 8; j++) total[j] = _mm512_setzero_si512();
        UNROLL for (int i = 0; i < rows; i++) {
            left[i] = a + least(i, p->m - 1) * lda + s * p->stretch * size;
            ones[i] = _mm512_setzero_si512();
        }
        UNROLL for (int j = 0; j < columns; j++)
            right[j] = (const char *)p->b + ((j0 + least(j, n - 1)) * p->ldb + s * p->stretch) * bytes;
        for (int64_t c = 0; c < k; c += step) {
            __m512i x[4];
            UNROLL for (int i = 0; i < rows; i++) {
                x[i] = kind == FLOATS  ? load16((const uint16_t *)left[i] + c, k - c)
                       : kind == REALS ? load_floats((const float *)left[i] + c, k - c)
                                       : load8((const uint8_t *)left[i] + c, k - c);
                if (kind == SIGNED) ones[i] = _mm512_dpbusd_epi32(ones[i], one, x[i]);
            }
            UNROLL for (int j = 0; j < columns; j++) {
                __m512i w;
                if (kind == REALS) w = load_reals(coded, table, (const uint8_t *)right[j] + c, k - c);
                else if (coded) w = load_codes(table, (const uint8_t *)right[j] + c, k - c);
                else if (kind == FLOATS) w = load16((const uint16_t *)right[j] + c, k - c);
                else w = load8((const uint8_t *)right[j] + c, k - c);
                _mm_prefetch(right[j] + c * bytes + AHEAD, _MM_HINT_T0);
                if (kind == INTEGERS) total[j] = _mm512_dpbusd_epi32(total[j], one, w);
                if (kind == SIGNED) w = _mm512_xor_si512(w, flip);
                UNROLL for (int i = 0; i < rows; i++) {
                    __m512i *const at = sum + i * columns + j;
                    *at = kind == SIGNED ? _mm512_dpbusd_epi32(*at, w, x[i]) : dot(kind, *at, x[i], w);
                }
            }
        }
        int32_t offset[16], totals[16] = {0};
        float lefts[16], rights[16];
        if (kind == INTEGERS)
            UNROLL for (int j = 0; j < columns; j++) totals[j] = _mm512_reduce_add_epi32(total[j]);
        UNROLL for (int i = 0; i < rows; i++) {
            const int64_t at = least(i, p->m - 1) * p->left_row + s / p->left_span;
            const int32_t zero = (p->flip ? 128 : 0) + (p->zeros ? p->zeros[at] : 0);
            const int32_t shift = kind == SIGNED ? 128 * _mm512_reduce_add_epi32(ones[i]) : 0;
            UNROLL for (int j = 0; j < columns; j++) {
                const int64_t row = (j0 + least(j, n - 1)) / p->right_rows;
                lefts[i * columns + j] = p->left ? p->left[at] : 1;
                rights[i * columns + j] = p->right ? p->right[row * p->right_row + s / p->right_span] : 1;
                offset[i * columns + j] = kind == INTEGERS ? (int32_t)((uint32_t)zero * (uint32_t)totals[j]) : shift;
            }
        }
        __m512i found = sums_of(whole ? INTEGERS : FLOATS, sum);
        if (whole) found = _mm512_sub_epi32(found, _mm512_loadu_si512(offset));
        __m512 part = number(whole ? INTEGERS : FLOATS, found);
        if (p->left) part = _mm512_mul_ps(_mm512_mul_ps(part, _mm512_loadu_ps(lefts)), _mm512_loadu_ps(rights));
        y = s ? _mm512_add_ps(y, part) : part;
    }
    float all[16];
    _mm512_storeu_ps(all, y);
    const __mmask16 mask = (1u << least(n, columns)) - 1;
    for (int i = 0; i < rows && i < p->m; i++) {
        __m512 numbers = _mm512_maskz_loadu_ps(mask, all + i * columns);
        if (p->bias) numbers = _mm512_add_ps(numbers, _mm512_maskz_loadu_ps(mask, p->bias + j0));
        store(p->c, p->out, i * p->n + j0, mask, numbers);
    }
}

/* For one row, which takes `COLUMNS` of B at a time, and for up to FEW, which take 4. */
#define DOTS(NAME, KIND, CODED, COLUMNS)                                                                             \
    AVX512_DOTS static void NAME##_row(const Product *p, const char *a, int64_t lda, int64_t from, int64_t to) {     \
        for (int64_t j = from; j < to; j += COLUMNS) dots(KIND, CODED, 1, COLUMNS, p, a, lda, j);                    \
    }                                                                                                                \
    AVX512_DOTS static void NAME(const Product *p, const char *a, int64_t lda, int64_t from, int64_t to) {           \
        for (int64_t j = from; j < to; j += 4) dots(KIND, CODED, FEW, 4, p, a, lda, j);                              \
    }
DOTS(dots_of_floats, FLOATS, 0, 16)
DOTS(dots_of_codes, FLOATS, 1, 8)
DOTS(dots_of_integers, INTEGERS, 0, 8)
DOTS(dots_of_signed, SIGNED, 0, 16)
DOTS(dots_of_reals, REALS, 0, 16)
DOTS(dots_of_reals_and_codes, REALS, 1, 8)

typedef void Dots(const Product *, const char *, int64_t, int64_t, int64_t);

static Dots *dots_for(const Product *p) {
#define EITHER(name) (p->m == 1 ? name##_row : name)
    if (p->kind == INTEGERS) return p->flip && !p->zeros ? EITHER(dots_of_signed) : EITHER(dots_of_integers);
    if (p->kind == REALS) return p->b_table ? EITHER(dots_of_reals_and_codes) : EITHER(dots_of_reals);
    return p->b_table ? EITHER(dots_of_codes) : EITHER(dots_of_floats);
}

/* A few rows of A as they are multiplied: bfloat16s or unsigned bytes, rows `lda` bytes apart. */
AVX512_DOTS static void unfold(const Product *p, char *restrict to, int64_t lda) {
    const int64_t k = p->k;
    const uint8_t flip = p->zeros ? (uint8_t)p->flip : 0; /* dots_of_signed wants none */
    for (int64_t i = 0; i < p->m; i++, to += lda) {
        const uint8_t *from = (const uint8_t *)p->a + i * p->lda;
        if (p->kind == REALS) memcpy(to, (const float *)p->a + i * p->lda, 4 * k);
        else if (p->kind == INTEGERS)
            for (int64_t j = 0; j < k; j++) to[j] = (char)(from[j] ^ flip);
        else if (p->a_table)
            for (int64_t j = 0; j < k; j++) ((uint16_t *)to)[j] = p->a_table[from[j]];
        else memcpy(to, (const uint16_t *)p->a + i * p->lda, 2 * k);
    }
}

/* 0, or 1: there was no memory, a zero point is no code, and sums may exceed 32 bits, or REALS has many rows.
 * `rows`: how A's codes are made, if they are not there yet; they have scales of their own. */
int octavo_product(const Product *p, const Rows *rows, int isa, int threads) {
    const int64_t work = p->m * p->n * p->k;
    const int64_t zeros = p->zeros && !rows ? (p->left_row ? p->m : 1) * ((stretches_of(p) - 1) / p->left_span + 1) : 0;
    for (int64_t i = 0; i < zeros; i++)
        if (p->zeros[i] != (p->flip ? (int8_t)p->zeros[i] : (uint8_t)p->zeros[i])) return 1;
    if (p->m <= FEW) {
        const int64_t lda = (p->k * (p->kind == REALS ? 4 : 2) + 63) / 64 * 64, lots = (p->n + LOT - 1) / LOT;
        char *a = aligned_alloc(64, p->m * lda + 64);
        if (!a || (rows && octavo_quantize_rows(rows, isa, threads))) return free(a), 1;
        unfold(p, a, lda);
        Dots *const run = dots_for(p);
        if (work <= 1 << 17) { /* a team takes microseconds */
            run(p, a, lda, 0, p->n);
        } else {
#pragma omp parallel for schedule(static) num_threads(threads)
            for (int64_t t = 0; t < lots; t++) run(p, a, lda, t * LOT, least(p->n, (t + 1) * LOT));
        }
        free(a);
        return 0;
    }
    if (p->kind == REALS) return 1;
    Packed a = {.vectors = (p->m + LANES - 1) / LANES};
    a.strips = (a.vectors + PANEL - 1) / PANEL;
    const int64_t stretches = stretches_of(p);
    a.words = stretches * words_of(p->kind, p->stretch);
    const int64_t lots = (p->n + LOT - 1) / LOT;
    /* where there are fewer lots than threads, the strips are dealt out too */
    const int64_t shares = least(a.strips, (threads + lots - 1) / lots);
    const int64_t panels = a.vectors * a.words * sizeof(__m512i), scales = a.strips * stretches * STRIP * 4;
    const int64_t decoded = p->b_table ? LOT * (4 * a.words + 64 + 192) + 64 : 64;
    const int64_t scratch = (stretches * LOT * 8 + decoded + 4095) / 4096 * 4096 + 64;
    const int64_t buffer = rows ? 4 * octavo_row_buffer(rows) : 0;
    char *memory = aligned_alloc(64, panels + 2 * scales + threads * (scratch + buffer));
    if (!memory) return 1;
    a.panels = (__m512i *)memory;
    a.lefts = (float *)(memory + panels);
    a.offsets = (int32_t *)(memory + panels + scales);
    char *const scratches = memory + panels + 2 * scales, *const buffers = scratches + threads * scratch;
    int64_t taken = 0, packed = 0;
#pragma omp parallel num_threads(threads) if (work > 1 << 20)
    {
        /* no barrier: on a busy machine the others may not have begun, and who is here does it all */
        for (int64_t v; (v = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < a.vectors;) {
            const int64_t from = v * LANES;
            if (rows)
                octavo_quantize_some(rows, from, least(from + LANES, p->m), (float *)(buffers + THREAD * buffer), isa);
            int64_t s = v * a.strips / a.vectors; /* the strip that v is in */
            while (s + 1 < a.strips && strip_start(s + 1, a.strips, a.vectors) <= v) s++;
            const int64_t first = strip_start(s, a.strips, a.vectors);
            pack(p, first * LANES, (int)(v - first), (int)(strip_start(s + 1, a.strips, a.vectors) - first),
                 a.panels + first * a.words, a.lefts + s * stretches * STRIP, a.offsets + s * stretches * STRIP);
            __atomic_fetch_add(&packed, 1, __ATOMIC_RELEASE);
        }
        while (__atomic_load_n(&packed, __ATOMIC_ACQUIRE) < a.vectors) sched_yield();
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t t = 0; t < lots * shares; t++) {
            char *const mine = scratches + THREAD * scratch;
            const int64_t share = t % shares, first = share * a.strips / shares, last = (share + 1) * a.strips / shares;
            (p->kind == INTEGERS ? lot_of_integers : lot_of_floats)(p, &a, t / shares * LOT, first, last, mine);
        }
    }
    free(memory);
    return 0;
}

#else /* never called: octavo_isa() says SCALAR */
int octavo_product(const Product *p, const Rows *rows, int isa, int threads) { return 1; }
#endif
