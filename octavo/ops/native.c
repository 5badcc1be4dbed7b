/* Octavo's CPU kernels: the cast onto a number grid, codes and back, and a bfloat16 matrix product.
 *
 * Plain C11 without torch's headers, so that any `cc` builds it in a second or two. One file serves every x86-64:
 * a kernel is compiled once per instruction set by __attribute__((target)) and chosen at run time; any other
 * machine gets the scalar path. native.py compiles and calls; the law each kernel obeys is written there. */
#define _DEFAULT_SOURCE /* madvise */
#include <stdint.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define WIDE
#else
#define WIDE ",prefer-vector-width=512" /* gcc would halve AVX-512's vectors */
#endif

#define INLINE static inline __attribute__((always_inline))

#define SIGN 0x80000000u

enum { SCALAR, AVX2, AVX512, AVX512_BF16 };

int octavo_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return SCALAR;
}

/* ---- cast -------------------------------------------------------------------------------------------------------
 *
 * A number is rounded without leaving its bit pattern. For the magnitude u of a float32 read as an integer, going
 * one quantum up is adding 2^drop to u, where `drop` counts the low bits of the significand the grid has no room
 * for; the carry walks into the exponent by itself. Only integers are touched, hence float32 subnormals are exact,
 * whatever the process says about flush-to-zero. The sign bit is shifted out at the top, which leaves one spare bit
 * at the bottom: drop is then at least 1 and half a quantum always is an integer. */

typedef struct {
    int32_t mantissa, emin, qmin;      /* exponents plus 127; qmin: of the smallest quantum (emin: no subnormals) */
    uint32_t step;                     /* 2^qmin, shifted */
    uint32_t nearest, tie;             /* all ones: round to nearest; ties go to even rather than away */
    uint32_t parity;                   /* 0: no mantissa bits, and the number is even whose exponent field is */
    uint32_t away[2];                  /* all ones: positive, negative magnitudes round up */
    uint32_t limit[2];                 /* the first shifted magnitude that overflows, positive and negative */
    uint32_t overflow[2], infinite[2]; /* what an overflow and what an infinity become */
    uint32_t bottom, least;            /* low > 0, a grid without zero: shifted magnitudes under bottom become least */
    uint32_t zero_sign;                /* the sign bit, if the grid has a -0 */
} Grid;

INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* `condition ? a : b` as arithmetic: written as a choice, gcc makes paths of it and vectorises them badly. */
#define CHOOSE(condition, a, b) ((b) ^ (((a) ^ (b)) & -(uint32_t)(condition)))

INLINE uint32_t cast_one(uint32_t x, float noise, int stochastic, Grid g) {
    const uint32_t u = x << 1;
    const int negative = x > SIGN; /* but not -0 */
    /* exponents of the number (a subnormal's by way of a conversion) and of the lowest bit of u, both plus 127 */
    const uint32_t field = u >> 24, subnormal = field == 0;
    const int32_t e = CHOOSE(subnormal, (bits_of((float)(int32_t)u) >> 23) - 150, field);
    const int32_t lowest = field + subnormal - 24;
    const int32_t quantum = CHOOSE(e >= g.emin, e - g.mantissa, g.qmin);
    const uint32_t far = quantum - lowest;
    const uint32_t drop = far > 31 ? 31 : far;
    uint32_t significand = (u & 0xFFFFFF) | (1 - subnormal) << 24;

    uint32_t add; /* what makes the remainder reach 2^drop exactly when the magnitude goes up */
    if (stochastic) {
        significand >>= far - drop > 31 ? 31 : far - drop; /* noise has no bits left where these are: nothing is lost */
        add = (uint32_t)(int32_t)(noise * float_of((127 + drop) << 23));
    } else {
        const uint32_t half = 1u << (drop - 1);
        const uint32_t odd = significand >> drop & ((uint32_t)(e - g.emin + 1) | g.parity) & 1;
        add = ((half - (g.tie & (odd ^ 1))) & g.nearest) | ((2 * half - 1) & CHOOSE(negative, g.away[1], g.away[0]));
    }
    /* where drop > 24, the quantum lies above the leading bit: the result is 0 or 2^qmin */
    const uint32_t least = -(uint32_t)((significand + add) >> drop != 0) & g.step;
    const uint32_t y = CHOOSE(drop > 24, least, (u + add) & (-1u << drop));

    const uint32_t signs = CHOOSE(y != 0, SIGN, g.zero_sign);
    const uint32_t inside = CHOOSE(y < g.bottom, g.least, y >> 1 | (x & signs));
    const uint32_t outside = CHOOSE(u == 0xFF000000u, CHOOSE(negative, g.infinite[1], g.infinite[0]),
                                    CHOOSE(negative, g.overflow[1], g.overflow[0]));
    const uint32_t result = CHOOSE(y >= CHOOSE(negative, g.limit[1], g.limit[0]), outside, inside);
    return CHOOSE(u > 0xFF000000u, x | 0x00400000u, result);
}

INLINE uint16_t to_bfloat16(uint32_t x) {
    const uint32_t rounded = x + 0x7FFF + (x >> 16 & 1);
    return (uint16_t)(CHOOSE((x << 1) > 0xFF000000u, x, rounded) >> 16);
}

#define SAME(x) (x)
#define WIDEN(x) ((uint32_t)(x) << 16)
#define LOOP(NAME, TARGET, TYPE, NOISY, LOAD, STORE)                                                        \
    TARGET static void NAME(const void *x, const float *noise, void *y, int64_t n, const Grid *grid) {      \
        const Grid g = *grid; /* a copy: what is written through `out` cannot be thought to change it */    \
        const TYPE *restrict in = x;                                                                        \
        TYPE *restrict out = y;                                                                             \
        (void)noise;                                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                                 \
            out[i] = STORE(cast_one(LOAD(in[i]), NOISY ? noise[i] : 0, NOISY, g));                          \
    }
/* One instruction set's four casts, and its row in the table: [bfloat16?][noise?]. */
#define CASTS(ISA, TARGET)                                             \
    LOOP(f32_##ISA, TARGET, uint32_t, 0, SAME, SAME)                   \
    LOOP(f32_noise_##ISA, TARGET, uint32_t, 1, SAME, SAME)             \
    LOOP(bf16_##ISA, TARGET, uint16_t, 0, WIDEN, to_bfloat16)          \
    LOOP(bf16_noise_##ISA, TARGET, uint16_t, 1, WIDEN, to_bfloat16)
#define ROW(ISA) {{f32_##ISA, f32_noise_##ISA}, {bf16_##ISA, bf16_noise_##ISA}}

typedef void Cast(const void *, const float *, void *, int64_t, const Grid *);
CASTS(scalar, )
#if defined(__x86_64__)
CASTS(avx2, __attribute__((target("avx2"))))
CASTS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE))))
static Cast *const casts[][2][2] = {ROW(scalar), ROW(avx2), ROW(avx512), ROW(avx512)};
#else
static Cast *const casts[][2][2] = {ROW(scalar)};
#endif

/* A large result comes from the system as untouched pages: first writes to 4 KiB ones cost more than all else here. */
static void prefer_huge_pages(void *p, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)p + huge - 1) & -huge, last = ((uintptr_t)p + bytes) & -huge;
    if (bytes >= 8 << 20) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

/* `isa` is octavo_isa() or, in a test, less. Every element is on its own: threads cannot change the result. */
void octavo_cast(const void *x, const float *noise, void *y, int64_t n, int bf16, const Grid *g, int isa, int threads) {
    enum { BLOCK = 16384 };
    Cast *const cast = casts[isa][bf16][noise != NULL];
    const int64_t size = bf16 ? 2 : 4;
    prefer_huge_pages(y, n * size);
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 2 * BLOCK)
    for (int64_t i = 0; i < n; i += BLOCK)
        cast((const char *)x + i * size, noise ? noise + i : NULL, (char *)y + i * size,
             n - i < BLOCK ? n - i : BLOCK, g);
}

/* ---- encode: numbers that lie on a grid of at most 8 bits, as codes -----------------------------------------------
 *
 * A normal number's code is the top of its float32 pattern with the bias exchanged (`rebias`); below `least`, the
 * smallest normal number, it counts steps of the smallest subnormal. `inf` and `nan` are codes, 0 where there is none. */

void octavo_encode8(const float *x, uint8_t *y, int64_t n, int mantissa, int rebias, float least, float steps, int sign,
                    int inf, int nan, int nan_sign, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (n > 1 << 15)
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        const uint32_t magnitude = bits & ~SIGN;
        float size;
        memcpy(&size, &magnitude, 4);
        int32_t code = (int32_t)(magnitude >> (23 - mantissa)) - rebias;
        const int32_t count = (int32_t)(size < least ? size * steps : 0);
        code = size < least ? count : code;
        code = magnitude == 0x7f800000u ? inf : code;
        int32_t negative = bits & SIGN ? sign : 0;
        negative = magnitude > 0x7f800000u && !nan_sign ? 0 : negative;
        code = magnitude > 0x7f800000u ? nan : code;
        y[i] = (uint8_t)(code | negative);
    }
}

/* ---- decode: one of 256 values, two bytes wide, for every code -------------------------------------------------- */

void octavo_decode16(const uint8_t *codes, const uint16_t *table, uint16_t *y, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 1 << 15)
    for (int64_t i = 0; i < n; i++) y[i] = table[codes[i]];
}

/* ---- gemm -------------------------------------------------------------------------------------------------------
 *
 * C[m, n] = sum over k of A[m, k] * B[n, k], bfloat16 in, float32 out, by vdpbf16ps: sixteen lanes of float32, each
 * taking two products a step. B, the weight, is large and read where it lies; A, the activations, is repacked: the
 * vector lanes are rows of A, and a pair of neighbours in a row of B is broadcast to all of them. A panel of A is up
 * to 48 rows by DEPTH columns and stays in the second-level cache while rows of B stream past. No thread
 * count changes a result; but strips of few rows are summed in another order (dots), so a row's last bits can depend
 * on how many rows come with it. */
#if defined(__x86_64__)

#define AVX512_BF16_CODE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define UNROLL _Pragma("GCC unroll 16")
enum { LANES = 16, DEPTH = 2048, PANEL = 3, FEW = 12 }; /* DEPTH and PANEL: columns, and rows in vectors, of a panel */

INLINE AVX512_BF16_CODE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* Up to 32 bfloat16s, zeros beyond n. */
INLINE AVX512_BF16_CODE __m512i load(const uint16_t *p, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
}

/* Turns rows into columns, for 16 by 16 words: by ones and twos within quarters, then the quarters. */
INLINE AVX512_BF16_CODE void transpose(__m512i r[16]) {
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

/* Lays m rows and k columns of A out as panel[k / 2][vectors * LANES] pairs; absent rows and an odd last half are 0. */
AVX512_BF16_CODE static void pack(__m512i *panel, int vectors, const uint16_t *a, int64_t lda, int64_t m, int64_t k) {
    for (int v = 0; v < vectors; v++)
        for (int64_t j = 0; j < k; j += 32) {
            __m512i r[16];
            UNROLL for (int i = 0; i < 16; i++)
                r[i] = v * LANES + i < m ? load(a + (v * LANES + i) * lda + j, k - j) : _mm512_setzero_si512();
            transpose(r);
            UNROLL for (int i = 0; i < 16; i++) panel[(j / 2 + i) * vectors + v] = r[i];
        }
}

/* A panel times `columns` rows of B: one tile of C, m by n, set or added to. Rows of B from n on repeat the last. */
INLINE AVX512_BF16_CODE void tile(int vectors, int columns, const __m512i *panel, const uint16_t *b, int64_t ldb,
                                  float *c, int64_t ldc, int64_t m, int64_t n, int64_t k, int add) {
    __m512 sum[12][PANEL]; /* at most 24 of them are live, in registers: both counts are constants once inlined */
    const uint16_t *row[12];
    UNROLL for (int j = 0; j < columns; j++) {
        row[j] = b + (j < n ? j : n - 1) * ldb;
        UNROLL for (int v = 0; v < vectors; v++) sum[j][v] = _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < k / 2; p++)
        UNROLL for (int j = 0; j < columns; j++) {
            int32_t pair;
            memcpy(&pair, row[j] + 2 * p, 4);
            UNROLL for (int v = 0; v < vectors; v++)
                sum[j][v] = dot(sum[j][v], panel[p * vectors + v], _mm512_set1_epi32(pair));
        }
    if (k % 2)
        UNROLL for (int j = 0; j < columns; j++)
            UNROLL for (int v = 0; v < vectors; v++)
                sum[j][v] = dot(sum[j][v], panel[k / 2 * vectors + v], _mm512_set1_epi32(row[j][k - 1]));

    const __mmask16 mask = (1u << (n < columns ? n : columns)) - 1;
    UNROLL for (int v = 0; v < vectors; v++) {
        __m512i r[16];
        UNROLL for (int j = 0; j < 16; j++)
            r[j] = j < columns ? _mm512_castps_si512(sum[j < columns ? j : 0][v]) : _mm512_setzero_si512();
        transpose(r);
        UNROLL for (int i = 0; i < 16; i++) {
            if (v * LANES + i >= m) break;
            float *out = c + (v * LANES + i) * ldc;
            __m512 y = _mm512_castsi512_ps(r[i]);
            if (add) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, out));
            _mm512_mask_storeu_ps(out, mask, y);
        }
    }
}

/* For FEW rows of A: up to four of them against four of B, along k, at the speed B comes from memory. */
INLINE AVX512_BF16_CODE void dots(int rows, const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                                  int64_t ldc, int64_t m, int64_t n, int64_t k) {
    __m512 sum[4][4];
    const uint16_t *left[4], *right[4];
    UNROLL for (int j = 0; j < 4; j++) right[j] = b + (j < n ? j : n - 1) * ldb;
    UNROLL for (int i = 0; i < rows; i++) {
        left[i] = a + (i < m ? i : m - 1) * lda;
        UNROLL for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < k; p += 32) {
        __m512i y[4];
        UNROLL for (int j = 0; j < 4; j++) y[j] = load(right[j] + p, k - p);
        UNROLL for (int i = 0; i < rows; i++) {
            const __m512i x = load(left[i] + p, k - p);
            UNROLL for (int j = 0; j < 4; j++) sum[i][j] = dot(sum[i][j], x, y[j]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < 4; j++)
            if (i < m && j < n) c[i * ldc + j] = _mm512_reduce_add_ps(sum[i][j]);
}

/* One panel's worth of rows of A times n rows of B. */
AVX512_BF16_CODE static void strip(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                                   int64_t ldc, int64_t m, int64_t n, int64_t k) {
    static _Thread_local __m512i panel[DEPTH / 2 * PANEL];
    const int vectors = (int)((m + LANES - 1) / LANES);
    if (m <= FEW) {
        for (int64_t j = 0; j < n; j += 4)
            for (int64_t i = 0; i < m; i += m == 1 ? 1 : 4) {
                if (m == 1) dots(1, a, lda, b + j * ldb, ldb, c + j, ldc, 1, n - j, k);
                else dots(4, a + i * lda, lda, b + j * ldb, ldb, c + i * ldc + j, ldc, m - i, n - j, k);
            }
        return;
    }
    for (int64_t p = 0; p < k || p == 0; p += DEPTH) {
        const int64_t depth = k - p < DEPTH ? k - p : DEPTH;
        pack(panel, vectors, a + p, lda, m, depth);
#define TILES(V, N) \
    for (int64_t j = 0; j < n; j += N) tile(V, N, panel, b + j * ldb + p, ldb, c + j, ldc, m, n - j, depth, p > 0)
        switch (vectors) {
        case 1: TILES(1, 12); break;
        case 2: TILES(2, 12); break;
        case 3: TILES(3, 8); break;
        }
    }
}

/* Work is dealt out in strips of up to 48 rows, all alike, each cut along n into a part for every thread. */
void octavo_gemm_bf16(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c, int64_t m, int64_t n,
                      int64_t k, int threads) {
    const int64_t vectors = (m + LANES - 1) / LANES, strips = (vectors + PANEL - 1) / PANEL;
    const int64_t rows = strips ? (vectors + strips - 1) / strips * LANES : 0;
    int64_t width = ((n + threads - 1) / threads + 23) / 24 * 24; /* whole tiles, whatever their shape */
    width = width < 96 ? 96 : width;                              /* fewer would not repay packing A */
    const int64_t parts = (n + width - 1) / width;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (m * n * k > 1 << 20)
    for (int64_t t = 0; t < strips * parts; t++) {
        const int64_t i = t / parts * rows, j = t % parts * width;
        if (i < m) /* strips rounded up to whole vectors may leave none for the last */
            strip(a + i * lda, lda, b + j * ldb, ldb, c + i * n + j, n, m - i < rows ? m - i : rows,
                  n - j < width ? n - j : width, k);
    }
}

#else /* never called: octavo_isa() says SCALAR */
void octavo_gemm_bf16(void) {}
#endif
