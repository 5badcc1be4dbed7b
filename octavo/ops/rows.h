/* What kernels over rows share: what the rows are, how far their numbers reach, and the scale that follows. */
#ifndef OCTAVO_ROWS_H
#define OCTAVO_ROWS_H

#include "common.h"

enum { NEAREST_FLOATS, NEAREST_INTEGERS };

typedef struct {
    const void *x;            /* rows of k, ldx elements apart */
    uint8_t *codes;           /* contiguous */
    float *scale;             /* of rows and groups: written, or read where `given` */
    int32_t *zeros;           /* zero points, likewise; NULL: none */
    int64_t m, k, ldx, group;
    int64_t scale_row;        /* elements from one row's scales to the next's: 0 if one scale serves all */
    int32_t dtype, given, power_of_two, kind;
    float most;               /* the largest number, to which the largest magnitude goes; affine: the number of steps */
    float low, high;          /* integers: the lowest and the highest code */
    int32_t one_sided;        /* no negative numbers: the scale is that of the largest, not of the magnitude */
    /* floats, as for octavo_encode8; steps: of the smallest subnormal; where there is none, of the smallest normal */
    int32_t mantissa, rebias, shift, last, sign, nan, nan_sign, zero_sign;
    float least, steps;
} Rows;

INLINE float store_scale(float scale, int power_of_two) {
    uint32_t u = bits_of(scale);
    if (power_of_two) u = (u + 0x7FFFFF) & 0x7F800000u;
    u = u < 1u << 23 ? 1u << 23 : u; /* no smaller than the smallest normal number */
    return float_of(u > 0x7F7FFFFFu ? power_of_two ? 254u << 23 : 0x7F7FFFFFu : u);
}

/* A block's own scale and zero point, from its range. */
INLINE float own_scale(const Rows *r, float magnitude, float low, float high) {
    const float tiny = 1e-12f; /* a block of zeros still needs a scale that is not zero */
    if (!r->zeros) {
        const float top = r->one_sided ? high : magnitude;
        return store_scale((top > 0 ? top : tiny) / r->most, r->power_of_two);
    }
    low = low < 0 ? low : 0, high = high > 0 ? high : 0;
    float scale = (high - low > 0 ? high - low : tiny) / r->most;
    if (bits_of(scale) >= 0x7F800000u) scale = high / r->most - low / r->most; /* wider than the largest number */
    return store_scale(scale, r->power_of_two);
}

INLINE int32_t own_zero(const Rows *r, float low, float scale) {
    float zero = r->low - rintf((low < 0 ? low : 0) / scale);
    zero = zero < r->low ? r->low : zero > r->high ? r->high : zero;
    return zero == zero ? (int32_t)zero : 0;
}

/* 16-bit numbers as float32. */
INLINE void widen(const uint16_t *restrict x, uint32_t *restrict y, int64_t n, int dtype) {
    if (dtype == BF16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) y[i] = (uint32_t)x[i] << 16;
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) y[i] = widen16(x[i]);
    }
}

/* The pattern of the largest magnitude of float32s or, where `half`, of bfloat16s, as a float32's. */
INLINE uint32_t top_of(const void *x, int half, int64_t n) {
    uint32_t most = 0;
    if (half) {
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < n; i++) {
            const uint32_t u = ((const uint16_t *)x)[i] & 0x7FFF;
            most = u > most ? u : most;
        }
        return most << 16;
    }
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(((const float *)x)[i]) & ~SIGN;
        most = u > most ? u : most;
    }
    return most;
}

/* The same, and the smallest and the largest number. */
INLINE void range_of(const float *restrict x, int64_t n, uint32_t *top, float *low, float *high) {
    float least = x[0], last = x[0];
#pragma omp simd reduction(max : last) reduction(min : least)
    for (int64_t i = 0; i < n; i++) {
        least = x[i] < least ? x[i] : least;
        last = x[i] > last ? x[i] : last;
    }
    *top = top_of(x, 0, n), *low = least, *high = last;
}

int octavo_quantize_rows(const Rows *r, int isa, int threads);
void octavo_quantize_some(const Rows *r, int64_t from, int64_t to, uint8_t *codes, float *buffer, int isa);
int64_t octavo_row_buffer(const Rows *r);

#endif
