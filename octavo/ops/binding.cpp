/* linear.c as the CPU's octavo::linear and octavo::linear_weight_only, called in a few microseconds.
 *
 * Only torch's stable ABI is used, whose headers compile in a second and whose results run on later torches too. What
 * the kernels do not take goes on to octavo::linear_by_steps and octavo::linear_weight_only_by_steps: the law. */
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>

extern "C" {
#include "product.h"
#include "rows.h"
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

typedef int Linear(const Rows *, const Product *, int, const float *, const int32_t *, int, const void *, int, int, int);
static Linear *run;
static int instruction_set;

/* Called once by native.py, with the address of octavo_linear, which is another library's, and with octavo_isa(). */
extern "C" void octavo_bind(void *linear, int isa) {
    run = (Linear *)linear;
    instruction_set = isa;
}

static int type_of(const Tensor &x) {
    switch (x.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: return -1;
    }
}

/* One of the tensors beside the input: of one type, and of n numbers if that is not 0. */
static bool is(const Tensor &x, ScalarType type, int64_t n = 0) {
    return x.is_cpu() && x.scalar_type() == type && x.is_contiguous() && (n == 0 || x.numel() == n);
}

static bool is_table(const MaybeTensor &x) { return !x || is(*x, ScalarType::BFloat16, 256); }

template <class T> static const T *numbers(const MaybeTensor &x) {
    return x ? (const T *)x->const_data_ptr() : nullptr;
}

/* What the product has of the weight; whether the kernels take it. */
static bool weighs(Product &p, const Tensor &x, const Tensor &codes, const Tensor &scale, int64_t rows, int64_t columns,
                   const MaybeTensor &table, const MaybeTensor &bias) {
    p.out = type_of(x);
    if (!run || p.out < 0 || !x.is_cpu() || x.dim() < 1 || !x.is_contiguous() || x.numel() == 0) return false;
    if (!(is(codes, ScalarType::Char) || is(codes, ScalarType::Byte)) || codes.dim() != 2) return false;
    p.n = codes.size(0), p.k = codes.size(1), p.m = p.k ? x.numel() / p.k : 0;
    if (p.n == 0 || x.size(x.dim() - 1) != p.k || rows < 1 || columns < 1) return false;
    if (!is(scale, ScalarType::Float) || scale.dim() != 2) return false;
    const int64_t down = scale.size(0), across = scale.size(1);
    if (down != 1 && down != (p.n + rows - 1) / rows) return false;
    if (across != 1 && across != (p.k + columns - 1) / columns) return false;
    if (!is_table(table)) return false;
    if (bias && (type_of(*bias) < 0 || !bias->is_cpu() || !bias->is_contiguous() || bias->numel() != p.n)) return false;
    p.b = codes.const_data_ptr(), p.ldb = p.k, p.b_table = numbers<uint16_t>(table);
    p.right = (const float *)scale.const_data_ptr(), p.right_rows = rows, p.right_row = down > 1 ? across : 0;
    return true;
}

/* The span of a scale in stretches: of one for every `columns`, or of the one of all. */
static int64_t span(const Product &p, bool several, int64_t columns) {
    return several ? columns / p.stretch : (p.k + p.stretch - 1) / p.stretch;
}

static Tensor run_on(const Tensor &x, Product &p, const Rows *r, const MaybeTensor &scale, const MaybeTensor &zeros,
                     bool affine, const MaybeTensor &bias) {
    int64_t sizes[64], strides[64], step = 1;
    const int64_t dims = x.dim();
    for (int64_t i = dims - 1; i >= 0 && dims <= 64; i--) {
        sizes[i] = i == dims - 1 ? p.n : x.size(i), strides[i] = step;
        step *= sizes[i];
    }
    AtenTensorHandle handle;
    int32_t type;
    uint32_t threads;
    if (dims > 64 || aoti_torch_get_dtype(x.get(), &type) || torch_get_num_threads(&threads) ||
        aoti_torch_empty_strided(dims, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle))
        return Tensor();
    Tensor y(handle);
    p.c = y.mutable_data_ptr();
    const int failed =
        run(r, &p, p.out, numbers<float>(scale), numbers<int32_t>(zeros), affine, numbers<void>(bias),
            bias ? type_of(*bias) : F32, instruction_set < AVX512 ? instruction_set : AVX512, (int)threads);
    return failed ? Tensor() : y;
}

static Tensor quickly(const Tensor &x, const Tensor &codes, const Tensor &scale, int64_t rows, int64_t columns,
                     MaybeTensor table, MaybeTensor bias, MaybeTensor input_table, MaybeTensor input_scale,
                     MaybeTensor input_zeros, int64_t group, bool affine, bool power_of_two, int64_t mantissa,
                     int64_t emin, double low, double high, bool flush, bool negative_zero, int64_t bits, int64_t nan) {
    Product p{};
    const bool integers = mantissa == 23;
    if (!weighs(p, x, codes, scale, rows, columns, table, bias) || !is_table(input_table)) return Tensor();
    if (table ? affine || !input_table : input_table || !integers || !is(codes, ScalarType::Char)) return Tensor();
    if (bits > 8 || !(integers || (low < 0 && -126 < emin && emin <= 127 && emin - mantissa > -126))) return Tensor();
    if (input_scale && !is(*input_scale, ScalarType::Float, 1)) return Tensor();
    if (input_scale && affine && !(input_zeros && is(*input_zeros, ScalarType::Int, 1))) return Tensor();

    if (group < 1 || input_scale || group > p.k) group = p.k;
    const int64_t groups = (p.k + group - 1) / group, across = scale.size(1), longest = 1 << 16;
    p.stretch = p.k < longest ? p.k : longest;
    if (groups > 1 && group < p.stretch) p.stretch = group;
    if (across > 1 && columns < p.stretch) p.stretch = columns;
    if ((groups > 1 && group % p.stretch) || (across > 1 && columns % p.stretch)) return Tensor();
    p.kind = table ? FLOATS : INTEGERS;
    p.a_table = numbers<uint16_t>(input_table);
    p.flip = !table && low < 0 ? 0x80 : 0;
    p.left_row = input_scale ? 0 : groups;
    p.left_span = span(p, groups > 1, group);
    p.right_span = span(p, across > 1, columns);

    Rows r{}; /* as native.py has it */
    r.x = x.const_data_ptr(), r.m = p.m, r.k = r.ldx = p.k, r.group = group, r.scale_row = p.left_row;
    r.dtype = p.out, r.given = input_scale.has_value(), r.power_of_two = power_of_two;
    r.kind = integers ? NEAREST_INTEGERS : NEAREST_FLOATS;
    r.most = (float)(affine ? high - low : high), r.low = (float)low, r.high = (float)high, r.one_sided = low >= 0;
    if (!integers) {
        int exponent;
        std::frexp(high, &exponent);
        const int m = (int)mantissa, e = (int)emin, top = exponent - 1 > e ? exponent - 1 : e, sign = 1 << (bits - 1);
        r.mantissa = m, r.rebias = (126 + e) << m;
        r.shift = flush ? m : 0, r.steps = (float)std::ldexp(1, flush ? -e : m - e), r.least = (float)std::ldexp(1, e);
        r.last = (int)std::ldexp(high, m - top) + ((top - e) << m), r.sign = sign;
        r.nan = nan < 0 ? 0 : (int)nan, r.nan_sign = nan != sign, r.zero_sign = negative_zero;
    }
    return run_on(x, p, &r, input_scale, input_zeros, affine, bias);
}

static Tensor weight_only_quickly(const Tensor &x, const Tensor &codes, const Tensor &scale, int64_t rows,
                                 int64_t columns, MaybeTensor table, MaybeTensor bias) {
    static const float one = 1;
    Product p{};
    if (!weighs(p, x, codes, scale, rows, columns, table, bias) || !table) return Tensor();
    p.kind = p.out == BF16 ? FLOATS : REALS;
    if (p.kind == REALS && p.m > 4) return Tensor(); /* an FP32 matmul is faster */
    if (p.kind == REALS && is(codes, ScalarType::Char)) p.b_table = nullptr;
    const bool several = scale.size(1) > 1;
    p.stretch = several && columns < p.k ? columns : p.k;
    p.a = x.const_data_ptr(), p.lda = p.k, p.left = &one;
    p.left_span = span(p, false, 0), p.right_span = span(p, several, columns);
    return run_on(x, p, nullptr, std::nullopt, std::nullopt, false, bias);
}

/* The same operator by its steps, which are the law. */
template <class... T> static Tensor by_steps(const char *name, const T &...arguments) {
    std::array<StableIValue, sizeof...(T)> stack{torch::stable::detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

static Tensor linear(const Tensor &x, const Tensor &codes, const Tensor &scale, int64_t rows, int64_t columns,
                     MaybeTensor table, MaybeTensor bias, MaybeTensor input_table, MaybeTensor input_scale,
                     MaybeTensor input_zeros, int64_t group, bool affine, bool power_of_two, int64_t mantissa,
                     int64_t emin, double low, double high, bool flush, bool negative_zero, int64_t bits, int64_t nan) {
    Tensor y = quickly(x, codes, scale, rows, columns, table, bias, input_table, input_scale, input_zeros, group,
                       affine, power_of_two, mantissa, emin, low, high, flush, negative_zero, bits, nan);
    return y.defined() ? y
                       : by_steps("octavo::linear_by_steps", x, codes, scale, rows, columns, table, bias, input_table,
                                  input_scale, input_zeros, group, affine, power_of_two, mantissa, emin, low, high,
                                  flush, negative_zero, bits, nan);
}

static Tensor linear_weight_only(const Tensor &x, const Tensor &codes, const Tensor &scale, int64_t rows,
                                 int64_t columns, MaybeTensor table, MaybeTensor bias) {
    Tensor y = weight_only_quickly(x, codes, scale, rows, columns, table, bias);
    return y.defined() ? y
                       : by_steps("octavo::linear_weight_only_by_steps", x, codes, scale, rows, columns, table, bias);
}

STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only));
}
