/* Rows of numbers to codes, and sums of products back to numbers. */
#include "rows.h"

/* ---- scale: sums to numbers, sum * left[m] * right[n] + bias[n], each step rounded to float32 ------------------- */

#define BITS(y) bits_of(y)
#define BITS16(y) to_bfloat16(bits_of(y))
#define HALF(y) to_float16(bits_of(y))
#define SCALES(NAME, TARGET, IN, OUT, STORE)                                                                      \
    TARGET static void NAME(const void *sums, float left, const float *restrict right, const float *restrict bias, \
                            void *y, int64_t n) {                                                                 \
        const IN *restrict in = sums;                                                                             \
        OUT *restrict out = y;                                                                                    \
        if (bias) {                                                                                               \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++)                                                   \
                out[j] = STORE((float)in[j] * left * right[j] + bias[j]);                                         \
        } else {                                                                                                  \
            _Pragma("omp simd") for (int64_t j = 0; j < n; j++) out[j] = STORE((float)in[j] * left * right[j]);   \
        }                                                                                                         \
    }
#define ALL_SCALES(ISA, TARGET)                                \
    SCALES(i32_f32_##ISA, TARGET, int32_t, uint32_t, BITS)     \
    SCALES(i32_bf16_##ISA, TARGET, int32_t, uint16_t, BITS16)  \
    SCALES(i32_f16_##ISA, TARGET, int32_t, uint16_t, HALF)     \
    SCALES(f32_f32_##ISA, TARGET, float, uint32_t, BITS)       \
    SCALES(f32_bf16_##ISA, TARGET, float, uint16_t, BITS16)    \
    SCALES(f32_f16_##ISA, TARGET, float, uint16_t, HALF)
#define SCALE_ROW(ISA)                                  \
    {{f32_f32_##ISA, f32_bf16_##ISA, f32_f16_##ISA},    \
     {i32_f32_##ISA, i32_bf16_##ISA, i32_f16_##ISA}}

typedef void ScaleRow(const void *, float, const float *, const float *, void *, int64_t);
ALL_SCALES(scalar, )
#if defined(__x86_64__)
ALL_SCALES(avx2, __attribute__((target("avx2"))))
ALL_SCALES(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE))))
static ScaleRow *const scales[][2][3] = {SCALE_ROW(scalar), SCALE_ROW(avx2), SCALE_ROW(avx512)};
#else
static ScaleRow *const scales[][2][3] = {SCALE_ROW(scalar)};
#endif

void octavo_scale_sums(const void *sums, int integers, const float *left, const float *right, const float *bias,
                       void *y, int out, int64_t m, int64_t n, int isa, int threads) {
    ScaleRow *const scale = scales[isa][integers][out];
#pragma omp parallel for schedule(static) num_threads(threads) if (m * n > 1 << 15)
    for (int64_t i = 0; i < m; i++)
        scale((const char *)sums + 4 * i * n, left[i], right, bias, (char *)y + (out == F32 ? 4 : 2) * i * n, n);
}

/* ---- quantize: rows of numbers to codes, with scales of their own or given ones -----------------------------------
 *
 * A row is read once: its largest magnitude, its scale and its codes are found while it is in the cache. Magnitudes
 * compare as integers, and whatever is not finite compares above all that is. A quotient x / scale becomes a code by
 * its bit pattern, as in cast and encode above but to nearest even only: adding half a step, less one where the number
 * is even, rounds; below the smallest normal number, counting steps does. Codes ascend with magnitude: the largest
 * one is where they saturate. */

#if defined(__x86_64__)
#define AVX512_CODES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE)))

/* Up to 16 numbers, of float32 or, where `half`, of bfloat16; zeros beyond n. */
INLINE AVX512_CODES __m512 sixteen(const void *x, int half, int64_t i, int64_t n) {
    const __mmask16 some = n - i >= 16 ? 0xFFFF : n > i ? (1u << (n - i)) - 1 : 0;
    if (!half) return _mm512_maskz_loadu_ps(some, (const float *)x + i);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const uint16_t *)x + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* The pattern of the largest magnitude, as a float32's. */
INLINE AVX512_CODES uint32_t top512(const void *x, int half, int64_t n) {
    const __m512i positive = half ? _mm512_set1_epi16(0x7FFF) : _mm512_set1_epi32(0x7FFFFFFF);
    const int64_t step = half ? 32 : 16;
    __m512i top[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i < n; i += 2 * step)
        UNROLL for (int j = 0; j < 2; j++) {
            const int64_t left = n - i - j * step;
            const char *const at = (const char *)x + (i + j * step) * (64 / step);
            if (left <= 0) break;
            const __mmask32 some = left >= step ? ~0u : (1u << left) - 1;
            const __m512i y = half ? _mm512_maskz_loadu_epi16(some, at) : _mm512_maskz_loadu_epi32((__mmask16)some, at);
            const __m512i u = _mm512_and_si512(y, positive);
            top[j] = half ? _mm512_max_epu16(top[j], u) : _mm512_max_epu32(top[j], u);
        }
    if (!half) return _mm512_reduce_max_epu32(_mm512_max_epu32(top[0], top[1]));
    const __m512i both = _mm512_max_epu16(top[0], top[1]); /* words of two: the upper one as it is, the lower shifted */
    const __m512i upper = _mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000));
    return _mm512_reduce_max_epu32(_mm512_max_epu32(upper, _mm512_slli_epi32(both, 16)));
}

/* 64 integer codes, or fewer at the end: by the scale's reciprocal, which is off by less than 2^-13 where codes do not
 * saturate, and by division where one comes that near a tie. */
INLINE AVX512_CODES void codes64(const void *x, int half, uint8_t *y, int64_t i, int64_t n, float scale,
                                 __m512 inverse, __m512 low, __m512 high, __m512i zero) {
    __m512 v[4], rest = _mm512_setzero_ps();
    UNROLL for (int j = 0; j < 4; j++) {
        v[j] = _mm512_mul_ps(sixteen(x, half, i + 16 * j, n), inverse);
        rest = _mm512_range_ps(rest, _mm512_reduce_ps(v[j], 8), 0xB); /* the larger distance from an integer */
    }
    if (__builtin_expect(_mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.5f - 0x1p-13f), _CMP_GT_OQ), 0))
        UNROLL for (int j = 0; j < 4; j++)
            v[j] = _mm512_div_ps(sixteen(x, half, i + 16 * j, n), _mm512_set1_ps(scale));
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512 clamped = _mm512_min_ps(_mm512_max_ps(v[j], low), high);
        const __m512i code = _mm512_cvt_roundps_epi32(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(code, zero));
        const int64_t left = n - i - 16 * j;
        if (left >= 16) _mm_storeu_si128((__m128i *)(y + i + 16 * j), bytes);
        else if (left > 0) _mm_mask_storeu_epi8(y + i + 16 * j, (1u << left) - 1, bytes);
    }
}

/* Integer codes of finite numbers. 0 where the scale lets no reciprocal do. */
INLINE AVX512_CODES int integers_by_reciprocal(const void *restrict x, int half, uint8_t *restrict y, int64_t n,
                                               float scale, float zero, const Rows *r) {
    if (!(scale >= 0x1p-126f && scale <= 0x1p125f && fabsf(zero) <= 256)) return 0; /* given ones may be anything */
    const __m512 inverse = _mm512_set1_ps(1 / scale), low = _mm512_set1_ps(r->low - zero);
    const __m512 high = _mm512_set1_ps(r->high - zero);
    const __m512i offset = _mm512_set1_epi32((int32_t)zero);
    const int64_t whole = n / 64 * 64;
    for (int64_t i = 0; i < whole; i += 64) codes64(x, half, y, i, i + 64, scale, inverse, low, high, offset);
    if (whole < n) codes64(x, half, y, whole, n, scale, inverse, low, high, offset);
    return 1;
}
#endif
#define BY_DIVISION(...) 0

#define QUANTIZE(ISA, TARGET, QUICK, TOP)                                                                            \
    TARGET static void codes_##ISA(const float *restrict x, uint8_t *restrict y, int64_t n, float scale, float zero, \
                                   const Rows *rows) {                                                               \
        const Rows r = *rows;                                                                                        \
        if (r.kind == NEAREST_INTEGERS) {                                                                            \
            const float bound = 8388608; /* 2^23 */                                                                  \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                    \
                float v = x[i] / scale;                                                                              \
                v = v < -8e6f ? -8e6f : v;                                                                           \
                v = v > 8e6f ? 8e6f : v; /* NaN stays */                                                             \
                const float half = float_of(bits_of(bound) | (bits_of(v) & SIGN));                                   \
                v = (v + half) - half + zero;                                                                        \
                v = v < r.low ? r.low : v;                                                                           \
                v = v > r.high ? r.high : v;                                                                         \
                v = v == v ? v : 0;                                                                                  \
                y[i] = (uint8_t)(int32_t)v;                                                                          \
            }                                                                                                        \
            return;                                                                                                  \
        }                                                                                                            \
        const int32_t drop = 23 - r.mantissa;                                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                        \
            const uint32_t bits = bits_of(x[i] / scale), u = bits & ~SIGN;                                           \
            const uint32_t odd = ((u >> drop) - r.rebias) & 1;                                                       \
            const int32_t normal = (int32_t)((u + (1u << (drop - 1)) - 1 + odd) >> drop) - r.rebias;                 \
            const float size = float_of(u), count = size < r.least ? size * r.steps : 0;                             \
            const int32_t subnormal = (int32_t)(count + 8388608.0f - 8388608.0f) << r.shift;                         \
            int32_t code = size < r.least ? subnormal : normal;                                                      \
            code = code > r.last ? r.last : code;                                                                    \
            int32_t negative = bits & SIGN ? r.sign : 0;                                                             \
            negative = code == 0 && !r.zero_sign ? 0 : negative;                                                     \
            negative = u > 0x7F800000u ? (bits & SIGN && r.nan_sign ? r.sign : 0) : negative;                        \
            code = u > 0x7F800000u ? r.nan : code;                                                                   \
            y[i] = (uint8_t)(code | negative);                                                                       \
        }                                                                                                            \
    }                                                                                                                \
    /* One row, whose codes go to `to`; whether all of it is finite. */                                              \
    TARGET static int row_##ISA(const Rows *r, int64_t i, uint8_t *to, float *buffer, int broken) {                  \
        const int64_t groups = (r->k + r->group - 1) / r->group;                                                     \
        const int sided = !r->given && (r->zeros || r->one_sided), integers = r->kind == NEAREST_INTEGERS;           \
        const float *const floats = (const float *)r->x + i * r->ldx;                                                \
        const uint16_t *const halves = (const uint16_t *)r->x + i * r->ldx;                                          \
        const int narrow = r->dtype == BF16 && integers && !sided; /* need not be widened first */                   \
        int finite = 1;                                                                                              \
        for (int64_t g = 0; g < groups; g++) {                                                                       \
            const int64_t at = g * r->group, n = r->k - at < r->group ? r->k - at : r->group;                        \
            const int64_t place = i * r->scale_row + (r->scale_row ? g : 0);                                         \
            const float *const x = r->dtype == F32 ? floats + at : buffer;                                           \
            uint32_t top;                                                                                            \
            float low = 0, high = 0;                                                                                 \
            if (r->dtype != F32 && !narrow) widen(halves + at, (uint32_t *)buffer, n, r->dtype);                     \
            const void *const numbers = narrow ? (const void *)(halves + at) : x;                                    \
            if (sided) range_of(x, n, &top, &low, &high);                                                            \
            else top = TOP(numbers, narrow, n);                                                                      \
            const int whole = top < 0x7F800000u;                                                                     \
            float scale = r->given ? r->scale[place] : own_scale(r, float_of(top), low, high);                       \
            float zero = 0;                                                                                          \
            if (r->zeros) {                                                                                          \
                if (!r->given) r->zeros[place] = own_zero(r, low, whole ? scale : NAN);                              \
                zero = (float)r->zeros[place];                                                                       \
            }                                                                                                        \
            if (!whole || broken) scale = NAN;                                                                       \
            finite &= whole;                                                                                         \
            if (!integers || !QUICK(numbers, narrow, to + at, n, scale, zero, r)) {                                  \
                if (narrow) widen(halves + at, (uint32_t *)buffer, n, BF16);                                         \
                codes_##ISA(x, to + at, n, scale, zero, r);                                                          \
            }                                                                                                        \
            if (r->scale_row || !r->given) r->scale[place] = scale;                                                  \
        }                                                                                                            \
        return finite;                                                                                               \
    }

typedef int QuantizeRow(const Rows *, int64_t, uint8_t *, float *, int);
QUANTIZE(scalar, , BY_DIVISION, top_of)
#if defined(__x86_64__)
QUANTIZE(avx2, __attribute__((target("avx2"))), BY_DIVISION, top_of)
QUANTIZE(avx512, AVX512_CODES, integers_by_reciprocal, top512)
static QuantizeRow *const quantizers[] = {row_scalar, row_avx2, row_avx512};
#else
static QuantizeRow *const quantizers[] = {row_scalar};
#endif

/* Rows from one to another, to codes of their own place, by a thread that has its own octavo_row_buffer() floats. */
void octavo_quantize_some(const Rows *r, int64_t from, int64_t to, uint8_t *codes, float *buffer, int isa) {
    for (int64_t i = from; i < to; i++) quantizers[isa](r, i, codes + (i - from) * r->k, buffer, 0);
}

int64_t octavo_row_buffer(const Rows *r) {
    return r->dtype == F32 ? 0 : ((r->k < r->group ? r->k : r->group) + 63) / 64 * 64;
}

/* 0, or 1: there was no memory. A given scale of all becomes NaN if anything is not finite, and so does all else. */
int octavo_quantize_rows(const Rows *r, int isa, int threads) {
    QuantizeRow *const row = quantizers[isa];
    const int64_t width = octavo_row_buffer(r);
    float *buffers = malloc(threads * width * 4 + 1);
    int finite = 1;
    if (!buffers) return 1;
    for (int broken = 0; broken < 2; broken++) {
        if (r->m * r->k <= 1 << 15) { /* even a team of one costs microseconds */
            for (int64_t i = 0; i < r->m; i++) finite = row(r, i, r->codes + i * r->k, buffers, broken) && finite;
        } else {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
            for (int64_t i = 0; i < r->m; i++)
                finite = row(r, i, r->codes + i * r->k, buffers + THREAD * width, broken) && finite;
        }
        if (finite || !r->given || r->scale_row) break;
        *r->scale = NAN;
    }
    free(buffers);
    return 0;
}
