"""quantize_ on the models people have: what changes, what does not, and what the summary says."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, PerChannel, PerGroup, PerToken, Rule, Scheme
from octavo.calibration.line_search import LineSearch
from octavo.calibration.mse import MSE
from octavo.core import schemes
from octavo.core.cast import quantize_unchecked
from octavo.nn.linear import QuantizedLinear
from octavo.ptq.quantize import model_bytes
from tests.nn import models

FLOORS = {"int8-dynamic": 25, "int8-weight-only": 33, "int8-group64": 25, "fp8-dynamic": 18, "fp8-weight-only": 20}


def quantized(model):
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("scheme", FLOORS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family, scheme):
    model = models.FAMILIES[family]()
    before = models.logits(model)
    summary = ov.quantize_(model, scheme)
    after = models.logits(model)
    assert FLOORS[scheme] < ov.sqnr(before, after) < 70
    assert len(summary.quantized) >= 8
    assert set(quantized(model)) >= {layer.name for layer in summary.quantized}
    assert all(layer.sqnr > 20 for layer in summary.quantized)
    assert not any("lm_head" in name for name in quantized(model))


@pytest.mark.parametrize("name", schemes.NAMES)
def test_all_named_schemes(name):
    model = models.Plain().eval()
    x = torch.randn(50, 20)
    before = model(x)
    ov.quantize_(model, name, [x] if "static" in name or "smoothquant" in name else None)
    floor = {"e5m2": 14, "fp8": 20, "e3m4": 24}.get(name.split("-")[0], 30 if "weight" in name else 27)
    assert ov.sqnr(before, model(x)) > floor


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic", "e3m4-int8-group64"])
def test_equals_dequantizing_both_sides(scheme):
    """Layer after layer in float64, with the same casts."""
    model = models.Plain().eval()
    plain = copy.deepcopy(model).double()
    ov.quantize_(model, scheme)
    how = schemes.NAMES[scheme]

    def replay(layer, x):
        weight = quantize_unchecked(layer.weight.detach().float(), how.weight).dequantize(torch.float64)
        rows = quantize_unchecked(x.float(), how.input).dequantize(torch.float64)
        return nn.functional.linear(rows, weight, layer.bias)

    x = torch.randn(9, 20)
    inner = (x.double() + plain.shift,)
    y = plain.norm(replay(plain.first, inner[0])).relu()
    for block in plain.blocks:
        y = replay(block, y)
    assert ov.sqnr(y, model(x)) > 60  # a rounding of FP32 may move an input across a tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    model = models.llama().to(dtype)
    before = models.logits(model)
    ov.quantize_(model, "int8-dynamic")
    after = models.logits(model)
    assert after.dtype == dtype
    assert ov.sqnr(before.float(), after.float()) > 25
    for layer in quantized(model).values():
        assert layer.dtype == dtype
        storage = torch.float32 if dtype == torch.float64 else dtype
        assert torch.equal(layer.scale.to(storage).float(), layer.scale)


def test_a_sequential_in_place():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    relu = model[1]
    summary = ov.quantize_(model, "int8-dynamic")
    assert isinstance(model[0], QuantizedLinear)
    assert isinstance(model[2], QuantizedLinear)
    assert model[1] is relu
    assert [layer.name for layer in summary.quantized] == ["0", "2"]


def test_the_summary_adds_up():
    model = models.llama()
    before = model_bytes(model)
    summary = ov.quantize_(model, {"*mlp*": "int8-dynamic", "*q_proj": "fp8-weight-only", "*": None})
    assert summary.bytes_before == before
    assert summary.bytes_after == model_bytes(model) < before
    parts = sum(layer.bytes_before for layer in summary.layers)
    assert before - parts == sum(b.nbytes for b in models.llama().buffers())  # the rotary frequencies are no layer's
    saved = sum(layer.bytes_before - layer.bytes_after for layer in summary.layers)
    assert saved == summary.bytes_before - summary.bytes_after
    assert len(summary.quantized) + len(summary.left) == len(summary.layers)
    assert len(summary.quantized) == 8
    kinds = {layer.scheme for layer in summary.quantized}
    assert kinds == {"int8-dynamic", "fp8-weight-only"}
    rows = summary.groups()
    assert sum(row[2] for row in rows) == len(summary.layers)
    assert sum(row[3] for row in rows) == parts
    assert [row[0] for row in rows[:2]] == ["int8-dynamic", "fp8-weight-only"]
    text = str(summary)
    assert "8 layers in 8 bits" in text
    assert "rule name='*'" in text
    again = json.loads(json.dumps(summary.to_json()))
    assert again["layers"][0]["name"] == summary.layers[0].name
    assert again["bytes_after"] == summary.bytes_after
    for layer in summary.quantized:
        weight = models.llama().get_submodule(layer.name).weight
        assert layer.bytes_before == weight.nbytes
        codes = model.get_submodule(layer.name)
        assert layer.bytes_after == codes.codes.nbytes + codes.scale.nbytes


def test_sqnr_of_the_summary_is_the_weights():
    model = models.gpt2()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for layer in ov.quantize_(model, "fp8-dynamic").quantized:
        weight = before[f"{layer.name}.weight"]
        expected = ov.sqnr(weight.T, ov.fake_quantize(weight.T, Cast("E4M3FN", PerChannel(0))))
        assert layer.sqnr == pytest.approx(expected)


def test_shared_modules_stay_shared():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))})
    summary = ov.quantize_(model, "int8-dynamic")
    assert model["a"] is model["b"][0]
    assert len(summary.quantized) == 2
    assert summary.bytes_after == model_bytes(model)


def test_a_weight_shared_by_two_layers_stays_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    biases = [layer.bias.detach().clone() for layer in model]
    ov.quantize_(model, "int8-dynamic")
    assert model[0] is not model[1]
    assert model[0].codes.data_ptr() == model[1].codes.data_ptr() != model[2].codes.data_ptr()
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model, biases, strict=True))
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other[1].weight = other[0].weight
    ov.quantize_(other, {"0": "int8-dynamic", "1": "fp8-dynamic"})
    assert other[0].scheme == schemes.INT8_DYNAMIC
    assert other[1].scheme == schemes.FP8_DYNAMIC
    assert other[1].codes.dtype == torch.uint8


def test_the_tied_head_by_its_exact_name():
    model = models.tied_llama()
    table = model.get_input_embeddings().weight
    before = models.logits(model)
    summary = ov.quantize_(model, {"lm_head": "int8-dynamic", "*": "int8-dynamic"})
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.get_input_embeddings().weight is table
    assert any("lm_head shared its weight with model.embed_tokens" in note for note in summary.notes)
    assert "lm_head shared its weight" in str(summary)
    assert 25 < ov.sqnr(before, models.logits(model)) < 70
    assert ov.quantize_(models.tied_llama(), "int8-dynamic").notes == []


def test_biases_and_their_absence():
    model = models.Plain()
    ov.quantize_(model, "int8-dynamic")
    assert model.first.bias is not None
    assert model.blocks[0].bias is None


def test_frozen_and_in_training_mode():
    model = models.Plain()
    model.requires_grad_(False)
    model.train()
    ov.quantize_(model, "int8-dynamic")
    assert model.training
    assert all(not p.requires_grad for p in model.parameters())
    assert {n for n, _ in model.named_parameters()} == {"norm.weight", "norm.bias"}


def test_deepcopy_of_a_model():
    model = models.llama()
    ov.quantize_(model, "fp8-block")
    twin = copy.deepcopy(model)
    assert torch.equal(models.logits(twin), models.logits(model))


def test_conversion_after_quantizing():
    model = models.llama()
    ov.quantize_(model, "int8-dynamic")
    before = {n: (layer.codes.clone(), layer.scale.clone()) for n, layer in quantized(model).items()}
    full = models.logits(model)
    model.to(torch.bfloat16)
    for n, layer in quantized(model).items():
        assert torch.equal(layer.codes, before[n][0])
        assert torch.equal(layer.scale, before[n][1])
    assert models.logits(model).dtype == torch.bfloat16
    assert ov.sqnr(full, models.logits(model).float()) > 25


def unchanged(model, rules, words, **arguments):
    state = {n: t.clone() for n, t in model.state_dict().items()} if not next(model.parameters()).is_meta else {}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(OctavoError, match=words):
        ov.quantize_(model, rules, **arguments)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, model.state_dict()[n]) or t.isnan().any() for n, t in state.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_not_a_number(part, value):
    model = models.Plain()
    with torch.no_grad():
        getattr(model.blocks[1], part).view(-1)[3] = value
    unchanged(model, "int8-dynamic", rf"blocks.1.{part} holds 1 NaN or Inf among")
    ov.quantize_(model, {"blocks.1": None, "*": "int8-dynamic"})
    assert isinstance(model.first, QuantizedLinear)


@pytest.mark.parametrize("observer", [None, MSE()])
def test_beyond_float32(observer):
    model = models.Plain().double()
    with torch.no_grad():
        model.blocks[1].weight[0, 3] = 1e300
    unchanged(model, "int8-dynamic", "blocks.1.weight holds 1 NaN or Inf or numbers beyond", weight_observer=observer)


def test_nothing_changes_when_an_observer_does_not_suit_a_late_layer():
    rules = [Rule("fp8-dynamic", "first"), Rule("int8-dynamic", "blocks.1")]
    unchanged(models.Plain(), rules, "blocks.1: the fully flexible line search", weight_observer=LineSearch())
    unchanged(models.Plain(), rules, r"an observer is .*MinMax\(\)", weight_observer="mse")


def test_meta():
    with torch.device("meta"):
        model = models.Plain()
    unchanged(model, "int8-dynamic", "first is on the meta device")
    half = models.Plain()
    half.first.bias = torch.nn.Parameter(half.first.bias.to("meta"))
    with pytest.raises(OctavoError, match=r"first\.bias is on the meta device"):
        ov.quantize_(half, "int8-dynamic")


@pytest.mark.parametrize(
    "rules", ["int9-dynamic", {"blocks.9": "int8-dynamic", "*": "int8-dynamic"}, {"norm": "int8-dynamic"}]
)
def test_nothing_changes_on_a_wrong_rule(rules):
    unchanged(models.Plain(), rules, ".")


def test_nothing_changes_when_a_late_layer_does_not_fit():
    odd = Scheme(Cast("INT8", PerChannel(5)))
    unchanged(models.Plain(), [Rule(odd, "blocks.1"), Rule("int8-dynamic")], r"blocks.1: PerChannel\(axis=5\)")
    odd = Scheme(Cast("INT8"), Cast("INT8", PerChannel(2)))
    unchanged(models.Plain(), [Rule(odd, "blocks.1"), Rule("int8-dynamic")], r"blocks.1: PerChannel\(axis=2\)")


def test_twice():
    model = models.Plain()
    ov.quantize_(model, {"first": "int8-dynamic"})
    summary = ov.quantize_(model, "fp8-dynamic")
    assert {layer.name: layer.reason for layer in summary.left} == {"first": "already quantized", "norm": "no matrix"}
    assert model.first.scheme == schemes.INT8_DYNAMIC
    unchanged(model, "int8-dynamic", "already quantized")


def test_progress():
    seen = []

    def track(items, what):
        for item in items:
            seen.append((item, what))
            yield item

    summary = ov.quantize_(models.Plain(), "int8-dynamic", track=track)
    assert seen == [(layer.name, "quantizing") for layer in summary.quantized]


def test_custom_schemes():
    model = models.Plain().eval()
    x = torch.randn(30, 20)
    before = model(x)
    scheme = Scheme(Cast("UINT8", PerGroup(7), affine=True), Cast("INT8", PerToken(), affine=True))
    summary = ov.quantize_(model, scheme)
    assert ov.sqnr(before, model(x)) > 30
    assert summary.quantized[0].scheme == "UINT8/g7/affine × INT8/affine"


def test_zero_weights_and_empty_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 3))
    nn.init.zeros_(model[0].weight)
    for scheme in ("int8-dynamic", "fp8-weight-only", "fp8-block"):
        twin = copy.deepcopy(model)
        ov.quantize_(twin, scheme)
        assert torch.equal(twin(torch.randn(2, 4)), model(torch.randn(2, 4)))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_small_half_precision_weights_keep_their_precision(size):
    model = nn.Sequential(nn.Linear(64, 64)).half()
    with torch.no_grad():
        model[0].weight.mul_(size * 8)
    summary = ov.quantize_(model, "int8-weight-only")
    assert summary.quantized[0].sqnr > (38 if size > 1e-4 else 20)
