/* Octavo's emulated accumulators: matrix products whose sums are rounded, aligned or clamped after every step.
 *
 * C[m, n] = the sum over k, ascending, of A[m, k] * B[n, k], float32 in and out. A tile is a few rows of A against a
 * panel of 32 rows of B, laid out column by column; vector lanes run along the panel, so every element of C keeps its
 * own accumulator in a register and is summed in its own order: no tile and no thread changes a result. The law is in
 * reference.py; what makes each step equal it is said at each step.
 *
 * The second half of this file is compiled once per instruction set: it includes itself. Vectors are those of GCC and
 * Clang (`vector_size`). Products are exact in the type they are computed in, so contracting a product and a sum to one
 * fused instruction changes nothing (native.py asks for that). */
#ifndef BYTES

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define GLUE2(a, b) a##_##b
#define GLUE(a, b) GLUE2(a, b)
#define MASK52 0x000FFFFFFFFFFFFF
#define FIELD 0x7FF0000000000000 /* a double's exponent */
#define GOLDEN 0x9E3779B97F4A7C15

enum { PANEL = 32, MOST_ROWS = 8 };
enum { NEAREST, DIRECTED, STOCHASTIC };                                  /* how the general tile rounds */
enum { NARROW, NARROW_SATURATE, NARROW_INFINITE, GENERAL, ALIGNED = GENERAL + 3, CLAMPED, KINDS }; /* tiles */

/* A grid to round sums to; `high` is its largest number, an overflow becomes over[0] or, negative, over[1]. */
typedef struct {
    int32_t mantissa, emin, flush, rounding;
    double high, over[2];
    double threshold[2]; /* DIRECTED: the fraction of a step, positive or negative, from which a number goes outward */
} Grid;

typedef struct {
    int64_t k, chunk;       /* chunk 0: one sum, no outer grid */
    Grid inner, outer;
    uint64_t seed;          /* STOCHASTIC */
    int32_t turned;         /* A and B have changed places: the seed must not */
    int32_t bits;           /* ALIGNED: of a term; chunk is the number of products that are aligned */
    int64_t promote;        /* ALIGNED: products after which the sum moves on to float32 */
    double low, high;       /* CLAMPED */
} Sum;

typedef void Tile(const Sum *, const float *const *rows, const float *b, int64_t m, int64_t n, double *out);

INLINE double power(int e) {
    const uint64_t u = (uint64_t)(e + 1023) << 52;
    double x;
    memcpy(&x, &u, 8);
    return x;
}

/* splitmix64 (Steele, Lea, Flood, OOPSLA 2014): the finalizer, and a key for each element. */
INLINE uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

INLINE uint64_t key(uint64_t seed, int64_t m, int64_t n) {
    return mix(mix(seed + GOLDEN * (m + 1)) + GOLDEN * (n + 1));
}

#define BYTES 16
#define ISA any
#define TARGET
#define ROWS 1
#include "accumulate.c"
#if defined(__x86_64__)
#define BYTES 32
#define ISA avx2
#define TARGET __attribute__((target("avx2")))
#define ROWS 2
#include "accumulate.c"
#define BYTES 64
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define ROWS 8
#include "accumulate.c"
static Tile *const *const tiles[] = {tiles_any, tiles_avx2, tiles_avx512, tiles_avx512}; /* by octavo_isa() */
static const int rows_of[] = {1, 2, 8, 8};
#else
static Tile *const *const tiles[] = {tiles_any};
static const int rows_of[] = {1};
#endif

/* What a matrix holds: the bits its significands need at most, its least and largest exponents (of numbers other than
 * zero; 255 and 0 if there are none), and whether any is subnormal, infinite or NaN. */
void octavo_survey(const uint32_t *x, int64_t n, int32_t found[4]) {
    uint32_t significands = 0, least = 255, most = 0, odd = 0;
#pragma omp simd reduction(| : significands, odd) reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = x[i] << 1, field = u >> 24;
        significands |= u;
        odd |= (field == 0 && u != 0) | (field == 255);
        least = u == 0 || least < field ? least : field;
        most = most > field ? most : field;
    }
    significands |= 1u << 24; /* the leading one */
    found[0] = 25 - __builtin_ctz(significands);
    found[1] = (int32_t)least - 127;
    found[2] = (int32_t)most - 127;
    found[3] = odd != 0;
}

/* `b` in panels: [n / 32, rounded up][k][32]. Results go to c[m][n]: float, or int32_t from the CLAMPED tile. */
void octavo_accumulate(const float *a, const float *b, void *c, int64_t m, int64_t n, const Sum *sum, int kind,
                       int isa, int threads) {
    Tile *const tile = tiles[isa][kind];
    const int rows = rows_of[isa], block = 8 * rows; /* rows of A that meet one panel while it is in the cache */
    const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + block - 1) / block;
#pragma omp parallel num_threads(threads) if (m * n * sum->k > 1 << 15)
    {
#if defined(__x86_64__)
        const unsigned state = _mm_getcsr();
        _mm_setcsr(0x1F80); /* nearest-even, subnormals kept, whatever the caller has set */
#endif
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < panels * blocks; t++) {
            const int64_t j = t / blocks * PANEL, first = t % blocks * block;
            const int64_t width = n - j < PANEL ? n - j : PANEL;
            for (int64_t i = first; i < first + block && i < m; i += rows) {
                const float *row[MOST_ROWS];
                double out[MOST_ROWS * PANEL] __attribute__((aligned(64)));
                for (int r = 0; r < rows; r++) row[r] = a + (i + r < m ? i + r : m - 1) * sum->k;
                tile(sum, row, b + j * sum->k, i, j, out);
                for (int r = 0; r < rows && i + r < m; r++) {
                    const int64_t place = (i + r) * n + j;
                    for (int64_t x = 0; x < width; x++) {
                        if (kind == CLAMPED) ((int32_t *)c)[place + x] = (int32_t)out[r * PANEL + x];
                        else ((float *)c)[place + x] = (float)(out[r * PANEL + x] + 0.0); /* -0 + 0 = +0 */
                    }
                }
            }
        }
#if defined(__x86_64__)
        _mm_setcsr(state);
#endif
    }
}

#else /* ---- once per instruction set ---- */

#define NAME(x) GLUE(x, ISA)
#define EACH(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < (n); i++)
#define FV (PANEL * 4 / BYTES) /* vectors of a panel in float32 */
#define DV (PANEL * 8 / BYTES) /* and in float64 */
#define DL (BYTES / 8)

typedef float NAME(F) __attribute__((vector_size(BYTES)));
typedef int32_t NAME(I) __attribute__((vector_size(BYTES)));
typedef uint32_t NAME(U) __attribute__((vector_size(BYTES)));
typedef double NAME(D) __attribute__((vector_size(BYTES)));
typedef int64_t NAME(L) __attribute__((vector_size(BYTES)));
typedef uint64_t NAME(W) __attribute__((vector_size(BYTES)));
typedef float NAME(H) __attribute__((vector_size(BYTES / 2)));
#define F NAME(F)
#define I NAME(I)
#define U NAME(U)
#define D NAME(D)
#define L NAME(L)
#define W NAME(W)
#define H NAME(H)

INLINE TARGET D NAME(widen)(const float *p) {
    H h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, D);
}

/* `a > b ? x : y`, lane by lane, which C has no word for; false where a or b is NaN. */
#if BYTES == 64
INLINE TARGET D NAME(choose)(D a, D b, D x, D y) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_GT_OQ), y, x);
}
INLINE TARGET F NAME(choose32)(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
INLINE TARGET F NAME(magic32)(F x, F least, F lowest, U shift) { /* one masked addition */
    const __m512i field = (__m512i)((U)x & 0x7F800000);
    const __mmask16 normal = _mm512_cmpge_epi32_mask(field, (__m512i)least);
    return (F)_mm512_mask_add_epi32((__m512i)lowest, normal, field, (__m512i)shift);
}
INLINE TARGET D NAME(larger)(D a, D b) { return _mm512_max_pd(a, b); }
INLINE TARGET D NAME(smaller)(D a, D b) { return _mm512_min_pd(a, b); }
INLINE TARGET F NAME(clamp32)(F x, F high) { return _mm512_range_ps(x, high, 2); } /* the smaller size, x's sign */
#else
INLINE TARGET D NAME(choose)(D a, D b, D x, D y) {
    const L yes = a > b;
    return (D)(((L)x & yes) | ((L)y & ~yes));
}
INLINE TARGET F NAME(choose32)(F a, F b, F x, F y) {
    const I yes = a > b;
    return (F)(((I)x & yes) | ((I)y & ~yes));
}
INLINE TARGET F NAME(magic32)(F x, F least, F lowest, U shift) {
    const U field = (U)x & 0x7F800000;
    return NAME(choose32)(least, (F)field, lowest, (F)(field + shift));
}
INLINE TARGET D NAME(larger)(D a, D b) { return NAME(choose)(a, b, a, b); }
INLINE TARGET D NAME(smaller)(D a, D b) { return NAME(choose)(a, b, b, a); }
INLINE TARGET F NAME(clamp32)(F x, F high) {
    x = NAME(choose32)(x, high, high, x);
    return NAME(choose32)(-high, x, -high, x);
}
#endif
INLINE TARGET D NAME(size)(D x) { return (D)((W)x & ~(W){} >> 1); }

/* Rounds acc + ab to a grid, in float64. The product must be exact; the sum is then off by `error`, exactly (Knuth's
 * TwoSum). A sum that is not exact is made odd: of its two neighbours the one whose last bit is one. It then lies on
 * the right side of every number and every tie of a grid with 24 bits, and rounding it is rounding the exact sum
 * (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008). */
INLINE TARGET D NAME(add)(D acc, D a, D b, const Grid *g, W noise, const int rounding) {
    const D zero = {};
    const D s = acc + a * b;
    const D part = s - acc;
    const D error = (acc - (s - part)) + (a * b - part); /* NaN where s is infinite */
    const W odd = ((W)s + (W)((L)((W)error ^ (W)s) >> 63)) | 1;
    const D x = NAME(choose)(NAME(size)(error), zero, (D)odd, s);

    /* The last bit of `magic` has the grid's spacing at x: adding it rounds, subtracting it again is exact. It is 1.5
     * times a power of two, so that x does not move it to another binade. */
    const int floor = g->flush ? g->emin : g->emin - g->mantissa;
    const D least = zero + power(g->emin);
    const W field = (W)x & FIELD;
    const D shifted = (D)(field + ((W){} + (((uint64_t)(52 - g->mantissa) << 52) | 1ull << 51)));
    const D magic = NAME(choose)(least, (D)field, zero + 1.5 * power(floor + 52), shifted);
    D y = (x + magic) - magic;
    const W sign = (W)x & 1ull << 63;
    if (rounding != NEAREST) {
        const D spaced = (D)(field - ((W){} + ((uint64_t)g->mantissa << 52)));
        const D spacing = NAME(choose)(least, (D)field, zero + power(floor), spaced);
        const D step = (D)((W)spacing | sign);
        const D past = (D)((W)(y - x) ^ sign); /* how far outward of x */
        y = NAME(choose)(past, zero, y - step, y);
        const D fraction = (D)((W)(x - y) ^ sign);
        D threshold;
        if (rounding == STOCHASTIC) { /* 1 less 24 random bits, which stand under 2**52 for a moment */
            const D number = (D)(noise >> 40 | (W)(zero + 0x1p52)) - 0x1p52;
            threshold = 1 - number * 0x1p-24;
        } else {
            threshold = NAME(choose)(zero, x, zero + g->threshold[1], zero + g->threshold[0]);
        }
        y = NAME(choose)(threshold * spacing, fraction, y, y + step);
    }
    const D over = NAME(choose)(zero, x, zero + g->over[1], zero + g->over[0]);
    const D limited = NAME(choose)(NAME(size)(y), zero + g->high, over, y);
    return NAME(choose)(NAME(size)(x), zero + 0x1.fffffffffffffp1023, x, limited); /* an infinity stays */
}

INLINE TARGET W NAME(mix)(W z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* A few vectors of accumulators at a time: as many as it takes to have something to do while sums are under way. */
enum { NAME(PAIR) = ROWS < 2 ? ROWS : 2, NAME(WIDE) = DV < 4 ? DV : 4 };

/* Any operands, any grid of at most 24 bits: a pair of rows against a part of a panel. */
INLINE TARGET void NAME(strip)(const Sum *sum, const float *const *rows, const float *b, int64_t m, int64_t n,
                               double *out, const int rounding) {
    enum { PAIR = NAME(PAIR), WIDE = NAME(WIDE) };
    const int64_t chunk = sum->chunk ? sum->chunk : sum->k;
    const Grid inner = sum->inner, outer = sum->outer;
    const D one = (D){} + 1;
    D acc[PAIR][WIDE], total[PAIR][WIDE];
    W keys[PAIR][WIDE], noise = {};
    EACH(r, PAIR) EACH(v, WIDE) {
        acc[r][v] = total[r][v] = (D){};
        keys[r][v] = (W){};
        if (rounding == STOCHASTIC)
            for (int x = 0; x < DL; x++) {
                const int64_t lane = n + v * DL + x;
                keys[r][v][x] = sum->turned ? key(sum->seed, lane, m + r) : key(sum->seed, m + r, lane);
            }
    }
    for (int64_t start = 0, turn = 0; start < sum->k; start += chunk, turn++) {
        const int64_t stop = sum->k - start < chunk ? sum->k : start + chunk;
        EACH(r, PAIR) EACH(v, WIDE) acc[r][v] = (D){};
        for (int64_t k = start; k < stop; k++)
            EACH(v, WIDE) {
                const D right = NAME(widen)(b + k * PANEL + v * DL);
                EACH(r, PAIR) {
                    const D left = (D){} + (double)rows[r][k];
                    if (rounding == STOCHASTIC) noise = NAME(mix)(keys[r][v] + GOLDEN * (uint64_t)(k + 1));
                    acc[r][v] = NAME(add)(acc[r][v], left, right, &inner, noise, rounding);
                }
            }
        if (sum->chunk)
            EACH(r, PAIR) EACH(v, WIDE) {
                if (rounding == STOCHASTIC) noise = NAME(mix)(keys[r][v] + GOLDEN * (uint64_t)(sum->k + turn + 1));
                total[r][v] = NAME(add)(total[r][v], acc[r][v], one, &outer, noise, rounding);
            }
    }
    EACH(r, PAIR) EACH(v, WIDE) memcpy(out + r * PANEL + v * DL, sum->chunk ? &total[r][v] : &acc[r][v], BYTES);
}

INLINE TARGET void NAME(general)(const Sum *sum, const float *const *rows, const float *b, int64_t m, int64_t n,
                                 double *out, const int rounding) {
    _Pragma("GCC unroll 1") for (int r = 0; r < ROWS; r += NAME(PAIR))
        _Pragma("GCC unroll 1") for (int v = 0; v < DV; v += NAME(WIDE)) {
            const int x = v * DL;
            NAME(strip)(sum, rows + r, b + x, m + r, n + x, out + r * PANEL + x, rounding);
        }
}

/* Nearest-even in float32, for p-bit grids and operands whose products have at most p bits, p <= 11 (native's caller
 * checks, and that nothing leaves float32's range). If acc + ab is not exact in float32, its 24 bits do not reach from
 * the one to the other: the smaller is then less than 2**(11 - 24) of the sum, under half of half a step, and the
 * larger lies on the grid itself, so that rounding twice ends there too, as rounding once does. */
INLINE TARGET void NAME(narrow)(const Sum *sum, const float *const *rows, const float *b, double *out,
                                const int kind) {
    const int64_t chunk = sum->chunk ? sum->chunk : sum->k;
    const Grid *g = &sum->inner;
    const F least = (F){} + (float)power(g->emin);
    const U shift = (U){} + (((uint32_t)(23 - g->mantissa) << 23) | 1u << 22);
    const F lowest = (F){} + (float)(1.5 * power((g->flush ? g->emin : g->emin - g->mantissa) + 23));
    const F high = (F){} + (float)g->high;
    memset(out, 0, ROWS * PANEL * 8);
    for (int64_t start = 0; start < sum->k; start += chunk) {
        const int64_t stop = sum->k - start < chunk ? sum->k : start + chunk;
        F acc[ROWS][FV];
        EACH(r, ROWS) EACH(v, FV) acc[r][v] = (F){};
        for (int64_t k = start; k < stop; k++)
            EACH(v, FV) {
                F right;
                memcpy(&right, b + k * PANEL + v * (BYTES / 4), BYTES);
                EACH(r, ROWS) {
                    const F x = acc[r][v] + ((F){} + rows[r][k]) * right;
                    const F magic = NAME(magic32)(x, least, lowest, shift);
                    F y = (x + magic) - magic; /* as in add() */
                    if (kind == NARROW_SATURATE) y = NAME(clamp32)(y, high);
                    if (kind == NARROW_INFINITE)
                        y = NAME(choose32)((F)((U)y & 0x7FFFFFFF), high, (F)(((U)y | 0x7F800000) & 0xFF800000), y);
                    acc[r][v] = y;
                }
            }
        float done[ROWS * PANEL];
        memcpy(done, acc, sizeof done);
        _Pragma("GCC unroll 1") for (int i = 0; i < ROWS * PANEL; i += DL) {
            D total;
            memcpy(&total, out + i, BYTES);
            const D part = NAME(widen)(done + i), one = (D){} + 1;
            total = sum->chunk ? NAME(add)(total, part, one, &sum->outer, (W){}, NEAREST) : part;
            memcpy(out + i, &total, BYTES);
        }
    }
}

/* A tensor core's sums: `chunk` products and the sum so far, all cut off below one common bit, are added exactly. */
INLINE TARGET void NAME(aligned)(const Sum *sum, const float *const *rows, const float *b, double *out) {
    float total[ROWS * PANEL] = {0};
    for (int64_t first = 0; first < sum->k; first += sum->promote) {
        const int64_t end = sum->k - first < sum->promote ? sum->k : first + sum->promote;
        EACH(r, ROWS) for (int v = 0; v < DV; v++) {
            const float *const column = b + v * DL;
            D acc = {};
            for (int64_t start = first; start < end; start += sum->chunk) {
                const int64_t stop = end - start < sum->chunk ? end : start + sum->chunk;
                D peak = (D){} + 0x1p-400; /* under every product but 0 */
                peak = NAME(larger)(NAME(size)(acc), peak);
                for (int64_t k = start; k < stop; k++) {
                    const D p = ((D){} + (double)rows[r][k]) * NAME(widen)(column + k * PANEL);
                    peak = NAME(larger)(NAME(size)(p), peak);
                }
                const W field = (W)peak & FIELD;
                const D unit = (D)(field - ((W){} + ((uint64_t)(sum->bits - 1) << 52)));
                const D scale = (D)(((W){} + (uint64_t)2046 * (1ull << 52)) - (W)unit); /* 1 / unit */
                L t = __builtin_convertvector(acc * scale, L); /* conversion to an integer truncates */
                for (int64_t k = start; k < stop; k++) {
                    const D p = ((D){} + (double)rows[r][k]) * scale;
                    t += __builtin_convertvector(p * NAME(widen)(column + k * PANEL), L);
                }
                acc = __builtin_convertvector(t, D) * unit;
            }
            H moved, before;
            memcpy(&before, total + r * PANEL + v * DL, sizeof before);
            moved = __builtin_convertvector(acc, H) + before;
            memcpy(total + r * PANEL + v * DL, &moved, sizeof moved);
        }
    }
    for (int i = 0; i < ROWS * PANEL; i++) out[i] = total[i];
}

/* Integers that stop at their limits after every addition; float64 holds all of them exactly. */
INLINE TARGET void NAME(clamped)(const Sum *sum, const float *const *rows, const float *b, double *out) {
    enum { WIDE = DV < 2 ? DV : 2 };
    const D low = (D){} + sum->low, high = (D){} + sum->high;
    _Pragma("GCC unroll 1") for (int x = 0; x < PANEL; x += WIDE * DL) {
        D acc[ROWS][WIDE];
        EACH(r, ROWS) EACH(v, WIDE) acc[r][v] = (D){};
        for (int64_t k = 0; k < sum->k; k++)
            EACH(v, WIDE) {
                const D right = NAME(widen)(b + k * PANEL + x + v * DL);
                EACH(r, ROWS) {
                    const D y = acc[r][v] + ((D){} + (double)rows[r][k]) * right;
                    acc[r][v] = NAME(larger)(NAME(smaller)(y, high), low);
                }
            }
        EACH(r, ROWS) EACH(v, WIDE) memcpy(out + r * PANEL + x + v * DL, &acc[r][v], BYTES);
    }
}

#define TILE(NAME_, CALL)                                                                                          \
    TARGET static void NAME(NAME_)(const Sum *sum, const float *const *rows, const float *b, int64_t m, int64_t n, \
                                   double *out) {                                                                  \
        (void)m, (void)n;                                                                                          \
        CALL;                                                                                                      \
    }
TILE(tile_narrow, NAME(narrow)(sum, rows, b, out, NARROW))
TILE(tile_saturate, NAME(narrow)(sum, rows, b, out, NARROW_SATURATE))
TILE(tile_infinite, NAME(narrow)(sum, rows, b, out, NARROW_INFINITE))
TILE(tile_nearest, NAME(general)(sum, rows, b, m, n, out, NEAREST))
TILE(tile_directed, NAME(general)(sum, rows, b, m, n, out, DIRECTED))
TILE(tile_stochastic, NAME(general)(sum, rows, b, m, n, out, STOCHASTIC))
TILE(tile_aligned, NAME(aligned)(sum, rows, b, out))
TILE(tile_clamped, NAME(clamped)(sum, rows, b, out))
static Tile *const NAME(tiles)[KINDS] = {NAME(tile_narrow),   NAME(tile_saturate), NAME(tile_infinite),
                                         NAME(tile_nearest),  NAME(tile_directed), NAME(tile_stochastic),
                                         NAME(tile_aligned),  NAME(tile_clamped)};

#undef F
#undef I
#undef U
#undef D
#undef L
#undef W
#undef H
#undef NAME
#undef EACH
#undef FV
#undef DV
#undef DL
#undef BYTES
#undef ISA
#undef TARGET
#undef ROWS
#endif
