/* A whole layer: the input's rows to codes, then their product with the weight, with no temporaries but the codes. */
#include "product.h"

INLINE float float32_of(const void *x, int type, int64_t i) {
    if (type == F32) return ((const float *)x)[i];
    const uint32_t half = ((const uint16_t *)x)[i];
    return float_of(type == BF16 ? half << 16 : widen16(half));
}

/* `rows` lacks codes, scale and zeros, and `product` the left side; `given` and its zero are one static scale, or NULL.
 * `rows` is NULL where the input stays as it is, and then REALS may be of any `type`. 0, or 1: this cannot be done
 * here. */
int octavo_linear(const Rows *rows, const Product *product, int type, const float *given, const int32_t *given_zero,
                  int affine, const void *bias, int bias_type, int isa, int threads) {
    Product p = *product;
    const int64_t scales = rows && !given ? p.m * ((p.k + rows->group - 1) / rows->group) : 1;
    const int64_t copies = rows && given ? whole_lines(p.m * p.k) : p.kind == REALS ? whole_lines(4 * p.m * p.k) : 0;
    const int64_t biases = bias && bias_type != F32 ? whole_lines(4 * p.n) : 0;
    char *memory = aligned_alloc(64, copies + 2 * whole_lines(4 * scales) + biases + 64);
    if (!memory) return 1;
    float *const scale = (float *)(memory + copies);
    int32_t *const zeros = (int32_t *)(memory + copies + whole_lines(4 * scales));
    float *const wide = (float *)(memory + copies + 2 * whole_lines(4 * scales));
    for (int64_t j = 0; biases && j < p.n; j++) wide[j] = float32_of(bias, bias_type, j);
    p.bias = biases ? wide : bias;
    Rows r;
    int failed = 0;
    if (rows) {
        r = *rows;
        r.codes = (uint8_t *)memory, r.scale = scale, r.zeros = affine ? zeros : NULL;
        p.a = given ? r.codes : NULL, p.lda = p.k, p.left = r.scale, p.zeros = r.zeros;
        if (given) *scale = *given;
        if (given && affine) *zeros = *given_zero;
        if (given) failed = octavo_quantize_rows(&r, isa, threads); /* what is not finite anywhere spoils all */
    } else if (p.kind == REALS && type != F32) {
        for (int64_t i = 0; i < p.m * p.k; i++) ((float *)memory)[i] = float32_of(p.a, type, i);
        p.a = memory;
    }
    failed = failed || octavo_product(&p, rows && !given ? &r : NULL, isa, threads);
    free(memory);
    return failed;
}
