/* What Octavo's CPU kernels share: instruction sets, bit patterns, the 16-bit types.
 *
 * The kernels are plain C11 without torch's headers, so that any `cc` builds them in a second or two. One file serves
 * every x86-64: a kernel is compiled once per instruction set by __attribute__((target)) and chosen at run time; any
 * other machine gets the scalar path. native.py compiles and calls; the law each kernel obeys is written there. */
#ifndef OCTAVO_COMMON_H
#define OCTAVO_COMMON_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* madvise */
#endif
#if defined(__cplusplus)
#define restrict __restrict__
#endif
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#if defined(__clang__)
#define WIDE
#else
#define WIDE ",prefer-vector-width=512" /* gcc would halve AVX-512's vectors */
#endif

#define INLINE static inline __attribute__((always_inline))

#define SIGN 0x80000000u

enum { SCALAR, AVX2, AVX512, AVX512_BF16 };
#define UNROLL _Pragma("GCC unroll 16")
enum { F32, BF16, F16 }; /* types of numbers */

int octavo_isa(void); /* what the machine has, at best */

INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; } /* of the cache */

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

INLINE uint16_t to_bfloat16(uint32_t x) {
    const uint32_t rounded = x + 0x7FFF + (x >> 16 & 1);
    return (uint16_t)(CHOOSE((x << 1) > 0xFF000000u, x, rounded) >> 16);
}

/* float32 to IEEE half, to nearest even: a normal number by its pattern, a subnormal by an addition that rounds. */
INLINE uint16_t to_float16(uint32_t x) {
    const uint32_t u = x & ~SIGN;
    const uint32_t normal = (u - (112u << 23) + 0xFFF + (u >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = CHOOSE(u < 113u << 23, subnormal, normal);
    const uint32_t y = CHOOSE(u >= 0x477FF000u, 0x7C00u, finite);
    return (uint16_t)(CHOOSE(u > 0x7F800000u, 0x7E00u, y) | (x >> 16 & 0x8000));
}

INLINE uint32_t widen16(uint32_t h) { /* IEEE half to float32 */
    const uint32_t u = (h & 0x7FFF) << 13, field = h & 0x7C00;
    const uint32_t normal = u + (112u << 23) + CHOOSE(field == 0x7C00, 112u << 23, 0u);
    const uint32_t subnormal = bits_of(float_of(u + (113u << 23)) - float_of(113u << 23));
    return CHOOSE(field == 0, subnormal, normal) | (h & 0x8000) << 16;
}

/* A number grid with the usual rounding: to nearest, ties to even, and what lies beyond the limits becomes the limit. */
typedef struct {
    float low, high;    /* on the grid */
    uint32_t normal;    /* the pattern of the smallest normal number */
    uint32_t lift;      /* 23 less the bits of the mantissa, as an exponent */
    uint32_t zero_sign; /* the sign bit, if the grid has a -0 */
} Even;

/* The float unit itself rounds: 2^23 quanta are a number whose neighbours lie one quantum apart. Added with x's sign
 * and taken away again, they leave the nearest multiple of the quantum, and +0 where that is 0. All quanta are normal
 * numbers twice over (native.py sees to it), so no flush-to-zero mode can be felt. NaN stays what it is. */
INLINE float round_even(float x, Even g) {
    float y = x < g.low ? g.low : x;
    y = y > g.high ? g.high : y;
    const uint32_t field = bits_of(y) & 0x7F800000u, quantum = field < g.normal ? g.normal : field;
    const float far = float_of((quantum + g.lift) | (bits_of(y) & SIGN));
    return float_of(bits_of((y + far) - far) | (bits_of(x) & g.zero_sign));
}

/* A large result comes from the system as untouched pages: first writes to 4 KiB ones cost more than all else here. */
INLINE void prefer_huge_pages(void *p, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)p + huge - 1) & -huge, last = ((uintptr_t)p + bytes) & -huge;
    if (bytes >= 8 << 20) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

#endif
