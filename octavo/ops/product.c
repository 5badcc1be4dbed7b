/* The product of two matrices of codes. */
#include <pthread.h>

#include "vectors.h"

/* ---- products of codes ------------------------------------------------------------------------------------------
 *
 * C[m, n] = sum over k of A[m, k] * B[n, k], scaled, with a bias, in the type asked for: bfloat16 by vdpbf16ps, two
 * products a lane and step, or 8-bit integers by vpdpbusd, four. Either way the lanes of a vector are rows of A, and
 * a word of B, 32 bits of neighbours in a row, is broadcast to all of them.
 *
 * A, the activations, is packed: strips of up to PANEL vectors of rows, word by word. B, the weight, is read where it
 * lies, LOT rows at a time (8-bit floats are decoded once into a buffer of the thread's own). Either each thread packs
 * strips for itself and runs all of B past them, or all are packed first and each thread runs them past its lots of B:
 * what is at hand stays in the second-level cache, sums in registers. Sums become numbers there and then: (sum *
 * left[m]) * right[n] + bias[n], each step rounded to float32. Scales that vary along k cut it into stretches, each
 * summed from zero, scaled, and added up in order.
 *
 * vpdpbusd wants A unsigned: 128 is added to signed codes, and with a zero point comes out again as a multiple of the
 * sum of B's row, modulo 2^32. No thread count changes a result; but few rows of floats are summed in another order
 * (dots), so a row's last bits can depend on how many rows come with it. */

#if defined(__x86_64__)

enum { PANEL = 3, STRIP = LANES * PANEL, DEPTH = 1024 };
enum { CACHE = 1 << 20 }; /* bytes of a core's own, about */

/* Up to PANEL vectors of A's rows, packed: panel[stretch][word][vector], and scales and offsets as [stretch][STRIP]. */
typedef struct {
    __m512i *panel;
    float *lefts;
    int32_t *offsets;
    int64_t row; /* its first */
    int vectors;
} Strip;

/* All of A: its strips are as even as whole vectors allow. */
typedef struct {
    int64_t vectors, strips, stretches, words; /* words: of a whole row */
} Packed;

INLINE void place_strip(const Packed *a, int64_t s, Strip *strip) {
    const int64_t first = s * a->vectors / a->strips;
    strip->row = first * LANES;
    strip->vectors = (int)((s + 1) * a->vectors / a->strips - first);
}

/* Strip s of all of them, which begin where `all` does. */
INLINE Strip strip_of(const Packed *a, const Strip *all, int64_t s) {
    Strip strip = *all;
    place_strip(a, s, &strip);
    strip.panel += strip.row / LANES * a->words;
    strip.lefts += s * a->stretches * STRIP;
    strip.offsets += s * a->stretches * STRIP;
    return strip;
}

/* Packs vector v of a strip, whose rows begin at `a`; absent rows, and what a stretch's last word lacks, are 0. */
AVX512_DOTS static void pack(const Product *p, const char *a, const Strip *strip, int v) {
    const int64_t m = p->m - strip->row, words = words_of(p->kind, p->stretch);
    const int vectors = strip->vectors;
    __m512i *panel = strip->panel;
    const int64_t per_word = p->kind == INTEGERS ? 4 : 2;
    const __m512i flip = _mm512_set1_epi8((char)p->flip);
    Table table;
    if (p->a_table) table = table_of(p->a_table);
    for (int64_t s = 0; s < stretches_of(p); s++, panel += words * vectors) {
        const int64_t k = least(p->k - s * p->stretch, p->stretch);
        for (int64_t i = v * LANES; i < (v + 1) * LANES; i++) {
            const int64_t at = (strip->row + i) * p->left_row + s / p->left_span;
            strip->lefts[s * STRIP + i] = i < m && p->left ? p->left[at] : 0;
            strip->offsets[s * STRIP + i] = i < m ? (p->flip ? 128 : 0) + (p->zeros ? p->zeros[at] : 0) : 0;
        }
        for (int64_t w = 0; w < words; w += LANES) {
            __m512i r[16];
            const int64_t j = w * per_word;
            UNROLL for (int i = 0; i < 16; i++) {
                const int64_t at = i * p->lda + s * p->stretch + j;
                if (v * LANES + i >= m) r[i] = _mm512_setzero_si512();
                else if (p->a_table) r[i] = load_codes(table, (const uint8_t *)a + at, k - j);
                else if (p->kind == FLOATS) r[i] = load16((const uint16_t *)a + at, k - j);
                else r[i] = _mm512_xor_si512(load8((const uint8_t *)a + at, k - j), flip);
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

/* Numbers of a strip and a lot, with the bias and turned, to C. */
AVX512_DOTS static void finish(const Product *p, const __m512i *sums, int64_t i0, int vectors, int64_t j0) {
    for (int64_t j = 0; j < LOT && j0 + j < p->n; j += LANES) {
        const int64_t columns = least(p->n - j0 - j, LANES);
        const __mmask16 mask = (1u << columns) - 1;
        float bias[LANES] = {0};
        if (p->bias) memcpy(bias, p->bias + j0 + j, columns * 4);
        for (int v = 0; v < vectors; v++) {
            const int64_t row = i0 + v * LANES, rows = least(p->m - row, LANES);
            __m512i r[16];
            UNROLL for (int i = 0; i < 16; i++) {
                r[i] = sums[(j + i) * PANEL + v];
                const __m512 y = _mm512_castsi512_ps(r[i]);
                if (p->bias) r[i] = _mm512_castps_si512(_mm512_add_ps(y, _mm512_set1_ps(bias[i])));
            }
            if (p->out == F32) {
                transpose(r);
                for (int64_t i = 0; i < rows; i++)
                    _mm512_mask_storeu_ps((float *)p->c + (row + i) * p->n + j0 + j, mask, _mm512_castsi512_ps(r[i]));
                continue;
            }
            __m512i halves[8];
            UNROLL for (int i = 0; i < 8; i++)
                halves[i] = two_halves(p->out, _mm512_castsi512_ps(r[2 * i]), _mm512_castsi512_ps(r[2 * i + 1]));
            transpose_halves(halves);
            uint16_t *const c = (uint16_t *)p->c + row * p->n + j0 + j;
            UNROLL for (int i = 0; i < 16; i++) {
                const __m512i both = halves[i % 4 + i / 8 * 4];
                const __m256i y = i / 4 % 2 ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both);
                if (i >= rows) break;
                if (mask == 0xFFFF) _mm256_storeu_si256((__m256i *)(c + i * p->n), y); /* masked ones are slow */
                else _mm256_mask_storeu_epi16(c + i * p->n, mask, y);
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

/* LOT rows of B, or fewer: where their words are, their scales, and their sums or what sums begin with. */
typedef struct {
    const char *b;
    float *rights;
    int32_t *totals; /* both [stretch][LOT] */
    int64_t row, n, ld; /* ld: bytes */
} Lot;

INLINE int64_t lot_room(const Product *p) {
    const int64_t words = stretches_of(p) * words_of(p->kind, p->stretch);
    return stretches_of(p) * LOT * 8 + (p->b_table ? LOT * (4 * words + 64 + 192) : 0) + 64;
}

/* In lot_room() bytes. */
AVX512_DOTS static Lot prepare(const Product *p, int64_t row, char *memory) {
    const int64_t stretches = stretches_of(p), size = p->kind == INTEGERS ? 1 : 2;
    Lot lot = {.row = row, .n = least(p->n - row, LOT), .ld = p->ldb * size};
    lot.b = (const char *)p->b + row * lot.ld;
    lot.rights = (float *)memory;
    lot.totals = (int32_t *)(lot.rights + stretches * LOT);
    if (p->b_table) {
        char *const decoded = (char *)(lot.totals + stretches * LOT);
        lot.b = decoded;
        lot.ld = (4 * stretches * words_of(p->kind, p->stretch) + 64 + 127) / 128 * 128 + 64; /* no power of two */
        decode_lot(p, row, lot.n, decoded, lot.ld);
    }
    memset(lot.rights, 0, stretches * LOT * 8);
    if (p->kind == INTEGERS) sum_lot(p, row, lot.n, lot.totals);
    for (int64_t j = 0; j < lot.n; j++) {
        const float *right = p->right ? p->right + (row + j) / p->right_rows * p->right_row : NULL;
        for (int64_t s = 0, span = 0; s < stretches; s++, span++) {
            if (span == p->right_span) span = 0, right += right != NULL;
            lot.rights[s * LOT + j] = right ? *right : 0;
            if (!p->zeros) lot.totals[s * LOT + j] *= p->flip ? -128 : 0;
        }
    }
    return lot;
}

INLINE AVX512_DOTS void multiply(int kind, const Product *p, const Strip *a, const Lot *lot) {
    const int64_t stretches = stretches_of(p), words = words_of(kind, p->stretch), size = kind == INTEGERS ? 1 : 2;
    __m512i sums[LOT * PANEL];
    for (int64_t s = 0; s < stretches; s++) {
        const int64_t k = least(p->k - s * p->stretch, p->stretch);
        const int64_t whole = p->b_table ? words_of(kind, k) : k * size / 4;
        const int64_t depth = stretches == 1 ? DEPTH : whole + 1;
        for (int64_t w = 0; w < whole || w == 0; w += depth) {
            Stretch part = {
                .panel = a->panel + (s * words + w) * a->vectors,
                .b = lot->b + (p->b_table ? 4 * s * words : s * p->stretch * size) + 4 * w,
                .ldb = lot->ld,
                .words = least(whole - w, depth),
                .left = p->left ? a->lefts + s * STRIP : NULL,
                .right = lot->rights + s * LOT,
                .offset = a->offsets + s * STRIP,
                .total = lot->totals + s * LOT,
                .start = p->zeros ? NULL : lot->totals + s * LOT,
                .more = w > 0,
                .add = s > 0,
                .last = w + depth >= whole,
            };
            part.tail = part.last && !p->b_table ? (int)(k * size % 4) : 0;
#define TILES(V, N) \
    for (int64_t j = 0; j < lot->n; j += N) tile(kind, V, N, &part, j, lot->n, sums)
            switch (a->vectors) {
            case 1: TILES(1, 12); break;
            case 2: TILES(2, 12); break;
            case 3: TILES(3, 8); break;
            }
        }
    }
    finish(p, sums, a->row, a->vectors, lot->row);
}
AVX512_DOTS static void multiply_floats(const Product *p, const Strip *a, const Lot *lot) {
    multiply(FLOATS, p, a, lot);
}
AVX512_DOTS static void multiply_integers(const Product *p, const Strip *a, const Lot *lot) {
    multiply(INTEGERS, p, a, lot);
}

/* Memory of the calling thread's own, kept for its next call: the system hands out fresh memory page by page, which may
 * take as long as the product. NULL: there is none. */
enum { KEPT = 1 << 25 };
static pthread_key_t kept;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&kept, free); }

static char *borrow(int64_t bytes) {
    pthread_once(&once, make_key);
    int64_t *memory = pthread_getspecific(kept);
    if (memory && *memory >= bytes) return (char *)memory + 64;
    free(memory);
    pthread_setspecific(kept, NULL);
    memory = aligned_alloc(64, whole_lines(bytes) + 64);
    if (!memory) return NULL;
    *memory = bytes;
    pthread_setspecific(kept, memory);
    return (char *)memory + 64;
}

static void give_back(int64_t bytes) {
    if (bytes <= KEPT) return;
    free(pthread_getspecific(kept));
    pthread_setspecific(kept, NULL);
}

/* Packs a strip, whose codes are made first if there are `rows`, in room_for_rows() bytes of the thread's own. */
static void pack_strip(const Product *p, const Rows *rows, const Strip *strip, char *mine, int isa) {
    uint8_t *const codes = (uint8_t *)mine + (rows ? 4 * octavo_row_buffer(rows) : 0);
    for (int v = 0; v < strip->vectors; v++) {
        const int64_t from = strip->row + v * LANES, size = p->kind == FLOATS && !p->a_table ? 2 : 1;
        if (rows) octavo_quantize_some(rows, from, least(from + LANES, p->m), codes, (float *)mine, isa);
        pack(p, rows ? (const char *)codes : (const char *)p->a + from * p->lda * size, strip, v);
    }
}

static int64_t room_for_rows(const Product *p, const Rows *rows) {
    return rows ? 4 * octavo_row_buffer(rows) + whole_lines(LANES * p->k) : 0;
}

static void multiply_either(const Product *p, const Strip *a, const Lot *lot) {
    if (p->kind == INTEGERS) multiply_integers(p, a, lot);
    else multiply_floats(p, a, lot);
}

/* Every thread takes strips, packs them for itself and runs all of B past them, which is to stay in a core's own cache.
 * What one thread writes no other reads; even the memory is each one's own, for the hardware fetches beyond its end. */
static int product_by_strips(const Product *p, const Rows *rows, Packed a, int isa, int threads) {
    const int64_t lots = (p->n + LOT - 1) / LOT, room = whole_lines(lot_room(p)), scales = a.stretches * STRIP * 4;
    const int64_t packing = room_for_rows(p, rows), panel = PANEL * a.words * sizeof(__m512i);
    const int64_t bytes = panel + 2 * scales + packing + lots * (room + sizeof(Lot));
    int64_t *const taken = calloc(threads, 8);
    int failed = !taken;
#pragma omp parallel num_threads(threads) if (!failed)
    {
        char *const mine = failed ? NULL : borrow(bytes);
        const Strip own = {.panel = (__m512i *)mine,
                           .lefts = (float *)(mine + panel),
                           .offsets = (int32_t *)(mine + panel + scales)};
        char *const place = mine + panel + 2 * scales, *const prepared = place + packing;
        Lot *const lot = (Lot *)(prepared + lots * room);
        int ready = 0;
        for (int turn = 0; mine && turn < threads; turn++) { /* its share, as in the last call, then what is left */
            const int64_t share = (THREAD + turn) % threads, first = share * a.strips / threads;
            const int64_t count = (share + 1) * a.strips / threads - first;
            for (int64_t i; (i = __atomic_fetch_add(&taken[share], 1, __ATOMIC_RELAXED)) < count; ready = 1) {
                Strip strip = own;
                place_strip(&a, first + i, &strip);
                pack_strip(p, rows, &strip, place, isa);
                for (int64_t j = 0; j < lots; j++) {
                    if (!ready) lot[j] = prepare(p, j * LOT, prepared + j * room);
                    multiply_either(p, &strip, &lot[j]);
                }
            }
        }
        give_back(bytes);
        if (!mine) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    }
    free(taken);
    return failed;
}

/* All strips are packed first, by all threads; then they take lots of B or, where there are too few, parts of lots. */
static int product_by_lots(const Product *p, const Rows *rows, Packed a, int isa, int threads) {
    const int64_t lots = (p->n + LOT - 1) / LOT, shares = least(a.strips, (threads + lots - 1) / lots);
    const int64_t panels = a.vectors * a.words * sizeof(__m512i), scales = a.strips * a.stretches * STRIP * 4;
    const int64_t packing = room_for_rows(p, rows), own = (packing + lot_room(p) + 4095) / 4096 * 4096 + 64;
    const int64_t bytes = panels + 2 * scales + threads * own;
    char *const memory = borrow(bytes);
    if (!memory) return 1;
    const Strip all = {.panel = (__m512i *)memory,
                       .lefts = (float *)(memory + panels),
                       .offsets = (int32_t *)(memory + panels + scales)};
    int64_t taken = 0, packed = 0;
#pragma omp parallel num_threads(threads) if (p->m * p->n * p->k > 1 << 20)
    {
        char *const mine = memory + panels + 2 * scales + THREAD * own;
        /* no barrier: on a busy machine the others may not have begun, and who is here does it all */
        for (int64_t s; (s = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < a.strips;) {
            const Strip strip = strip_of(&a, &all, s);
            pack_strip(p, rows, &strip, mine, isa);
            __atomic_fetch_add(&packed, 1, __ATOMIC_RELEASE);
        }
        while (__atomic_load_n(&packed, __ATOMIC_ACQUIRE) < a.strips) sched_yield();
        /* by twos, if there are enough: two lots of 16-bit numbers are whole lines of the cache */
        const int together = lots * shares < 2 * threads ? 1 : 2;
#pragma omp for schedule(dynamic, together) nowait
        for (int64_t t = 0; t < lots * shares; t++) {
            const Lot lot = prepare(p, t / shares * LOT, mine + packing);
            const int64_t share = t % shares, last = (share + 1) * a.strips / shares;
            for (int64_t s = share * a.strips / shares; s < last; s++) {
                const Strip strip = strip_of(&a, &all, s);
                multiply_either(p, &strip, &lot);
            }
        }
    }
    give_back(bytes);
    return 0;
}

/* 0, or 1: there was no memory, a zero point is no code, and sums may exceed 32 bits, or REALS has many rows.
 * `rows`: how A's codes are made where p->a is not there yet; they have scales of their own. */
int octavo_product(const Product *p, const Rows *rows, int isa, int threads) {
    const int64_t zeros = p->zeros && !rows ? (p->left_row ? p->m : 1) * ((stretches_of(p) - 1) / p->left_span + 1) : 0;
    for (int64_t i = 0; i < zeros; i++)
        if (p->zeros[i] != (p->flip ? (int8_t)p->zeros[i] : (uint8_t)p->zeros[i])) return 1;
    if (p->m <= FEW) return octavo_product_of_few(p, rows, isa, threads);
    if (p->kind == REALS) return 1;
    Packed a = {.vectors = (p->m + LANES - 1) / LANES, .stretches = stretches_of(p)};
    a.words = a.stretches * words_of(p->kind, p->stretch);
    a.strips = (a.vectors + PANEL - 1) / PANEL;
    const int64_t weight = p->n * (p->ldb * (p->kind == INTEGERS ? 1 : 2) + 8 * a.stretches);
    if (p->b_table || weight > CACHE || a.vectors < 2 * threads) return product_by_lots(p, rows, a, isa, threads);
    a.strips = least(a.vectors, (a.strips + threads - 1) / threads * threads);
    return product_by_strips(p, rows, a, isa, threads);
}

#else /* never called: octavo_isa() says SCALAR */
int octavo_product(const Product *p, const Rows *rows, int isa, int threads) { return 1; }
#endif
