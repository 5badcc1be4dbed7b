"""8-bit convolutions against float64 ones on the very integers, against sums written out, and in real networks."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from octavo.core import schemes
from octavo.core.cast import quantize_scaled, quantize_unchecked
from octavo.core.scaling import scale_of_range
from octavo.nn import conv, swap
from octavo.nn.conv import QuantizedConv, QuantizedConvTranspose

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AFFINE = Scheme(Cast("INT8", PerChannel(0)), Cast("UINT8", PerToken(), affine=True))
BOTH_AFFINE = Scheme(Cast("INT8", PerTensor(), affine=True), Cast("INT8", PerTensor(), affine=True))
INTEGERS = {
    "int8-dynamic": schemes.INT8_DYNAMIC,
    "affine": AFFINE,
    "both affine": BOTH_AFFINE,
    "int8-static": schemes.INT8_STATIC,
    "int8-affine-static": schemes.INT8_AFFINE_STATIC,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def eight_bit(layer, scheme, x=None):
    """The 8-bit layer, calibrated on ``x`` where the scheme is static."""
    kind = QuantizedConvTranspose if layer.transposed else QuantizedConv
    if not scheme.static:
        return kind.from_float(layer, scheme)
    weight = quantize_unchecked(kind.matrix(layer).detach(), scheme.weight, layer.weight.dtype)
    low, high = (0, 0) if x is None or x.numel() == 0 else (x.min(), x.max())
    edges = torch.as_tensor(low).float(), torch.as_tensor(high).float()
    scale, zero_point = scale_of_range(*edges, scheme.input.format, scheme.input.affine)
    return kind.replacing(layer, weight, scheme, input_scale=scale, input_zero_point=zero_point)


def by_output_channel(layer, how):
    """Unscaled weights in torch's shape, as float64, with one scale an output channel: written out."""
    weight, numbers = layer.weight.detach(), torch.zeros(layer.weight.shape, dtype=torch.float64)
    per_group, scales = layer.out_channels // layer.groups, []
    inputs = layer.in_channels // layer.groups
    whole = quantize_unchecked(weight.flatten()[None], how)
    for channel in range(layer.out_channels):
        group = channel // per_group
        mine = slice(group * inputs, (group + 1) * inputs)
        place = (mine, channel % per_group) if layer.transposed else (channel,)
        if isinstance(how.granularity, PerTensor):
            scales.append(whole.scale.item())
            numbers[place] = whole.numbers(torch.float64).view(weight.shape)[place]
        else:
            q = quantize_unchecked(weight[place].flatten()[None], how)
            scales.append(q.scale.item())
            numbers[place] = q.numbers(torch.float64).view(weight[place].shape)
    return numbers, torch.tensor(scales)


def in_float64(layer, x, weight, **arguments):
    """Torch's convolution in float64, with every kind of padding, without bias."""
    spatial = layer.weight.ndim - 2
    x, weight = x.double(), weight.double()
    if layer.transposed:
        extra = layer._output_padding(x, arguments.get("output_size"), *each(layer), spatial, layer.dilation)
        geometry = (layer.stride, layer.padding, extra, layer.groups, layer.dilation)
        return CONVOLVE_TRANSPOSED[spatial](x, weight, None, *geometry)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
    return CONVOLVE[spatial](x, weight, None, layer.stride, padding, layer.dilation, layer.groups)


def each(layer):
    return layer.stride, layer.padding, layer.kernel_size


def law(layer, ours, x, **arguments):
    """Exact integer sums, then scales and bias in FP32: what the layer must give bit for bit."""
    scheme, spatial = ours.scheme, layer.weight.ndim - 2
    rows = x.flatten(1)
    if scheme.static:
        q = quantize_scaled(rows, scheme.input, ours.input_scale, ours.input_zero_point)
    else:
        q = quantize_unchecked(rows, scheme.input)
    numbers, scales = by_output_channel(layer, scheme.weight)
    sums = in_float64(layer, q.numbers(torch.float64).view(x.shape), numbers, **arguments)
    assert torch.equal(sums, sums.round())
    y = sums.float() * q.scale.view(-1, *(1,) * (spatial + 1)) * scales.view(-1, *(1,) * spatial)
    return (y if layer.bias is None else y + layer.bias.detach().view(-1, *(1,) * spatial)).to(x.dtype)


@st.composite
def cases(draw):
    spatial, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 6]))
    inputs, outputs = (groups * draw(st.integers(1, 4)) for _ in range(2))

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    kernel, stride, dilation = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    common = {"groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    samples = draw(st.sampled_from([0, 1, 2, 3]))
    if draw(st.booleans()):
        padding = tuple(draw(st.integers(0, span + 1)) for span in spans)
        least = [1 + max(0, -(-(2 * p - span) // s)) for p, span, s in zip(padding, spans, stride, strict=True)]
        size = tuple(n + draw(st.integers(0, 4)) for n in least)
        extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
        layer = TRANSPOSED[spatial](inputs, outputs, kernel, stride, padding, output_padding=extra, **common)
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from(["valid", "same", "numbers"]))
        if padding == "same":
            stride = (1,) * spatial
        if padding == "numbers":
            padding = numbers(0, 2)
        size = tuple(span + 1 + draw(st.integers(0, 6)) for span in spans)
        if mode != "zeros":  # which take a border from within the input
            size = tuple(max(n, span + 4) for n, span in zip(size, spans, strict=True))
        layer = CONVOLUTIONS[spatial](inputs, outputs, kernel, stride, padding, padding_mode=mode, **common)
    if samples == 0 and layer.padding_mode != "zeros":
        samples = 1  # torch pads no empty batch
    return layer, torch.randn(samples, inputs, *size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(sorted(INTEGERS)))
def test_equals_exact_integers(case, name):
    layer, x = case
    ours = eight_bit(layer, INTEGERS[name], x)
    y, expected = ours(x), law(layer, ours, x)
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    if len(x):
        assert torch.equal(ours(x[0]), ours(x[:1])[0])


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(sorted(set(schemes.NAMES) - {"llm-int8"})))
def test_every_scheme_against_float64(case, name):
    """What dequantized numbers give in float64, within the bound of FP32 summation."""
    layer, x = case
    scheme = schemes.NAMES[name]
    if isinstance(scheme.input and scheme.input.granularity, PerGroup):
        return  # quantizes patches: below
    ours = eight_bit(layer, scheme, x)
    weight = ours._in_shape(ours.quantized_weight.dequantize(torch.float64))
    inputs = x.double()
    if scheme.input is not None:
        inputs = ours.quantize_input(x.flatten(1)).dequantize(torch.float64).view(x.shape)
    expected, size = (in_float64(layer, *pair) for pair in ((inputs, weight), (inputs.abs(), weight.abs())))
    if layer.bias is not None:
        expected = expected + layer.bias.detach().view(-1, *(1,) * (x.ndim - 2))
    terms = ours.codes.shape[1] + 4
    assert bool(((ours(x) - expected).abs() <= terms * 2**-23 * (size + expected.abs())).all())


def patches(layer, x):
    """The numbers that each number of the output sums, [N · places, groups, K], straight from the definition."""
    spatial = layer.weight.ndim - 2
    places = layer(x).shape[2:]
    inputs = layer.in_channels // layer.groups
    rows = []
    for sample, place in itertools.product(range(len(x)), itertools.product(*map(range, places))):
        row = torch.zeros(layer.groups, *layer.weight.shape[2:], inputs)
        for tap in itertools.product(*map(range, layer.kernel_size)):
            at = []
            for o, t, k, s, p, d in zip(
                place, tap, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
            ):
                if layer.transposed:
                    where, rest = divmod(o + p - (k - 1 - t) * d, s)
                    at.append(-1 if rest else where)
                else:
                    at.append(o * s - p + t * d)
            if all(0 <= i < n for i, n in zip(at, x.shape[2:], strict=True)):
                row[(slice(None), *tap)] = x[(sample, slice(None), *at)].view(layer.groups, inputs)
        rows.append(row.flatten(1))
    return torch.stack(rows), (len(x), *places), spatial


PATCHED = {
    "strided": lambda: (nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0)), (2, 6, 7, 5)),
    "grouped": lambda: (nn.Conv1d(8, 6, 5, 1, 2, dilation=2, groups=2), (2, 8, 11)),
    "cube": lambda: (nn.Conv3d(3, 4, 2, padding=1), (1, 3, 3, 2, 4)),
    "transposed": lambda: (nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2), (2, 6, 3, 4)),
    "transposed far": lambda: (nn.ConvTranspose1d(4, 3, 3, 4, dilation=2), (1, 4, 5)),
}


@pytest.mark.parametrize("name", ["int8-group64", "fp8-block", "e3m4-int8-group64", "groups of 5 and 7"])
@pytest.mark.parametrize("case", PATCHED)
def test_groups_along_patches(case, name):
    layer, shape = PATCHED[case]()
    seven = Scheme(Cast("INT8", PerGroup(7)), Cast("INT8", PerGroup(5)))
    scheme = seven if name.startswith("groups") else schemes.get(name)
    x = torch.randn(shape)
    ours = eight_bit(layer, scheme)
    rows, (samples, *places), _ = patches(layer, x)
    matrix = type(ours).matrix(layer).detach()
    weights = quantize_unchecked(matrix, scheme.weight).dequantize(torch.float64).view(layer.groups, -1, rows.shape[-1])
    cast = torch.stack(
        [quantize_unchecked(rows[:, g], scheme.input).dequantize(torch.float64) for g in range(layer.groups)], 1
    )
    y = torch.einsum("mgk,gok->mgo", cast, weights).flatten(1).view(samples, *places, -1).movedim(-1, 1)
    expected = y + layer.bias.detach().double().view(-1, *(1,) * len(places))
    torch.testing.assert_close(ours(x).double(), expected, rtol=1e-5, atol=1e-5)
    # and the oracle is right where nothing is cast
    plain = torch.einsum("mgk,gok->mgo", rows, matrix.view(weights.shape)).flatten(1).view(samples, *places, -1)
    bias = layer.bias.view(-1, *(1,) * len(places))
    torch.testing.assert_close(plain.movedim(-1, 1) + bias, layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize("k", [1024, 1025, 1300])
def test_many_groups_are_exact_up_to_the_edge(kind, k):
    """Sums of K · 127² stay exact where torch's FP32 convolution cannot count any further."""
    layer = kind(2, 2, k, groups=2, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.ones(1, 2, k) if kind is nn.Conv1d else torch.ones(1, 2, k + 9)
    x[..., ::7] = 1 - 1 / 127
    ours = eight_bit(layer, schemes.INT8_DYNAMIC)
    assert torch.equal(ours(x), law(layer, ours, x))
    ours = eight_bit(layer, schemes.INT8_AFFINE_STATIC, x)
    assert torch.equal(ours(x), law(layer, ours, x))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Cast("INT8", PerGroup(4)), Cast("INT8", PerToken())),
        Scheme(Cast("INT8", PerBlock(3, 4)), Cast("UINT8", PerToken(), affine=True)),
        Scheme(Cast("INT8", PerChannel(1), affine=True), Cast("E4M3FN", PerTensor())),
        Scheme(Cast("E4M3FN", PerBlock(4, 128)), Cast("E4M3FN", PerToken())),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_weights_with_scales_of_every_kind(scheme, groups):
    layer, x = nn.Conv2d(6, 12, 3, 2, 1, groups=groups), torch.randn(2, 6, 7, 8)
    ours = eight_bit(layer, scheme)
    matrix = layer.weight.detach().permute(0, 2, 3, 1).reshape(12, -1)  # the kernel's places, then channels
    weight = quantize_unchecked(matrix, scheme.weight).dequantize(torch.float64)
    weight = weight.view(12, 3, 3, 6 // groups).permute(0, 3, 1, 2)
    assert torch.equal(ours.weight, weight.float())
    inputs = quantize_unchecked(x.flatten(1), scheme.input).dequantize(torch.float64).view(x.shape)
    expected = in_float64(layer, inputs, weight) + layer.bias.detach().double()[:, None, None]
    torch.testing.assert_close(ours(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_in_16_bits_and_inputs_in_16_bits():
    for name in ("w8a16", "w16a8"):
        for groups in (1, 4):
            layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 9, 9)
            assert ov.sqnr(layer(x), eight_bit(layer, schemes.get(name))(x)) > 40


def test_padding_is_zero_under_a_zero_point():
    """All inputs positive: the zero point is the lowest code, and a border of zero *codes* would shine through."""
    x = torch.rand(2, 3, 6, 6) + 1
    for layer in (
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 3, 3, padding=1, groups=3),
        nn.ConvTranspose2d(3, 4, 3, 2),
    ):
        for scheme in (AFFINE, schemes.INT8_AFFINE_STATIC):
            assert ov.sqnr(layer(x), eight_bit(layer, scheme, x)(x)) > 35
            assert ov.sqnr(layer(x - 3), eight_bit(layer, scheme, x - 3)(x - 3)) > 35


def test_samples_do_not_see_each_other():
    for groups in (1, 6):
        layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        for name in ("int8-dynamic", "fp8-dynamic", "fp8-block"):
            ours = eight_bit(layer, schemes.get(name))
            x = torch.randn(3, 6, 5, 5)
            wild = torch.cat([x, torch.full((1, 6, 5, 5), 1e4)])
            assert torch.equal(ours(wild)[:3], ours(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("groups", [1, 6])
def test_nan_in_a_sample_stays_there(bad, groups):
    layer, x = nn.Conv2d(6, 6, 3, padding=1, groups=groups), torch.randn(3, 6, 5, 5)
    x[1, 2, 3, 4] = bad
    for name in ("int8-dynamic", "fp8-dynamic"):
        y = eight_bit(layer, schemes.get(name))(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
    whole = eight_bit(layer, schemes.INT8_STATIC, torch.ones(1))(x)
    assert whole.isnan().all()
    patched = eight_bit(layer, schemes.FP8_BLOCK)(x)
    assert patched[1].isnan().any()
    assert patched[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_dtypes(dtype, groups):
    layer = nn.Conv2d(8, 4, 3, padding=1, groups=groups).to(dtype)
    x = torch.randn(2, 8, 6, 6).to(dtype)
    for name in ("int8-dynamic", "fp8-dynamic", "int8-group64"):
        ours = eight_bit(layer, schemes.get(name))
        y = ours(x)
        assert y.dtype == ours.weight.dtype == dtype
        assert ov.sqnr(layer(x), y) > 22
    ours = eight_bit(layer, schemes.INT8_DYNAMIC)
    wide = eight_bit(layer, schemes.INT8_DYNAMIC).double()
    assert wide.codes.dtype == torch.int8
    assert wide.scale.dtype == torch.float32
    assert torch.equal(wide(x), ours(x))  # a bias in another dtype, but with the same value
    assert ours.bfloat16()(x).dtype == dtype


def test_autocast_leaves_the_codes_alone():
    for groups in (1, 8):
        ours = eight_bit(nn.Conv2d(8, 8, 3, groups=groups), schemes.INT8_DYNAMIC)
        x = torch.randn(2, 8, 6, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = ours(x)
        assert torch.equal(inside, ours(x))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", ["int8-dynamic", "int8-weight-only", "int8-group64"])
def test_memory_formats(groups, name):
    for layer, x, layout in (
        (nn.Conv2d(4, 8, 3, groups=groups), torch.randn(2, 4, 6, 7), torch.channels_last),
        (nn.Conv3d(4, 8, 3, groups=groups), torch.randn(2, 4, 6, 7, 5), torch.channels_last_3d),
    ):
        ours = eight_bit(layer, schemes.get(name))
        y = ours(x)
        assert y.is_contiguous()
        last = ours(x.contiguous(memory_format=layout))
        assert last.is_contiguous(memory_format=layout)
        torch.testing.assert_close(last, y, rtol=1e-6, atol=1e-6)
        turned = ours(x.transpose(-1, -2).contiguous().transpose(-1, -2))
        torch.testing.assert_close(turned, y, rtol=1e-6, atol=1e-6)
        layer.to(memory_format=layout)
        assert torch.equal(eight_bit(layer, schemes.get(name)).codes, ours.codes)


@pytest.mark.parametrize("name", ["int8-dynamic", "affine", "int8-group64", "fp8-dynamic"])
def test_patches_are_gathered_in_pieces(monkeypatch, name):
    layer, x = nn.Conv2d(6, 4, 3, 1, 1), torch.randn(5, 6, 8, 7)
    ours = eight_bit(layer, AFFINE if name == "affine" else schemes.get(name))
    whole = ours(x)
    for piece in (1, 54 * 7, 54 * 7 * 3, 54 * 56 * 2):
        monkeypatch.setattr(conv, "PIECE", piece)
        torch.testing.assert_close(ours(x), whole, rtol=1e-6 if name != "affine" else 0, atol=1e-6)


@pytest.mark.parametrize("name", ["int8-weight-only", "fp8-weight-only"])
def test_weight_only_is_torchs_own(name):
    for layer, x in (
        (nn.Conv2d(6, 6, 3, 2, 1, groups=3, padding_mode="circular"), torch.randn(2, 6, 9, 9)),
        (nn.Conv1d(6, 4, 4, padding="same"), torch.randn(2, 6, 9)),
        (nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), torch.randn(2, 6, 5, 5)),
    ):
        ours = eight_bit(layer, schemes.get(name))
        twin = copy.deepcopy(layer)
        twin.weight = nn.Parameter(ours.weight)
        assert torch.equal(ours(x), twin(x))
        assert torch.equal(ours(x[0]), twin(x[0]))
        gradient = torch.autograd.grad(ours(x.requires_grad_(True)).sum(), x)[0]
        assert gradient.shape == x.shape


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-weight-only"])
def test_output_size(name):
    layer = nn.ConvTranspose2d(4, 6, 3, (2, 3), 1, groups=2)
    ours, x = eight_bit(layer, schemes.get(name)), torch.randn(2, 4, 5, 4)
    for size in ((9, 10), (10, 12), torch.Size((2, 6, 10, 11))):
        y = ours(x, output_size=size)
        assert y.shape == layer(x, output_size=size).shape
        assert ov.sqnr(layer(x, output_size=size), y) > 30
    assert ours(x[0], [10, 12]).shape == (6, 10, 12)
    for size in ((11, 12), (8, 10), (9,)):
        with pytest.raises(OctavoError, match=r"output_size is from \[9, 10\] to \[10, 12\]"):
            ours(x, output_size=size)


def test_inputs_that_do_not_fit():
    ours = eight_bit(nn.Conv2d(4, 6, 3), schemes.INT8_DYNAMIC)
    for x in (torch.randn(2, 5, 6, 6), torch.randn(4, 6), torch.ones(2, 4, 6, 6, dtype=torch.int64)):
        with pytest.raises(OctavoError, match=r"floats \[N, 4, …\] with 4 dimensions, not"):
            ours(x)
    for layer in (nn.Conv2d(4, 6, 3, dilation=3), nn.Conv2d(4, 4, 3, dilation=3, groups=4)):
        with pytest.raises(OctavoError, match=r"the kernel \[3, 3\] \(dilation \[3, 3\]\) is larger than the input"):
            eight_bit(layer, schemes.INT8_DYNAMIC)(torch.randn(2, 4, 6, 7))


@pytest.mark.parametrize("granularity", [PerChannel(0), PerChannel(1), PerBlock(2, 2)])
def test_inputs_that_make_no_sense(granularity):
    scheme = Scheme(Cast("INT8", PerChannel(0)), Cast("INT8", granularity))
    with pytest.raises(OctavoError, match="0: the input of a convolution has one scale"):
        ov.quantize_(nn.Sequential(nn.Conv2d(4, 4, 3)), {"0": scheme})


def test_the_weight_can_be_read():
    for layer in (nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose3d(6, 4, 2, groups=2), nn.Conv1d(6, 6, 5, groups=6)):
        ours = eight_bit(layer, schemes.INT8_DYNAMIC)
        assert ours.weight.shape == layer.weight.shape
        assert ours.weight.stride() == layer.weight.stride()
        assert ov.sqnr(layer.weight, ours.weight) > 40
        _, scales = by_output_channel(layer, schemes.INT8_DYNAMIC.weight)
        assert torch.equal(ours.scale.flatten(), scales)


def test_geometry_is_what_torch_would_use():
    """People change strides and first layers of trained networks; torch then reads the attributes and the weight."""
    layer = nn.Conv2d(3, 8, 3, 2, 1)
    layer.stride, layer.dilation, layer.padding = 1, (2, 2), 2
    layer.weight = nn.Parameter(torch.randn(8, 5, 3, 3))
    x = torch.randn(2, 5, 9, 9)
    assert ov.sqnr(layer(x), eight_bit(layer, schemes.INT8_DYNAMIC)(x)) > 35
    assert ov.sqnr(layer(x), eight_bit(layer, schemes.INT8_WEIGHT_ONLY)(x)) > 35


def test_state_copies_and_words():
    layer = nn.Conv2d(6, 4, 3, 1, 1, groups=2, padding_mode="reflect", bias=False)
    ours = eight_bit(layer, AFFINE)
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    fresh = eight_bit(nn.Conv2d(6, 4, 3, 1, 1, groups=2, padding_mode="reflect", bias=False), AFFINE)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), ours(x))
    assert repr(ours).startswith(
        "QuantizedConv(6, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False, "
        "padding_mode='reflect', INT8 × UINT8"
    )
    assert not list(ours.parameters())
    assert not ours(x).requires_grad


def test_a_relu_that_it_took_over():
    x = torch.randn(2, 4, 6, 6)
    for groups, name in itertools.product((1, 4), ("int8-dynamic", "int8-weight-only")):
        ours = eight_bit(nn.Conv2d(4, 4, 3, groups=groups), schemes.get(name))
        expected = ours(x).clamp(0, 0.5)
        ours.clamp = (0.0, 0.5)
        assert torch.equal(ours(x), expected)
        assert "clamp=(0.0, 0.5)" in repr(ours)


class Separable(nn.Module):
    """Every kind of convolution on one path, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 5, 1, "same", groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.up = nn.ConvTranspose2d(24, 8, 4, 2, 1, groups=4)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.up(F.relu(self.pointwise(self.depthwise(F.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet():
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(depth_multiplier=0.25))


def vit():
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.ViTForImageClassification(config)


NETWORKS = {"separable": Separable, "resnet": resnet, "mobilenet": mobilenet, "vit": vit}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *itertools.product(("separable", "resnet", "vit"), ("int8-dynamic", "int8-affine-static", "fp8-dynamic")),
        ("mobilenet", "int8-affine-static"),
    ],
)
def test_networks(name, scheme):
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    summary = ov.quantize_(model, scheme, data=[x] if "static" in scheme else None)
    assert not [layer.name for layer in summary.left if "Conv" in layer.kind]
    assert sum("Conv" in layer.kind for layer in summary.quantized) >= 1
    assert all(layer.sqnr > 25 for layer in summary.quantized)
    assert sum(layer.bytes_after for layer in summary.quantized) < 0.5 * sum(x.bytes_before for x in summary.quantized)
    y = model(x)
    expected, y = (getattr(out, "logits", out) for out in (expected, y))
    assert ov.sqnr(expected, y) > (10 if name == "mobilenet" else 20)


def test_a_convolution_whose_weight_is_computed():
    """wav2vec2's: weight norm over the kernel's last dimension."""
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=2)
    model, x = nn.Sequential(layer), torch.randn(2, 8, 9)
    expected = model(x)
    ov.quantize_(model, "int8-dynamic")
    assert isinstance(model[0], QuantizedConv)
    assert ov.sqnr(expected, model(x)) > 35


def test_every_kind_has_an_eight_bit_form():
    for kinds, ours in ((CONVOLUTIONS, QuantizedConv), (TRANSPOSED, QuantizedConvTranspose)):
        assert all(swap.KINDS[kind] is ours for kind in kinds.values())


def layers_for_gradients():
    yield nn.Conv2d(8, 8, 3, padding=1), (2, 8, 6, 6)
    yield nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6)  # by torch, of unscaled numbers
    yield nn.ConvTranspose1d(8, 4, 3, stride=2), (2, 8, 6)
    yield nn.Conv1d(8, 4, 3), (8, 6)


@pytest.mark.parametrize("name", ["int8-weight-only", "fp8-weight-only"])
@pytest.mark.filterwarnings("error")
def test_floats_get_their_gradient(name):
    """As in linear layers: that of the float convolution with the weight that the codes stand for."""
    for layer, shape in layers_for_gradients():
        ours, x = eight_bit(layer, schemes.get(name)), torch.randn(shape, requires_grad=True)
        y = ours(x)
        upstream = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, upstream)
        (expected,) = torch.autograd.grad(ours.to_float()(x), x, upstream)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "scheme", [schemes.INT8_DYNAMIC, schemes.FP8_CSCALE, AFFINE, schemes.W8A16, "patches"], ids=str
)
@pytest.mark.filterwarnings("error")
def test_codes_have_no_gradient(scheme):
    """As in linear layers: the result does not pretend to have one, and its numbers are those without one."""
    patches = Scheme(Cast("INT8", PerChannel(0)), Cast("INT8", PerGroup(8)))
    scheme = patches if scheme == "patches" else schemes.get(scheme)
    for layer, shape in layers_for_gradients():
        ours, x = eight_bit(layer, scheme), torch.randn(shape)
        y = ours(x.clone().requires_grad_())
        assert not y.requires_grad
        assert torch.equal(y, ours(x))


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-weight-only", "fp8-cscale"])
@pytest.mark.parametrize("part", ["bias", "scale", "codes", "input"])
def test_half_on_meta(name, part):
    for layer, shape in layers_for_gradients():
        ours, x = eight_bit(layer, schemes.get(name)), torch.randn(shape)
        if part == "input":
            x = x.to("meta")
        else:
            setattr(ours, part, getattr(ours, part).to("meta"))
        with pytest.raises(OctavoError, match=r"QuantizedConv.*\(8, .* on meta"):
            ours(x)
        assert ours.to("meta")(x.to("meta")).is_meta
