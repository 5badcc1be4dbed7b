/* The cast onto a number grid, and codes of numbers and back. */
#include "common.h"

int octavo_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? AVX512_BF16 : AVX512;
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
    int32_t quick;                     /* whether `round_even` serves, with: */
    Even even;
} Grid;

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

#define SAME(x) (x)
#define WIDEN(x) ((uint32_t)(x) << 16)
#define EVEN(x, noise) bits_of(round_even(float_of(x), g.even))
#define ANY(x, noise) cast_one(x, 0, 0, g)
#define NOISY(x, noise) cast_one(x, noise, 1, g)
/* x and y may be one: every element is read before it is written. */
#define LOOP(NAME, TARGET, TYPE, LOAD, STORE, ROUND)                                                        \
    TARGET static void NAME(const void *x, const float *noise, void *y, int64_t n, const Grid *grid) {      \
        const Grid g = *grid; /* a copy: what is written through `out` cannot be thought to change it */    \
        const TYPE *in = x;                                                                                 \
        TYPE *out = y;                                                                                      \
        (void)noise;                                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) out[i] = STORE(ROUND(LOAD(in[i]), noise[i]));   \
    }
/* One instruction set's casts, and its rows in the table: [type][rounding]. */
#define TYPE_CASTS(NAME, TARGET, TYPE, LOAD, STORE)          \
    LOOP(NAME##_even, TARGET, TYPE, LOAD, STORE, EVEN)       \
    LOOP(NAME##_any, TARGET, TYPE, LOAD, STORE, ANY)         \
    LOOP(NAME##_noise, TARGET, TYPE, LOAD, STORE, NOISY)
#define CASTS(ISA, TARGET)                                          \
    TYPE_CASTS(f32_##ISA, TARGET, uint32_t, SAME, SAME)             \
    TYPE_CASTS(bf16_##ISA, TARGET, uint16_t, WIDEN, to_bfloat16)    \
    TYPE_CASTS(f16_##ISA, TARGET, uint16_t, widen16, to_float16)
#define TYPE_ROW(NAME) {NAME##_even, NAME##_any, NAME##_noise}
#define ROW(ISA) {TYPE_ROW(f32_##ISA), TYPE_ROW(bf16_##ISA), TYPE_ROW(f16_##ISA)}

typedef void Cast(const void *, const float *, void *, int64_t, const Grid *);
CASTS(scalar, )
#if defined(__x86_64__)
CASTS(avx2, __attribute__((target("avx2"))))
CASTS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE))))
static Cast *const casts[][3][3] = {ROW(scalar), ROW(avx2), ROW(avx512), ROW(avx512)};
#else
static Cast *const casts[][3][3] = {ROW(scalar)};
#endif

/* `isa` is octavo_isa() or, in a test, less. Every element is on its own: threads cannot change the result. */
void octavo_cast(const void *x, const float *noise, void *y, int64_t n, int dtype, const Grid *g, int isa,
                 int threads) {
    enum { BLOCK = 16384 };
    Cast *const cast = casts[isa][dtype][noise ? 2 : !g->quick];
    const int64_t size = dtype == F32 ? 4 : 2;
    if (x != y) prefer_huge_pages(y, n * size);
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
