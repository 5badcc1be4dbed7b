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
/* Integer codes by the scale's reciprocal, which is off by less than 2^-13 where codes do not saturate; quotients that
 * near a tie are divided. 0 where that does not hold. */
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE))) static int integers_by_reciprocal(
    const float *restrict x, uint8_t *restrict y, int64_t n, float scale, float zero, const Rows *r) {
    if (scale < 0x1p-126f || scale > 0x1p125f || fabsf(zero) > 256) return 0; /* given ones may be anything */
    const __m512 inverse = _mm512_set1_ps(1 / scale), tie = _mm512_set1_ps(0.5f - 0x1p-13f);
    const __m512 low = _mm512_set1_ps(r->low), high = _mm512_set1_ps(r->high), offset = _mm512_set1_ps(zero);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 some = n - i < 16 ? (1u << (n - i)) - 1 : 0xFFFF;
        const __m512 numbers = _mm512_maskz_loadu_ps(some, x + i);
        __m512 v = _mm512_mul_ps(numbers, inverse), t = _mm512_roundscale_ps(v, 8); /* to nearest even, silently */
        if (_mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_sub_ps(v, t)), tie, _CMP_GT_OQ))
            t = _mm512_roundscale_ps(_mm512_div_ps(numbers, _mm512_set1_ps(scale)), 8);
        const __mmask16 known = _mm512_cmp_ps_mask(t, t, _CMP_ORD_Q);
        t = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(t, offset), low), high);
        _mm_mask_storeu_epi8(y + i, some, _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(known, t)));
    }
    return 1;
}
#endif
#define BY_DIVISION(...) 0

#define QUANTIZE(ISA, TARGET, QUICK)                                                                                 \
    TARGET static void codes_##ISA(const float *restrict x, uint8_t *restrict y, int64_t n, float scale, float zero, \
                                   const Rows *rows) {                                                               \
        const Rows r = *rows;                                                                                        \
        if (r.kind == NEAREST_INTEGERS && QUICK(x, y, n, scale, zero, rows)) return;                                 \
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
    /* One row; whether all of it is finite. */                                                                      \
    TARGET static int row_##ISA(const Rows *r, int64_t i, float *buffer, int broken) {                               \
        const int64_t groups = (r->k + r->group - 1) / r->group;                                                     \
        const float *x = (const float *)r->x + i * r->ldx;                                                           \
        int finite = 1;                                                                                              \
        if (r->dtype != F32)                                                                                         \
            widen((const uint16_t *)r->x + i * r->ldx, (uint32_t *)buffer, r->k, r->dtype), x = buffer;              \
        for (int64_t g = 0; g < groups; g++) {                                                                       \
            const int64_t at = g * r->group, n = r->k - at < r->group ? r->k - at : r->group;                        \
            const int64_t place = i * r->scale_row + (r->scale_row ? g : 0);                                         \
            const int sided = !r->given && (r->zeros || r->one_sided);                                               \
            uint32_t top;                                                                                            \
            float low = 0, high = 0;                                                                                 \
            range_of(x + at, n, &top, sided ? &low : NULL, &high);                                                   \
            const int whole = top < 0x7F800000u;                                                                     \
            float scale = r->given ? r->scale[place] : own_scale(r, float_of(top), low, high);                       \
            float zero = 0;                                                                                          \
            if (r->zeros) {                                                                                          \
                if (!r->given) r->zeros[place] = own_zero(r, low, whole ? scale : NAN);                              \
                zero = (float)r->zeros[place];                                                                       \
            }                                                                                                        \
            if (!whole || broken) scale = NAN;                                                                       \
            finite &= whole;                                                                                         \
            codes_##ISA(x + at, r->codes + i * r->k + at, n, scale, zero, r);                                        \
            if (r->scale_row || !r->given) r->scale[place] = scale;                                                  \
        }                                                                                                            \
        return finite;                                                                                               \
    }

typedef int QuantizeRow(const Rows *, int64_t, float *, int);
QUANTIZE(scalar, , BY_DIVISION)
#if defined(__x86_64__)
QUANTIZE(avx2, __attribute__((target("avx2"))), BY_DIVISION)
QUANTIZE(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE))), integers_by_reciprocal)
static QuantizeRow *const quantizers[] = {row_scalar, row_avx2, row_avx512};
#else
static QuantizeRow *const quantizers[] = {row_scalar};
#endif

/* Rows from one to another, by a thread that has its own buffer of octavo_row_buffer() floats. */
void octavo_quantize_some(const Rows *r, int64_t from, int64_t to, float *buffer, int isa) {
    for (int64_t i = from; i < to; i++) quantizers[isa](r, i, buffer, 0);
}

int64_t octavo_row_buffer(const Rows *r) { return r->dtype == F32 ? 0 : (r->k + 63) / 64 * 64; }

/* 0, or 1: there was no memory. A given scale of all becomes NaN if anything is not finite, and so does all else. */
int octavo_quantize_rows(const Rows *r, int isa, int threads) {
    QuantizeRow *const row = quantizers[isa];
    const int64_t width = octavo_row_buffer(r);
    float *buffers = malloc(threads * width * 4 + 1);
    int finite = 1;
    if (!buffers) return 1;
    for (int broken = 0; broken < 2; broken++) {
        if (r->m * r->k <= 1 << 15) { /* even a team of one costs microseconds */
            for (int64_t i = 0; i < r->m; i++) finite = row(r, i, buffers, broken) && finite;
        } else {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
            for (int64_t i = 0; i < r->m; i++) finite = row(r, i, buffers + THREAD * width, broken) && finite;
        }
        if (finite || !r->given || r->scale_row) break;
        *r->scale = NAN;
    }
    free(buffers);
    return 0;
}
