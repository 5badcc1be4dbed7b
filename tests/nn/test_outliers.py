"""LLM.int8(): what is taken out, what the rest costs, and that without outliers nothing is different."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import pytorch_utils

import octavo as ov
from octavo import Cast, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from octavo.core import schemes
from octavo.core.cast import quantize_unchecked
from octavo.nn.linear import QuantizedLinear
from octavo.ops import outliers
from tests.nn import models

#: Every kind of input and weight that outliers can be taken out of.
VARIANTS = {
    "llm-int8": schemes.LLM_INT8,
    "zero points": Scheme(Cast("INT8", PerChannel(0), affine=True), Cast("UINT8", PerToken(), affine=True), 6.0),
    "zero point, per tensor": Scheme(Cast("INT8"), Cast("UINT8", PerTensor(), affine=True), 6.0),
    "per tensor": Scheme(Cast("INT8"), Cast("INT8"), 6.0),
    "row-wise": Scheme(Cast("INT8"), Cast("INT8", PerToken()), 6.0),
    "groups": Scheme(Cast("INT8", PerGroup(48)), Cast("INT8", PerGroup(64)), 6.0),
    "blocks": Scheme(Cast("E4M3FN", PerBlock(7, 30)), Cast("E4M3FN", PerGroup(30)), 6.0),
    "input channels": Scheme(Cast("INT8", PerChannel(1)), Cast("INT8", PerToken()), 6.0),
    "E3M4": Scheme(Cast("E3M4", PerChannel(0)), Cast("E3M4", PerToken()), 6.0),
    "wide": Scheme(Cast("INT8", PerChannel(0)), Cast("INT16", PerToken()), 6.0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PLACES = (3, 7, 64, 99)


def planted(*shape, columns=PLACES, size=40.0):
    x = torch.randn(shape)
    x[..., list(columns)] *= size
    return x


def naive(layer, scheme, x):
    """Cut the columns out, quantize what is left, dequantize, multiply both parts in float64."""
    rows = x.reshape(-1, x.shape[-1])
    weight = quantize_unchecked(layer.weight.detach(), scheme.weight, layer.weight.dtype)
    taken = (rows.abs() > scheme.outliers).any(0)
    rest = quantize_unchecked(rows.masked_fill(taken, 0.0), scheme.input).dequantize(torch.float64)
    rounded = weight.dequantize(torch.float32 if x.dtype == torch.float64 else x.dtype).double()
    apart = rows.double()[:, taken] @ rounded[:, taken].T
    return rest @ weight.dequantize(torch.float64).T + apart + layer.bias.double(), taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_naive_decomposition(name, dtype):
    scheme, layer = VARIANTS[name], nn.Linear(100, 24).to(dtype)
    ours = QuantizedLinear.from_float(layer, scheme)
    for shape in ((3, 5, 100), (7, 100), (100,), (1, 1, 1, 100)):
        x = planted(*shape).to(dtype)
        expected, taken = naive(layer, scheme, x)
        assert taken.any()
        y = ours(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 24)
        slack = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 4e-6)
        assert bool(
            ((y.double().view(-1, 24) - expected).abs() <= slack * (expected.abs() + expected.abs().max())).all()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_without_outliers_the_bits_are_those_of_the_plain_scheme(name, dtype):
    layer, scheme = nn.Linear(100, 24).to(dtype), VARIANTS[name]
    ours = QuantizedLinear.from_float(layer, scheme)
    plain = QuantizedLinear.from_float(layer, Scheme(scheme.weight, scheme.input))
    for shape in ((2, 5, 100), (1, 100), (0, 100), (100,)):
        x = torch.randn(shape).clamp(-6, 6).to(dtype)
        assert torch.equal(ours(x), plain(x))


def test_six_itself_is_no_outlier():
    layer = nn.Linear(8, 4)
    ours, plain = (QuantizedLinear.from_float(layer, s) for s in (schemes.LLM_INT8, schemes.INT8_DYNAMIC))
    x = torch.randn(5, 8).clamp(-2, 2)
    x[2, 3] = -6.0
    assert torch.equal(ours(x), plain(x))
    x[2, 3] = -math.nextafter(6.0, 7.0) - 1e-6
    assert not torch.equal(ours(x), plain(x))


def test_outliers_no_longer_cost_the_others():
    """Four columns are 40 times as large: INT8's scales have to span them, unless they are taken out."""
    layer, x = nn.Linear(256, 64), planted(50, 256)
    exact = layer(x)
    plain, apart = (
        ov.sqnr(exact, QuantizedLinear.from_float(layer, s)(x)) for s in (schemes.INT8_DYNAMIC, schemes.LLM_INT8)
    )
    assert apart > plain + 12


def test_a_batch_decides_together():
    """A column is an outlier for all rows of a batch: the paper's hidden dimension."""
    ours = QuantizedLinear.from_float(nn.Linear(100, 24), schemes.LLM_INT8)
    x = torch.randn(4, 100)
    alone = ours(x)
    x[3, 5] = 100.0
    assert not torch.equal(ours(x)[:3], alone[:3])
    torch.testing.assert_close(ours(x)[:3], alone[:3], rtol=0.05, atol=0.05)


def test_all_columns():
    layer = nn.Linear(100, 24)
    ours = QuantizedLinear.from_float(layer, schemes.LLM_INT8)
    x = 7 + torch.rand(6, 100)
    torch.testing.assert_close(ours(x), nn.functional.linear(x, ours.weight, layer.bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype):
    layer = nn.Linear(100, 24).to(dtype)
    ours = QuantizedLinear.from_float(layer, schemes.LLM_INT8)
    for bad in (math.nan, math.inf, -math.inf):
        x = planted(4, 100, size=1.0).to(dtype)
        x[1, 50] = bad
        y = ours(x)
        assert y.isfinite().all(1).tolist() == [True, False, True, True]
        assert not y[1].isfinite().any()
    x = planted(4, 100).to(dtype)
    x[1, 50] = math.nan
    assert ours(x).isnan().all(1).tolist() == [False, True, False, False]


def test_conv1d_is_the_same_turned():
    layer = nn.Linear(100, 24)
    theirs = pytorch_utils.Conv1D(24, 100)
    theirs.load_state_dict({"weight": layer.weight.T.contiguous(), "bias": layer.bias})
    x = planted(5, 100)
    turned = QuantizedLinear.from_float(theirs, schemes.LLM_INT8)
    assert torch.equal(turned(x), QuantizedLinear.from_float(layer, schemes.LLM_INT8)(x))


def test_no_bias_and_a_clamp():
    ours = QuantizedLinear.from_float(nn.Linear(100, 24, bias=False), schemes.LLM_INT8)
    x = planted(5, 100)
    free = ours(x)
    ours.clamp = (0.0, 6.0)
    assert torch.equal(ours(x), free.clamp(0, 6))


def test_one_graph_with_and_without_outliers():
    """How many columns are taken out is no shape of the graph: the same code serves every input."""
    layer = nn.Linear(100, 24)
    ours = QuantizedLinear.from_float(layer, schemes.LLM_INT8)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(ours, (torch.randn(5, 100),)).module()
    for x in (planted(5, 100), torch.randn(5, 100), planted(5, 100, columns=range(100)), planted(5, 100, columns=(1,))):
        assert torch.equal(compiled(x), ours(x))
        assert torch.equal(exported(x), ours(x))


@pytest.mark.filterwarnings("error")
def test_an_input_with_a_gradient():
    ours = QuantizedLinear.from_float(nn.Linear(100, 24), schemes.LLM_INT8)
    x = planted(5, 100)
    assert torch.equal(ours(x.clone().requires_grad_()), ours(x))


def test_shapes_without_numbers():
    ours = QuantizedLinear.from_float(nn.Linear(100, 24), schemes.LLM_INT8).to("meta")
    assert ours(torch.empty(2, 5, 100, device="meta")).shape == (2, 5, 24)


@given(
    st.integers(0, 6),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.sampled_from([*VARIANTS]),
)
def test_any_shape(m, k, n, dtype, seed, name):
    torch.manual_seed(seed)
    layer, scheme = nn.Linear(k, n).to(dtype), VARIANTS[name]
    x = (3 * torch.randn(m, k)).to(dtype)
    expected, _ = naive(layer, scheme, x)
    y = QuantizedLinear.from_float(layer, scheme)(x)
    slack = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 4e-6)
    largest = expected.abs().max() if expected.numel() else 0.0
    assert bool(((y.double() - expected).abs() <= slack * (expected.abs() + largest)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 33), (7, 100), (64, 576)])
def test_column_peaks(shape, dtype):
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x[0, 0] = math.nan
        x[-1, -1] = -math.inf
    expected = [max([0.0, *(abs(v) for v in column if not math.isnan(v))]) for column in x.T.double().tolist()]
    for given_x in (x, x.T.contiguous().T, x.repeat(1, 2)[:, : shape[1]]):
        assert outliers.column_peaks(given_x).tolist() == torch.tensor(expected).float().tolist()


def test_operators_are_sound():
    x = planted(4, 100)
    q = ov.quantize(torch.randn(24, 100), Cast("INT8", PerChannel(0)))
    peaks = outliers.column_peaks(x)
    torch.library.opcheck(torch.ops.octavo.column_peaks, (x,))
    sums = torch.randn(4, 24)
    arguments = (sums, x, peaks, 6.0, q.codes, None, q.scale, None, *q.block, torch.bfloat16)
    torch.library.opcheck(torch.ops.octavo.add_columns, arguments)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5", "mixtral"])
def test_families(family):
    """A whole model, with a threshold that its activations do exceed."""
    model = models.FAMILIES[family]()
    scheme = Scheme(schemes.INT8_DYNAMIC.weight, schemes.INT8_DYNAMIC.input, outliers=1.0)
    before = models.logits(model)
    summary = ov.quantize_(model, scheme)
    assert {x.scheme for x in summary.quantized} == {schemes.describe(scheme)}
    assert ov.sqnr(before, models.logits(model)) > 15


def test_refusals():
    static = schemes.INT8_STATIC
    with pytest.raises(OctavoError, match="inputs in float"):
        Scheme(Cast("INT8"), None, outliers=6.0)
    with pytest.raises(OctavoError, match="must be Current"):
        Scheme(static.weight, static.input, outliers=6.0)
    for wrong in (0, -1.0, math.inf, math.nan, "6", True):
        with pytest.raises(OctavoError, match="magnitude above which"):
            Scheme(Cast("INT8"), Cast("INT8"), wrong)
    assert Scheme(Cast("INT8"), Cast("INT8"), 6) == Scheme(Cast("INT8"), Cast("INT8"), 6.0)
    with pytest.raises(OctavoError, match="not of convolutions"):
        ov.quantize_(nn.Sequential(nn.Conv2d(4, 4, 3)), {"0": "llm-int8"})
    left = ov.quantize_(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4)), "llm-int8").left
    assert "not of convolutions" in left[0].reason


def test_an_embedding_has_no_input():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    ov.quantize_(model, {"0": "llm-int8", "1": "llm-int8"})
    assert model[0].scheme == schemes.INT8_WEIGHT_ONLY
    assert model[1].scheme == schemes.LLM_INT8


def test_in_words():
    assert schemes.describe(Scheme(Cast("INT8"), Cast("INT8"), 4.5)) == (
        "INT8/tensor × INT8/tensor, outliers above 4.5 in float"
    )
    assert ov.schemes.get("LLM_INT8").outliers == 6.0
