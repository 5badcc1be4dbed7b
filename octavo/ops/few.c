/* Few rows of codes against many: along k, at the speed the many come from memory. */
#include "vectors.h"

#if defined(__x86_64__)

enum { AHEAD = 9216 }; /* bytes of B that are asked for before they are used */

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

/* A few rows of A against some of B. rows * columns is at most 16.
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

/* Each thread takes its own rows of B. */
int octavo_product_of_few(const Product *all, const Rows *rows, int isa, int threads) {
    Product p = *all;
    const int64_t lda = whole_lines(p.k * (p.kind == REALS ? 4 : 2)), lots = (p.n + LOT - 1) / LOT;
    char *a = aligned_alloc(64, p.m * lda + (rows ? whole_lines(p.m * p.k) : 0) + 64);
    if (!a) return 1;
    if (rows) {
        Rows r = *rows;
        p.a = r.codes = (uint8_t *)a + p.m * lda;
        if (octavo_quantize_rows(&r, isa, threads)) return free(a), 1;
    }
    unfold(&p, a, lda);
    Dots *const run = dots_for(&p);
    if (p.m * p.n * p.k <= 1 << 17) { /* a team takes microseconds */
        run(&p, a, lda, 0, p.n);
    } else {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t t = 0; t < lots; t++) run(&p, a, lda, t * LOT, least(p.n, (t + 1) * LOT));
    }
    free(a);
    return 0;
}

#else /* never called: octavo_isa() says SCALAR */
int octavo_product_of_few(const Product *p, const Rows *rows, int isa, int threads) { return 1; }
#endif
