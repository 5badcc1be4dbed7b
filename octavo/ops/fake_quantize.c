/* Numbers to the nearest 8-bit ones and back to floats: round(x / scale) * scale, in one pass and without codes. */
#include "rows.h"

typedef struct {
    Rows rows;      /* no codes, and no scale or zero point is written; scale_row: 0 if all rows have the same */
    void *y;        /* as x, but contiguous; may be x */
    Even even;      /* what x / scale is rounded to; affine: any integer that matters */
    int32_t affine;
    float largest;  /* of y's type */
} Fake;

INLINE float simulate(float x, float scale, float zero, int affine, Even even, float low, float high, float largest) {
    float y = round_even(x / scale, even);
    if (affine) { /* 0.0 is an integer exactly: the zero point is added after rounding */
        y += zero;
        y = y < low ? low : y;
        y = y > high ? high : y;
        y -= zero;
    }
    y *= scale;
    y = y < -largest ? -largest : y; /* a scale that was rounded up may carry the largest number past the end */
    return y > largest ? largest : y;
}

/* n numbers; with a scale of their own each, or all with the first. x and y may be one. */
INLINE void simulate_all(const Fake *fake, const float *x, float *y, int64_t n, const float *scale,
                         const int32_t *zero, int each) {
    const Even even = fake->even;
    const float low = fake->rows.low, high = fake->rows.high, largest = fake->largest;
#define ALL(AFFINE, SCALE, ZERO)                          \
    _Pragma("omp simd") for (int64_t i = 0; i < n; i++)   \
        y[i] = simulate(x[i], SCALE, ZERO, AFFINE, even, low, high, largest)
    if (each) {
        if (fake->affine) ALL(1, scale[i], (float)zero[i]);
        else ALL(0, scale[i], 0);
    } else {
        const float one = *scale, offset = fake->affine ? (float)*zero : 0;
        if (fake->affine) ALL(1, one, offset);
        else ALL(0, one, 0);
    }
}

INLINE void narrow(const uint32_t *x, uint16_t *y, int64_t n, int dtype) {
    if (dtype == BF16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) y[i] = to_bfloat16(x[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) y[i] = to_float16(x[i]);
    }
}

/* Columns `begin` to `end` of row i; they hold whole groups unless the scales are given. */
INLINE void part(const Fake *fake, int64_t i, int64_t begin, int64_t end, float *buffer) {
    const Rows *r = &fake->rows;
    const int each = r->given && r->group == 1;
    const float *x = (const float *)r->x + i * r->ldx + begin;
    float *y = (float *)fake->y + i * r->k + begin;
    if (r->dtype != F32) {
        widen((const uint16_t *)r->x + i * r->ldx + begin, (uint32_t *)buffer, end - begin, r->dtype);
        x = y = buffer;
    }
    for (int64_t at = begin, stop; at < end; at = stop) {
        const int64_t g = at / r->group, edge = (g + 1) * r->group;
        stop = each || edge > end ? end : edge;
        const int64_t n = stop - at;
        const float *from = x + (at - begin), *scale = r->scale + i * r->scale_row + g;
        const int32_t *zero = fake->affine ? r->zeros + i * r->scale_row + g : NULL;
        float own;
        int32_t own_point = 0;
        if (!r->given) {
            uint32_t top;
            float low = 0, high = 0;
            if (r->zeros || r->one_sided) range_of(from, n, &top, &low, &high);
            else top = top_of(from, 0, n);
            own = top < 0x7F800000u ? own_scale(r, float_of(top), low, high) : NAN;
            if (fake->affine) own_point = own_zero(r, low, own);
            scale = &own, zero = &own_point;
        }
        simulate_all(fake, from, y + (at - begin), n, scale, zero, each);
    }
    if (r->dtype != F32) narrow((const uint32_t *)buffer, (uint16_t *)fake->y + i * r->k + begin, end - begin, r->dtype);
}

#define PART(ISA, TARGET)                                                                                 \
    TARGET static void part_##ISA(const Fake *fake, int64_t i, int64_t begin, int64_t end, float *buffer) { \
        part(fake, i, begin, end, buffer);                                                                \
    }

typedef void Part(const Fake *, int64_t, int64_t, int64_t, float *);
PART(scalar, )
#if defined(__x86_64__)
PART(avx2, __attribute__((target("avx2"))))
PART(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDE))))
static Part *const parts[] = {part_scalar, part_avx2, part_avx512};
#else
static Part *const parts[] = {part_scalar};
#endif

/* 0, or 1: there was no memory. Blocks are on their own: threads cannot change the result. */
int octavo_fake_quantize(const Fake *fake, int isa, int threads) {
    enum { STEP = 4096 };
    const Rows *r = &fake->rows;
    const int64_t step = r->given ? STEP : r->group * (r->group < STEP ? STEP / r->group : 1);
    const int64_t size = step < r->k ? step : r->k, share = (r->k + step - 1) / step;
    const int64_t width = r->dtype == F32 ? 0 : (size + 63) / 64 * 64;
    float *buffers = malloc(threads * width * 4 + 1);
    if (!buffers) return 1;
    if (r->x != fake->y) prefer_huge_pages(fake->y, r->m * r->k * (r->dtype == F32 ? 4 : 2));
#pragma omp parallel for schedule(static) num_threads(threads) if (r->m * r->k > 1 << 15)
    for (int64_t t = 0; t < r->m * share; t++) {
        const int64_t begin = t % share * step, end = begin + step < r->k ? begin + step : r->k;
        parts[isa](fake, t / share, begin, end, buffers + THREAD * width);
    }
    free(buffers);
    return 0;
}
