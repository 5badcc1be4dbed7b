"""Operations on codes against TensorFlow Lite's rules in Python's own integers, and against their simulation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.core.formats import INT4, INT8, UINT8
from octavo.core.requantize import INT32_MAX, INT32_MIN, fixed_point, multiply_fixed_point
from octavo.errors import OctavoError
from octavo.nn.integer.elementwise import Add, Clamp, Concatenate, Constant, Lookup, Multiply
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.model import OPS, Input, IntegerModel
from octavo.nn.integer.moves import Move, Pad, Reshape
from octavo.nn.integer.op import rescale
from octavo.nn.integer.pools import AdaptiveAveragePool, AdaptiveMaxPool, AveragePool, Maximum, MaxPool, Mean
from octavo.nn.integer.sums import Convolution, Linear


class Oracle:
    """gemmlowp's and TensorFlow Lite's arithmetic on Python's integers, as their sources have it."""

    @staticmethod
    def multiplier(real):
        """QuantizeMultiplier."""
        if real == 0:
            return 0, 0
        q, shift = math.frexp(real)
        fixed = math.floor(q * 2**31 + 0.5)
        if fixed == 2**31:
            fixed, shift = fixed // 2, shift + 1
        return (0, 0) if shift < -31 else (fixed, shift)

    @staticmethod
    def high_mul(a, b):
        """SaturatingRoundingDoublingHighMul."""
        if a == b == -(2**31):
            return 2**31 - 1
        total = a * b + (2**30 if a * b >= 0 else 1 - 2**30)
        return total // 2**31 if total >= 0 else -(-total // 2**31)

    @staticmethod
    def divide_by_power(x, exponent):
        """RoundingDivideByPOT."""
        mask = 2**exponent - 1
        return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0))

    @classmethod
    def multiply(cls, x, real):
        """MultiplyByQuantizedMultiplier."""
        fixed, shift = cls.multiplier(real)
        raised = min(max(x << max(shift, 0), -(2**31)), 2**31 - 1)
        return cls.divide_by_power(cls.high_mul(raised, fixed), max(-shift, 0))

    @staticmethod
    def divide(total, count):
        """As AveragePool divides: in C, where integers are cut off toward zero."""
        half = count // 2
        return (total + half) // count if total > 0 else -((half - total) // count)


def code(x, encoding):
    return min(max(x + encoding.zero_point, encoding.low), encoding.high)


def encoding(scale, zero_point=0, low=None, high=None, fmt=INT8):
    scale = float(torch.tensor(scale, dtype=torch.float32))
    return Encoding(scale, zero_point, fmt.low if low is None else low, fmt.high if high is None else high, fmt)


@st.composite
def encodings(draw, low=-4.0, high=1.0):
    fmt = draw(st.sampled_from([INT8, UINT8, INT4]))
    zero_point = draw(st.integers(fmt.low, fmt.high))
    bounds = sorted(draw(st.tuples(st.integers(fmt.low, fmt.high), st.integers(fmt.low, fmt.high))))
    if draw(st.booleans()):
        bounds = [fmt.low, fmt.high]
    return encoding(10 ** draw(st.floats(low, high)), zero_point, *bounds, fmt)


def codes(shape, encoding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(encoding.low, encoding.high + 1, shape, generator=generator).to(encoding.dtype)


def check(op, *given):
    """``rounded`` equals ``forward``, in the encoding's range; the codes are returned."""
    result = op(*given)
    values = [e.values(x) for e, x in zip(op.inputs, given, strict=True)]
    assert result.dtype == op.output.dtype
    assert torch.equal(op.rounded(*values), op.output.values(result))
    assert result.numel() == 0 or op.output.low <= int(result.min()) <= int(result.max()) <= op.output.high
    if len(given) and not isinstance(op, Lookup):
        step = op.output.fake_quantize(op.real(*values)) - op.output.values(result)
        assert float(step.abs().max()) <= 1.001 * op.output.scale  # never more than a code from plain rounding
    return result


def weights(shape, seed=0, size=127, dead=()):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-size, size + 1, shape, generator=generator).to(torch.int8)
    weight[list(dead)] = 0
    scale = torch.rand(shape[0], generator=generator) * 0.02 + 1e-4
    bias = torch.randint(-20000, 20001, shape[:1], generator=generator, dtype=torch.int32)
    return weight, scale, bias


@given(st.integers(INT32_MIN, INT32_MAX), st.floats(1e-11, 1e6))
def test_rescaling_in_float64_is_that_of_integers(x, real):
    multiplier, shift = fixed_point(real)
    numbers = torch.tensor([x, -x - 1, x // 7, INT32_MIN, INT32_MAX, 0, 1, -1])
    numbers = torch.cat([numbers, (torch.arange(-8, 9) + 0.5).div(real).clamp(-(2.0**31), 2.0**31 - 1).long()])  # ties
    exact = multiply_fixed_point(numbers, multiplier, shift)
    assert torch.equal(rescale(numbers.double(), multiplier, shift), exact.double())
    assert exact.tolist() == [Oracle.multiply(n, real) for n in numbers.tolist()]


@pytest.mark.parametrize("fmt", [INT8, UINT8])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_convolution_is_tensorflow_lites(fmt, groups, depth):
    source = encoding(0.03, fmt.low + 9, fmt=fmt)
    target = encoding(0.05, fmt.low + 140, fmt.low + 100, fmt.low + 230, fmt=fmt)
    weight, scale, bias = weights((8, depth, 3, 2), dead=[1])
    scale[2], bias[3] = 1e-12, 2**28  # one multiplier below 2**-32, one channel that saturates
    stride, padding, dilation = (2, 1), ((1, 0), (2, 1)), (1, 2)
    op = Convolution([source], target, weight, scale, bias, stride, padding, dilation, groups)
    x = codes((2, depth * groups, 5, 4), source)
    result = check(op, x)
    numbers = x.long().sub(source.zero_point).tolist()
    sizes = (5 + 1 - 2 - 1) // 2 + 1, 4 + 3 - 2
    assert result.shape == (2, 8, *sizes)
    for n, channel, i, j in itertools.product(range(2), range(8), *map(range, sizes)):
        total, first = int(bias[channel]), channel * groups // 8 * depth
        for c, u, v in itertools.product(range(depth), range(3), range(2)):
            row, col = i * 2 + u - 1, j + 2 * v - 2
            if 0 <= row < 5 and 0 <= col < 4:
                total += numbers[n][first + c][row][col] * int(weight[channel, c, u, v])
        wanted = code(Oracle.multiply(total, source.scale * float(scale[channel]) / target.scale), target)
        assert int(result[n, channel, i, j]) == wanted


@pytest.mark.parametrize("shape", [(3, 20), (2, 5, 20), (20,), (0, 20)])
def test_linear_is_tensorflow_lites(shape):
    source, target = encoding(0.03, -100), encoding(0.4, 11)
    weight, scale, bias = weights((6, 20))
    op = Linear([source], target, weight, scale, bias)
    x = codes(shape, source)
    result = check(op, x) if x.numel() else op(x)
    totals = (x.long() - source.zero_point) @ weight.long().T + bias
    wanted = [
        [
            code(Oracle.multiply(t, source.scale * s / target.scale), target)
            for t, s in zip(row, scale.tolist(), strict=True)
        ]
        for row in totals.reshape(-1, 6).tolist()
    ]
    assert result.shape == (*shape[:-1], 6)
    assert result.reshape(-1, 6).tolist() == wanted


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_of_a_spread_input_is_a_transposed_one(dims):
    source, target = encoding(0.03, 20), encoding(0.2, -7)
    weight, scale, bias = weights((4, 3, *(3,) * dims))
    stride, dilation, sides = (2,) * dims, (2,) * dims, ((4 - 1, 4 - 1 + 1),) * dims
    op = Convolution([source], target, weight, scale, bias, (1,) * dims, sides, dilation, 2, stride)
    x = codes((2, 6, *(4,) * dims), source)
    check(op, x)
    values = source.values(x)
    back = op._real_weight.flip(*range(2, dims + 2)).unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    wanted = transposed(values, back, op.bias * op._unit, stride, 1, 1, 2, dilation)
    torch.testing.assert_close(op.real(values), wanted)


@given(encodings(), encodings(), encodings(-2.0, 1.0), st.sampled_from([1, -1]), st.integers(0, 99))
def test_addition_is_tensorflow_lites(a, b, out, sign, seed):
    op = Add([a, b], out.coarser(max(a.scale, b.scale) / 256), sign)
    x, y = codes((40,), a, seed), codes((40,), b, seed + 1)
    result = check(op, x, y)
    common = 2 * max(a.scale, b.scale)
    for m, n, r in zip(x.tolist(), y.tolist(), result.tolist(), strict=True):
        first = Oracle.multiply((m - a.zero_point) << 20, a.scale / common)
        second = Oracle.multiply((n - b.zero_point) << 20, b.scale / common)
        wanted = Oracle.multiply(first + sign * second, common / (2**20 * op.output.scale))
        assert r == code(wanted, op.output)


@given(encodings(), encodings(), encodings(), st.integers(0, 99))
def test_multiplication_is_tensorflow_lites(a, b, out, seed):
    op = Multiply([a, b], out.coarser(a.scale * b.scale / 256))
    x, y = codes((5, 1, 4), a, seed), codes((3, 1), b, seed + 1)  # broadcast
    result = check(op, x, y)
    for i, j, k in itertools.product(range(5), range(3), range(4)):
        product = (int(x[i, 0, k]) - a.zero_point) * (int(y[j, 0]) - b.zero_point)
        wanted = Oracle.multiply(product, a.scale * b.scale / op.output.scale)
        assert int(result[i, j, k]) == code(wanted, op.output)


def test_concatenation_brings_all_to_one_scale():
    parts = [encoding(0.1, 5), encoding(0.07, -128), encoding(0.2, 60)]
    out = encoding(0.1, 5)
    op = Concatenate(parts, out, dim=-1)
    given = [codes((3, n), e, n) for n, e in zip((4, 1, 7), parts, strict=True)]
    result = check(op, *given)
    assert torch.equal(result[:, :4], given[0])  # its scale already
    wanted = [(x.double() - e.zero_point) * e.scale / out.scale for x, e in zip(given, parts, strict=True)]
    nearest = torch.cat(wanted, -1).round().add(out.zero_point).clamp(-128, 127)
    assert torch.equal(result.double(), nearest)


@given(
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(0, 2)] * 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, 3]),
    st.sampled_from([INT8, UINT8]),
)
def test_average_pool_is_tensorflow_lites(size, stride, padding, ceil_mode, count_padding, divisor, fmt):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, size, strict=True))
    windows = [(k, s, p, 1, ceil_mode) for k, s, p in zip(size, stride, padding, strict=True)]
    source = encoding(0.5, fmt.low + 77, fmt=fmt)
    op = AveragePool([source], source, windows, count_padding, divisor)
    x = codes((2, 7, 6), source)
    result = check(op, x)
    shape = F.avg_pool2d(x.float().unsqueeze(0), size, stride, padding, ceil_mode).shape[-2:]
    assert result.shape[-2:] == shape
    for n, i, j in itertools.product(range(2), *map(range, shape)):
        rows, cols = range(i * stride[0] - padding[0], 99)[: size[0]], range(j * stride[1] - padding[1], 99)[: size[1]]
        inside = [(r, c) for r in rows for c in cols if 0 <= r < 7 and 0 <= c < 6]
        padded = [1 for r in rows for c in cols if r < 7 + padding[0] and c < 6 + padding[1]]
        count = divisor or len(padded if count_padding else inside)
        total = sum(int(x[n, r, c]) - source.zero_point for r, c in inside) + count * source.zero_point
        assert int(result[n, i, j]) == min(max(Oracle.divide(total, count), fmt.low), fmt.high)


@pytest.mark.parametrize("dims", [[-1], [-3, -1], [-4, -3, -2, -1]])
@pytest.mark.parametrize("keepdim", [False, True])
def test_mean_rescales_the_sum_and_divides(dims, keepdim):
    source, target = encoding(0.5, -30), encoding(0.11, 3)
    op = Mean([source], target, dims, keepdim)
    x = codes((2, 3, 4, 5), source)
    result = check(op, x)
    count = math.prod(x.shape[d] for d in dims)
    totals = (x.long() + 30).sum(dims, keepdim)
    assert result.shape == totals.shape
    wanted = [Oracle.multiply(n, source.scale / target.scale) + 3 * count for n in totals.flatten().tolist()]
    assert result.flatten().tolist() == [min(max(Oracle.divide(n, count), -128), 127) for n in wanted]


@pytest.mark.parametrize("size", [(1,), (3, None), (5, 2, 7)])
def test_adaptive_pools_have_torchs_parts(size):
    source = encoding(0.5, 10)
    x = codes((2, 6, 7, 11)[-len(size) - 1 :], source)
    target = encoding(0.31, -4)
    check(AdaptiveAveragePool([source], target, size), x)
    check(AdaptiveMaxPool([source], source, size), x)
    narrow = encoding(0.001)
    assert check_range(AdaptiveAveragePool([source], narrow, size)(x))  # saturates


def check_range(x):
    return int(x.min()) == -128 and int(x.max()) == 127


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans(), st.integers(1, 3))
def test_max_pool_is_torchs(size, stride, padding, dilation, ceil_mode, dims):
    source = encoding(0.25, -20, -90, 100)
    op = MaxPool([source], source, [(size, stride, min(padding, size // 2), dilation, ceil_mode)] * dims)
    check(op, codes((2, 3, *(8,) * dims), source))


def test_choosing_and_moving_keep_codes():
    source = encoding(0.25, -20, -90, 100)
    x = codes((2, 8, 4, 6), source)
    assert torch.equal(check(Maximum([source], source, [-1, -2]), x), x.amax((-1, -2)))
    assert torch.equal(check(Move([source], source, "permute.default", [[0, 2, 3, 1]]), x), x.permute(0, 2, 3, 1))
    assert torch.equal(check(Move([source], source, "pixel_shuffle.default", [2]), x), F.pixel_shuffle(x, 2))
    up = check(Move([source], source, "upsample_nearest2d.vec", [None, [2.0, 1.5]]), x)
    assert torch.equal(up.float(), F.interpolate(x.float(), scale_factor=(2.0, 1.5)))
    padded = check(Pad([source], source, [(1, 0), (-1, 2)], -20), x)
    assert torch.equal(padded, F.pad(x, (-1, 2, 1, 0), value=-20))
    reshaped = check(Reshape([source], source, [-1, 2, 4, -1, 6], [(0, 0)]), x)
    assert torch.equal(reshaped, x.reshape(2, 2, 4, 4, 6))
    with pytest.raises(OctavoError, match="does not only move"):
        Move([source], source, "exponential_.default")
    with pytest.raises(OctavoError, match="has its input's encoding"):
        MaxPool([source], encoding(0.5), [(2, 2)])


def test_tables_clamps_and_constants():
    source = encoding(0.05, 10, -100, 90)
    x = codes((3, 4, 5), source)
    relu = source.limited(0.0, 1.0)
    assert (relu.low, relu.high) == (10, 30)
    assert torch.equal(check(Clamp([source], relu), x), x.clamp(10, 30))
    target = encoding(1 / 128, 0)
    values = source.values(torch.arange(-100, 91))
    table = target.quantize(torch.stack([values.tanh(), values.sigmoid(), values * 0, values, -values]))
    each = check(Lookup([source], target, table, dim=-1), x)
    reals = source.values(x)
    assert torch.equal(each[..., 0], target.quantize(reals[..., 0].tanh()))
    assert torch.equal(each[..., 4], target.quantize(-reals[..., 4]))
    assert torch.equal(check(Lookup([source], target, table[1]), x), target.quantize(reals.sigmoid()))
    assert torch.equal(check(Constant([], source, x)), x)
    with pytest.raises(OctavoError, match="table has 191 codes"):
        Lookup([source], target, table[:, :-1], dim=-1)
    with pytest.raises(OctavoError, match="between -100 and 90"):
        Constant([], source, torch.tensor([100], dtype=torch.int8))


def test_sums_beyond_int32_are_refused_ahead():
    source, target = encoding(0.1, fmt=UINT8), encoding(0.1)
    weight = torch.full((2, 70000), 127, dtype=torch.int8)
    scale, bias = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(OctavoError, match="output channel 0 may reach 2,266,950,000"):
        Linear([source], target, weight, scale, bias)
    weight[:, 60000:] = 0
    op = Linear([source], target, weight, scale, bias)
    x = torch.full((1, 70000), 255, dtype=torch.uint8)
    check(op, x)
    assert int(op._sums((x.short() - 128).to(torch.int8))[0, 0] + op.offset[0]) == 255 * 127 * 60000
    bias[1] = INT32_MAX
    with pytest.raises(OctavoError, match="output channel 1"):
        Linear([source], target, weight, scale, bias)


@pytest.mark.parametrize(
    ("scale", "zero_point", "low", "high"),
    [(0.0, 0, -1, 1), (math.inf, 0, -1, 1), (0.1, 0, -1, 1), (1.0, 0, -129, 1), (1.0, 300, -1, 1), (1.0, 0, 2, 1)],
)
def test_encodings_that_cannot_be(scale, zero_point, low, high):
    with pytest.raises(OctavoError):
        Encoding(scale, zero_point, low, high)


class NoFloats(TorchDispatchMode):
    """Fails on every operator that takes or makes a floating-point tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            assert not (isinstance(x, torch.Tensor) and x.dtype.is_floating_point), func
        return result


def every_operation():
    """One of each operation, from codes [2, 4, 6, 6] of one encoding."""
    e, out = encoding(0.05, -10), encoding(0.1, 3)
    table = e.clamp(torch.arange(-128, 128).flip(0))
    windows = [(3, 2, 1, 1, True)] * 2
    return [
        Linear([e], out, *weights((4, 6))),
        Convolution([e], out, *weights((4, 4, 3, 3)), (1, 2), ((1, 1), (1, 2)), (1, 1)),
        Convolution([e], out, *weights((8, 1, 3, 3)), (1, 1), ((1, 1), (1, 1)), (2, 1), 4, (2, 2)),
        Add([e, e], out),
        Multiply([e, e], out),
        Concatenate([e, e], out),
        MaxPool([e], e, windows),
        AveragePool([e], e, windows),
        AdaptiveAveragePool([e], out, [4, 1]),
        Mean([e], out, [-1]),
        AdaptiveMaxPool([e], e, [4, 1]),
        Maximum([e], e, [-1]),
        Clamp([e], e.limited(0, 1)),
        Lookup([e], e, table),
        Lookup([e], e, table.repeat(4, 1), -3),
        Constant([], e, table),
        Pad([e], e, [(1, 2)], 5),
        Reshape([e], e, [-1, 6]),
        Move([e], e, "flip.default", [[1]]),
    ]


@pytest.mark.parametrize("op", every_operation(), ids=lambda op: type(op).__name__)
def test_no_operation_makes_a_float(op):
    x = codes((2, 4, 6, 6), op.inputs[0]) if op.inputs else None
    with NoFloats():
        result = op(*[x] * len(op.inputs))
    assert result.dtype == op.output.dtype
    assert not any(buffer.is_floating_point() for name, buffer in op.named_buffers() if name != "weight_scale")


def test_every_operation_is_in_the_list():
    assert {type(op) for op in every_operation()} == {*OPS.values()}


def small_model():
    e, out = encoding(0.05, -10), encoding(0.11, 3)
    operations = [Linear([e], out, *weights((6, 6))), Clamp([out], out.limited(0, 5)), Add([e, out.limited(0, 5)], out)]
    inputs = [Input("x", e, ("a", 6))]
    return IntegerModel(inputs, operations, [[0], [1], [0, 2]], ["fc", "relu", "add"], {"y": (3, [1, None])})


def test_a_model_runs_simulates_and_says_how_far_it_drifts():
    model, x = small_model(), torch.randn(50, 6) * 4
    y, simulated = model(x), model.simulate(x=x)
    assert [*y] == ["y"] and y["y"][1][1] is None
    assert torch.equal(y["y"][0], simulated["y"][0]) and torch.equal(y["y"][1][0], simulated["y"][1][0])
    plain = model.simulate(x, fixed_point=False)["y"][0]
    drift = {d.name: d for d in model.drift(x)}
    assert [*drift] == ["fc", "relu", "add"]
    assert drift["add"].share == pytest.approx(float((plain != y["y"][0]).double().mean()))
    assert all(0 <= d.share < 0.05 and d.most <= 1 for d in drift.values())
    with NoFloats():
        model.run([codes((3, 6), model.inputs[0].encoding)])
    assert model(torch.empty(0, 6))["y"][0].shape == (0, 6)
    assert torch.equal(model.half()(x)["y"][0], y["y"][0])  # nothing in there is a float that could be rounded


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ([torch.zeros(3, 5)], {}, r"shape \[3, 5\]; the model was made for \[a, 6\]"),
        ([torch.zeros(3, 6).long()], {}, "is a float tensor, not torch.int64"),
        ([torch.full((1, 6), math.nan)], {}, "6 NaN"),
        ([], {}, "takes x, each once"),
        ([torch.zeros(1, 6)], {"x": torch.zeros(1, 6)}, "each once"),
        ([torch.zeros(1, 6), torch.zeros(1, 6)], {}, "each once"),
    ],
)
def test_inputs_that_do_not_fit(args, kwargs, why):
    with pytest.raises(OctavoError, match=why):
        small_model()(*args, **kwargs)


def test_infinities_saturate():
    x = torch.tensor([[math.inf, -math.inf, 1e30, -1e30, 0.0, 0.05]])
    assert small_model().quantize(x)[0].tolist() == [[127, -128, 127, -128, -10, -9]]


def test_models_whose_parts_do_not_fit():
    e, out = encoding(0.05, -10), encoding(0.1, 3)
    linear = Linear([e], out, *weights((6, 6)))
    inputs = [Input("x", e, (6,))]
    for wiring, result in (([[1]], 1), ([[0, 0]], 1), ([[True]], 1), ([[0]], 7), ([[0]], []), ([], 0)):
        with pytest.raises(OctavoError):
            IntegerModel(inputs, [linear], wiring, ["fc"], result)
    model = IntegerModel([Input("x", e, ("a",))], [linear], [[0]], ["fc"], 1)
    with pytest.raises(OctavoError, match=r"fc cannot take \[7\]"):
        model(torch.zeros(7))
