/* What a product of codes is given. */
#ifndef OCTAVO_PRODUCT_H
#define OCTAVO_PRODUCT_H

#include "rows.h"

/* What is multiplied: bfloat16; int8 in B and bytes in A; or float32 in A and codes in B. */
enum { FLOATS, INTEGERS, REALS };

typedef struct {
    const void *a, *b;              /* numbers, or bytes: integers, or codes where there is a table */
    const uint16_t *a_table, *b_table; /* the bfloat16 of each of 256 codes, or NULL; REALS: NULL for int8 */
    int64_t lda, ldb;               /* elements between rows */
    const float *left, *right;      /* scales, left[m * left_row + stretch / left_span]; NULL: none */
    const int32_t *zeros;           /* A's zero points, laid out as left; NULL: none */
    int64_t left_row, left_span, right_row, right_span; /* span: stretches that share a scale */
    int64_t right_rows;             /* rows of B that share scales */
    const float *bias;              /* n of them, or NULL */
    void *c;
    int64_t m, n, k, stretch;
    int32_t kind, out, flip;        /* flip: what is xored to bytes of A to make them unsigned */
} Product;

enum { FEW = 4 }; /* rows of A */

int octavo_product_of_few(const Product *p, const Rows *rows, int isa, int threads);
int octavo_product(const Product *p, const Rows *rows, int isa, int threads);

#endif
